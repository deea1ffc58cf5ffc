"""The life of a job, a method for each step: all publications, claims, reports and results of a process pass here.

A backend is chosen by the setting ``kathikon_storage_backend``; `kathikon_celery.storage.sql.SQLBackend` is the one
that ships. Derive from that one, and override the steps that you want to see or to change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection

from kathikon_celery.job import Cause, Hold, Job, State
from kathikon_celery.storage.acts import Act
from kathikon_celery.storage.by_hand import ByHand, Skips
from kathikon_celery.storage.claim import Waiting
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.pauses import Kind
from kathikon_celery.storage.scan_start import ScanStart
from kathikon_celery.storage.selecting import Filter
from kathikon_celery.storage.settle import TaskEnd


class StorageBackend(ABC):
    """The steps of a job's life, each of which a backend implements.

    >>> class AuditedBackend(SQLBackend):
    ...     def insert(self, job, hold=None, soon=True):
    ...         published = super().insert(job, hold, soon)
    ...         if published:
    ...             audit.info("published %s %s", job.task, job.id)
    ...         return published

    A method that takes a *connection* is part of a transaction that the caller commits.

    Arguments:
        database: the connections to the database.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    @abstractmethod
    def setup(self) -> None:
        """Create the tables, or upgrade them if they are older than the code."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    # --- published

    @abstractmethod
    def insert(self, job: Job, hold: Hold | None = None, soon: bool = True) -> bool:
        """Publish *job*, or make the job with the same id wait again: see `kathikon_celery.storage.insert.insert`."""

    @abstractmethod
    def insert_many(self, jobs: Sequence[Job]) -> None:
        """Publish *jobs* in one transaction."""

    # --- claimed

    @abstractmethod
    def claim(self, queue: str, limit: int, node_id: int | None) -> list[Job]:
        """Claim up to *limit* ready jobs of *queue* in a transaction of its own; return them with all columns."""

    @abstractmethod
    def claim_jobs(
        self,
        connection: Connection,
        queue: str,
        limit: int,
        node_id: int,
        front: ScanStart | None = None,
        waiting: Waiting | None = None,
    ) -> list[Job]:
        """Claim up to *limit* ready jobs of the queue with the key *queue*: see `kathikon_celery.storage.claim`."""

    @abstractmethod
    def claim_told(self, connection: Connection, queue: str, seq: int, node_id: int, waiting: Waiting) -> list[Job]:
        """Claim the job with the number *seq*, if it is still ready."""

    @abstractmethod
    def complete_and_claim(
        self,
        connection: Connection,
        holds: Sequence[Hold],
        queue: str,
        limit: int,
        node_id: int,
        front: ScanStart | None = None,
        waiting: Waiting | None = None,
    ) -> tuple[int, list[Job]]:
        """Do what `completed` and `claim_jobs` do, at once; return the results of both."""

    @abstractmethod
    def take_again(self, connection: Connection, held: Sequence[Job]) -> None:
        """Count again, for their limits, jobs that run, if a crashed server may have forgotten them."""

    @abstractmethod
    def claim_again(self, connection: Connection, holds: Sequence[Hold], node_id: int) -> int:
        """Repeat claims that a crashed server may have forgotten; return the number of forgotten ones."""

    # --- reported by the worker that holds the jobs

    @abstractmethod
    def started(self, connection: Connection, holds: Sequence[Hold], acked: bool = False) -> int:
        """Report that the pool has accepted the jobs. *acked*: they are acknowledged now, and never run again."""

    @abstractmethod
    def completed(self, connection: Connection, holds: Sequence[Hold]) -> int:
        """Report that the tasks have returned; return the number of jobs that were held so."""

    @abstractmethod
    def completed_with(self, connection: Connection, ends: Mapping[Hold, Mapping[str, str | None]]) -> int:
        """Report that the tasks have returned with these results; return the number of jobs that were held so."""

    @abstractmethod
    def ended(
        self,
        connection: Connection,
        hold: Hold,
        state: State,
        cause: Cause | None,
        reason: str,
        traceback: str | None = None,
        status: str | None = None,
    ) -> int:
        """Report that the job is dead, cancelled or discarded (*state*); return 0 if it is not held so any more."""

    @abstractmethod
    def given_back(
        self, connection: Connection, holds: Sequence[Hold], crashed: bool = False, has_begun: bool = True
    ) -> int:
        """Make the jobs ready again.

        Arguments:
            crashed: the process that ran them was lost.
            has_begun: their tasks have begun; if not, the claim does not count as an attempt.
        """

    @abstractmethod
    def replaced(self, connection: Connection, holds: Sequence[Hold]) -> int:
        """Report that the tasks were replaced by others."""

    @abstractmethod
    def remove_node(self, node_id: int, renewal: str | None = None) -> int | None:
        """Delete a node, and give back its jobs; return their number.

        *renewal*: the `storage.nodes.Node.renewal` last seen; return `None` if the lease was renewed since then.
        """

    # --- results

    @abstractmethod
    def settle(self, ending: TaskEnd, bodies: Mapping[str, TaskEnd], on_disk: bool = False) -> bool:
        """Write the end of a task and all that follows from it: see `kathikon_celery.storage.settle`."""

    @abstractmethod
    def store(
        self,
        hold: Hold,
        state: State | None,
        *,
        status: str,
        result: str | None,
        traceback: str | None,
        meta: str | None,
    ) -> bool:
        """Write the progress of a running task. *state*: running, or `None` for no change."""

    @abstractmethod
    def store_retry(self, hold: Hold, *, reason: str, **written: str | None) -> None:
        """Write the failure because of which a task has published its own job again."""

    @abstractmethod
    def store_alone(
        self,
        task_id: str,
        state: State | None,
        *,
        reason: str | None = None,
        cause: Cause | None = None,
        **written: str | None,
    ) -> None:
        """Write a result by the task's id, without a claim."""

    @abstractmethod
    def forget(self, task_id: str) -> None:
        """Delete the result; the job stays until it is pruned."""

    # --- in time

    @abstractmethod
    def promote_scheduled(self, limit: int) -> int:
        """Make up to *limit* due jobs ready; return their number."""

    @abstractmethod
    def next_due(self) -> float | None:
        """Return the seconds until the next job is due, or `None`."""

    @abstractmethod
    def offer(self, keys: Collection[str]) -> int:
        """Let as many jobs out of the lines of the limits *keys* as there is room for; return their number."""

    @abstractmethod
    def offer_due(self) -> int:
        """`offer` for the limits whose rate has a token again."""

    @abstractmethod
    def next_offer(self) -> float | None:
        """Return the seconds until `offer_due` or a `sweep` has something to do, or `None`."""

    @abstractmethod
    def sweep(self, after: str = "") -> str:
        """`offer` for the next lines behind the one called *after*; return the last one, empty if it was the end."""

    @abstractmethod
    def discard_expired(self) -> int:
        """Discard jobs that expired while they waited; return their number."""

    @abstractmethod
    def prunable_jobs(self, retention: Mapping[State, float | None], limit: int) -> list[str]:
        """Return ids of up to *limit* jobs that ended longer ago than *retention* (seconds by state)."""

    @abstractmethod
    def prune(self, retention: Mapping[State, float | None], limit: int) -> int:
        """Delete up to *limit* of those jobs, but none that was published again meanwhile; return their number."""

    # --- by hand

    @abstractmethod
    def update(self, job: Job) -> None:
        """Write a job back, if the state machine allows the change."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Delete jobs; return their number."""

    @abstractmethod
    def revoke(self, ids: Sequence[str]) -> int:
        """Cancel jobs that wait, and keep those that a worker holds from running again; return their number."""

    @abstractmethod
    def revoke_stamped(self, headers: Mapping[str, Collection[str]]) -> int:
        """`revoke` the jobs with one of these stamps: header -> values."""

    @abstractmethod
    def begin(self, act: Act) -> None:
        """Write an operator's act that changes jobs in several transactions."""

    @abstractmethod
    def end(self, act: Act) -> None:
        """Note that the act has come to its end."""

    @abstractmethod
    def change(self, ids: Sequence[str], verb: ByHand, act: Act, is_whole: bool, skips: Skips) -> list[Job]:
        """Change jobs in one transaction: see `kathikon_celery.storage.by_hand.change`."""

    @abstractmethod
    def copy(self, job_id: str, verb: ByHand, act: Act) -> Job:
        """Publish a copy of a job: see `kathikon_celery.storage.by_hand.copy`."""

    @abstractmethod
    def remove(self, ids: Sequence[str], verb: ByHand, act: Act, skips: Skips) -> list[Job]:
        """Delete jobs in one transaction: see `kathikon_celery.storage.by_hand.remove`."""

    @abstractmethod
    def pause(self, kind: Kind, name: str, until: datetime | None, act: Act) -> None:
        """Keep workers from starting jobs of a queue, of a task, or all jobs."""

    @abstractmethod
    def resume(self, kind: Kind, name: str, act: Act) -> bool:
        """End a pause; return false if there is none."""

    @abstractmethod
    def set_limit(self, name: str, given: Mapping[str, int | float | None], act: Act) -> bool:
        """Let an operator's numbers count for a limit; return whether that changed anything.

        Arguments:
            given: of ``concurrency``, ``rate``, ``per`` and ``burst``; `None`: not limited.
        """

    @abstractmethod
    def reset_limit(self, name: str, act: Act) -> bool:
        """Let the code's numbers count again; return false if they count."""

    @abstractmethod
    def prune_limits(self) -> bool:
        """Delete what nothing needs of limits; return whether keys are left."""

    @abstractmethod
    def clear_jobs(self) -> None:
        """Delete all jobs (for tests)."""

    @abstractmethod
    def reset(self) -> None:
        """Delete everything (for tests)."""

    # --- read

    @abstractmethod
    def fetch(self, job_id: str) -> Job | None:
        """Return the job with that id, or `None`."""

    @abstractmethod
    def all(self, queue: str | None, state: State | None) -> list[Job]:
        """List jobs."""

    @abstractmethod
    def page(self, chosen: Filter, limit: int, after: Job | None) -> list[Job]:
        """List up to *limit* jobs that fit, from the one behind *after* on, without their bodies and results."""

    @abstractmethod
    def count(self, chosen: Filter, at_most: int | None = None) -> int:
        """Return the number of jobs that fit; *at_most*: stop counting there."""

    @abstractmethod
    def workflow(self, job_id: str) -> list[Job]:
        """List the jobs of the workflow to which a job, or a group of jobs, of that id belongs."""

    @abstractmethod
    def counts(self) -> dict[tuple[str, str], int]:
        """Return the number of jobs by queue and state."""
