"""The life of a job as a storage backend must provide it, one method a step.

A backend is chosen by the setting ``kathikon_storage_backend``; `kathikon_celery.storage.sql.SQLBackend` is the one
that ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kathikon_celery.job import Job, State


class StorageBackend(Protocol):
    """Kathikon's storage behaviour: what the facade, the promoter and the pruner need."""

    def setup(self) -> None:
        """Make the tables where there are none, and upgrade them where they are older than the code."""

    def insert(self, job: Job, fence: int | None = None, soon: bool = True) -> bool:
        """Publish a job, or make the one of the same id wait again."""

    def insert_many(self, jobs: Sequence[Job]) -> None:
        """Publish many jobs in one transaction."""

    def update(self, job: Job) -> None:
        """Write a job back, through the state machine."""

    def fetch(self, job_id: str) -> Job | None:
        """The job of that id."""

    def claim(self, queue: str, limit: int, node_id: int | None) -> list[Job]:
        """Take up to *limit* ready jobs of a queue."""

    def promote_scheduled(self, limit: int) -> int:
        """Make due jobs ready."""

    def next_due(self) -> float | None:
        """Seconds until the next promotion."""

    def discard_expired(self) -> int:
        """Discard the jobs that expired while they waited."""

    def prunable_jobs(self, retention: Mapping[State, float | None], limit: int) -> list[str]:
        """Ids of jobs that ended long enough ago."""

    def prune(self, retention: Mapping[State, float | None], limit: int) -> int:
        """Delete up to *limit* of those jobs, but none that was published again meanwhile."""

    def delete(self, ids: Sequence[str]) -> int:
        """Delete jobs."""

    def all(self, queue: str | None, state: State | None) -> list[Job]:
        """List jobs."""

    def workflow(self, job_id: str) -> list[Job]:
        """List the jobs of the workflow to which a job, or a group of jobs, of that id belongs."""

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of jobs by queue and state."""

    def clear_jobs(self) -> None:
        """Delete all jobs (for tests)."""

    def reset(self) -> None:
        """Delete everything (for tests)."""

    def close(self) -> None:
        """Give up the connections."""
