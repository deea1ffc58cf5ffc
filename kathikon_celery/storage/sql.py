"""The storage backend on a SQL database: each verb is one transition of this package in its transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Table, delete

from kathikon_celery.job import Job, State
from kathikon_celery.storage import claim, insert, promote, prune, reading, schema, update
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key
from kathikon_celery.storage.tables import jobs, metadata

T = TypeVar("T")


class SQLBackend:
    """Jobs in a SQL database.

    Arguments:
        database: the connections to it.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._pruned: dict[State, datetime] = {}

    def _tried(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call what may be called twice, a second time when its connection turns out to be lost."""
        return self.database.patiently(lambda again: function(*arguments), patient=False)

    def _read(self, function: Callable[..., T], *arguments: Any) -> T:
        def read() -> T:
            with self.database.read() as connection:
                return function(connection, *arguments)

        return self._tried(read)

    def setup(self) -> None:
        schema.setup(self.database)

    def insert(self, job: Job) -> None:
        insert.insert(self.database, job)

    def insert_many(self, jobs: Sequence[Job]) -> None:
        insert.insert_many(self.database, jobs)

    def update(self, job: Job) -> None:
        update.update(self.database, job)

    def fetch(self, job_id: str) -> Job | None:
        return self._read(reading.fetch, job_id)

    def claim(self, queue: str, limit: int, node_id: int | None) -> list[Job]:
        with self.database.write() as connection:
            claimed = claim.claim(self.database, connection, key(queue), limit, node_id)
            return [job for one in claimed if (job := reading.fetch(connection, one.id)) is not None]

    def promote_scheduled(self, limit: int) -> int:
        return self._tried(promote.promote, self.database, limit)

    def next_due(self) -> float | None:
        return self._read(promote.next_due)

    def discard_expired(self) -> int:
        return self._tried(promote.expire, self.database)

    def prunable_jobs(self, retention: Mapping[State, float | None], limit: int) -> list[str]:
        return self._read(prune.prunable, retention, limit)

    def prune(self, retention: Mapping[State, float | None], limit: int) -> int:
        return self._tried(prune.prune, self.database, retention, limit, self._pruned)

    def delete(self, ids: Sequence[str]) -> int:
        return self._tried(prune.delete_keys, self.database, [key(job_id) for job_id in ids])

    def all(self, queue: str | None, state: State | None) -> list[Job]:
        return self._read(reading.select_all, queue, state)

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
