"""The storage backend on a SQL database: each verb is one transition of this package in its transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, delete

from kathikon_celery.job import Cause, Hold, Job, State
from kathikon_celery.storage import (
    by_hand,
    claim,
    finish,
    insert,
    limit_numbers,
    limits,
    nodes,
    pauses,
    promote,
    prune,
    reading,
    results,
    revoking,
    schema,
    selecting,
    update,
)
from kathikon_celery.storage.acts import Act
from kathikon_celery.storage.backend import StorageBackend
from kathikon_celery.storage.by_hand import ByHand, Skips
from kathikon_celery.storage.claim import Waiting
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key
from kathikon_celery.storage.pauses import Kind
from kathikon_celery.storage.scan_start import ScanStart
from kathikon_celery.storage.selecting import Filter
from kathikon_celery.storage.settle import TaskEnd, settle
from kathikon_celery.storage.tables import jobs, metadata

T = TypeVar("T")


class SQLBackend(StorageBackend):
    """Jobs in a SQL database: the class to derive from.

    >>> class AuditedBackend(SQLBackend):  # kathikon_storage_backend = "proj.storage:AuditedBackend"
    ...     def delete(self, ids):
    ...         audit.info("deleted %s", ids)
    ...         return super().delete(ids)

    Arguments:
        database: the connections to it.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._pruned: dict[State, datetime] = {}

    def _tried(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call *function*, and once more if its connection was lost: so it may run twice."""
        return self.database.patiently(lambda again: function(*arguments), patient=False)

    def _read(self, function: Callable[..., T], *arguments: Any) -> T:
        def read() -> T:
            with self.database.read() as connection:
                return function(connection, *arguments)

        return self._tried(read)

    def setup(self) -> None:
        schema.setup(self.database)

    def insert(self, job: Job, hold: Hold | None = None, soon: bool = True) -> bool:
        return insert.insert(self.database, job, hold, soon)

    def insert_many(self, jobs: Sequence[Job]) -> None:
        insert.insert_many(self.database, jobs)

    def update(self, job: Job) -> None:
        update.update(self.database, job)

    def fetch(self, job_id: str) -> Job | None:
        return self._read(reading.fetch, job_id)

    def claim(self, queue: str, limit: int, node_id: int | None) -> list[Job]:
        with self.database.once() as connection:
            claimed = claim.claim(self.database, connection, key(queue), limit, node_id)
            return [job for one in claimed if (job := reading.fetch(connection, one.id)) is not None]

    def claim_jobs(
        self,
        connection: Connection,
        queue: str,
        limit: int,
        node_id: int,
        front: ScanStart | None = None,
        waiting: Waiting | None = None,
    ) -> list[Job]:
        return claim.claim(self.database, connection, queue, limit, node_id, front, waiting)

    def claim_told(self, connection: Connection, queue: str, seq: int, node_id: int, waiting: Waiting) -> list[Job]:
        return claim.claim_told(self.database, connection, queue, seq, node_id, waiting)

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
        return claim.complete_and_claim(self.database, connection, holds, queue, limit, node_id, front, waiting)

    def take_again(self, connection: Connection, held: Sequence[Job]) -> None:
        limits.take_again(self.database, connection, held)

    def claim_again(self, connection: Connection, holds: Sequence[Hold], node_id: int) -> int:
        return claim.claim_again(self.database, connection, holds, node_id)

    def started(self, connection: Connection, holds: Sequence[Hold], acked: bool = False) -> int:
        return finish.started(self.database, connection, holds, acked)

    def completed(self, connection: Connection, holds: Sequence[Hold]) -> int:
        return finish.completed(self.database, connection, holds)

    def completed_with(self, connection: Connection, ends: Mapping[Hold, Mapping[str, str | None]]) -> int:
        return results.end_many(self.database, connection, ends)

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
        return finish.ended(self.database, connection, hold, state, cause, reason, traceback, status)

    def given_back(
        self, connection: Connection, holds: Sequence[Hold], crashed: bool = False, has_begun: bool = True
    ) -> int:
        return finish.given_back(self.database, connection, holds, crashed, has_begun)

    def replaced(self, connection: Connection, holds: Sequence[Hold]) -> int:
        return finish.replaced(self.database, connection, holds)

    def remove_node(self, node_id: int, renewal: str | None = None) -> int | None:
        return nodes.remove(self.database, node_id, renewal)

    def settle(self, ending: TaskEnd, bodies: Mapping[str, TaskEnd], on_disk: bool = False) -> bool:
        return settle(self.database, ending, bodies, on_disk)

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
        return results.store(self.database, hold, state, status=status, result=result, traceback=traceback, meta=meta)

    def store_retry(self, hold: Hold, *, reason: str, **written: str | None) -> None:
        results.store_retry(self.database, hold, reason=reason, **written)

    def store_alone(
        self,
        task_id: str,
        state: State | None,
        *,
        reason: str | None = None,
        cause: Cause | None = None,
        **written: str | None,
    ) -> None:
        results.store_alone(self.database, task_id, state, reason=reason, cause=cause, **written)

    def forget(self, task_id: str) -> None:
        results.forget(self.database, task_id)

    def promote_scheduled(self, limit: int) -> int:
        return self._tried(promote.promote, self.database, limit)

    def next_due(self) -> float | None:
        return self._read(promote.next_due)

    def offer(self, keys: Collection[str]) -> int:
        return self._tried(limits.offer, self.database, keys)

    def offer_due(self) -> int:
        return self._tried(limits.offer_due, self.database)

    def next_offer(self) -> float | None:
        return self._read(limits.next_offer)

    def sweep(self, after: str = "") -> str:
        return self._tried(limits.sweep, self.database, after)

    def discard_expired(self) -> int:
        return self._tried(promote.expire, self.database)

    def prunable_jobs(self, retention: Mapping[State, float | None], limit: int) -> list[str]:
        return self._read(prune.prunable, retention, limit)

    def prune(self, retention: Mapping[State, float | None], limit: int) -> int:
        return self._tried(prune.prune, self.database, retention, limit, self._pruned)

    def delete(self, ids: Sequence[str]) -> int:
        return self._tried(prune.delete_keys, self.database, [key(job_id) for job_id in ids])

    def revoke(self, ids: Sequence[str]) -> int:
        return self._tried(revoking.revoke, self.database, ids)

    def revoke_stamped(self, headers: Mapping[str, Collection[str]]) -> int:
        return self._tried(revoking.revoke_stamped, self.database, headers)

    def begin(self, act: Act) -> None:
        by_hand.begin(self.database, act)

    def end(self, act: Act) -> None:
        by_hand.end(self.database, act)

    def change(self, ids: Sequence[str], verb: ByHand, act: Act, is_whole: bool, skips: Skips) -> list[Job]:
        return by_hand.change(self.database, ids, verb, act, is_whole, skips)

    def copy(self, job_id: str, verb: ByHand, act: Act) -> Job:
        return by_hand.copy(self.database, job_id, verb, act)

    def remove(self, ids: Sequence[str], verb: ByHand, act: Act, skips: Skips) -> list[Job]:
        return by_hand.remove(self.database, ids, verb, act, skips)

    def pause(self, kind: Kind, name: str, until: datetime | None, act: Act) -> None:
        pauses.pause(self.database, kind, name, until, act)

    def resume(self, kind: Kind, name: str, act: Act) -> bool:
        return pauses.resume(self.database, kind, name, act)

    def set_limit(self, name: str, given: Mapping[str, int | float | None], act: Act) -> bool:
        return limit_numbers.set_numbers(self.database, name, given, act)

    def reset_limit(self, name: str, act: Act) -> bool:
        return limit_numbers.reset(self.database, name, act)

    def prune_limits(self) -> bool:
        return self._tried(limit_numbers.prune, self.database)

    def all(self, queue: str | None, state: State | None) -> list[Job]:
        return self._read(reading.select_all, queue, state)

    def page(self, chosen: Filter, limit: int, after: Job | None) -> list[Job]:
        return self._read(selecting.page, chosen, limit, after)

    def count(self, chosen: Filter, at_most: int | None = None) -> int:
        return self._read(selecting.count, chosen, at_most)

    def workflow(self, job_id: str) -> list[Job]:
        return self._read(reading.workflow, job_id)

    def counts(self) -> dict[tuple[str, str], int]:
        return self._read(reading.counts)

    def clear_jobs(self) -> None:
        self._tried(self._empty, [jobs])

    def reset(self) -> None:
        self._tried(self._empty, list(metadata.tables.values()))

    def _empty(self, tables: Sequence[Table]) -> None:
        with self.database.write() as connection:
            for table in tables:
                connection.execute(delete(table))

    def close(self) -> None:
        self.database.close()
