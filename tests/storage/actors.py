"""Who acts on the tables: publishers, and workers as storage sees them."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

from kathikon_celery.job import Cause, Job, State
from kathikon_celery.storage import Storage, claim, finish, insert, messages, nodes, results
from kathikon_celery.storage.messages import Message
from kathikon_celery.storage.names import key
from kathikon_celery.storage.scan_start import ScanStart

_publications = count(1)


def new_job(job_id: str = "job", **fields: Any) -> Job:
    """A job, each call another publication."""
    return Job(id=job_id, publication=next(_publications), **fields)


def the_job(storage: Storage, job_id: str = "job") -> Job:
    """The row as it is now."""
    job = storage.fetch(job_id)
    assert job is not None
    return job


class Worker:
    """A node that claims and reports."""

    def __init__(self, storage: Storage, lease: float = 60.0) -> None:
        self.database = storage.database
        self.row = nodes.register(self.database, "worker", "machine", 1, 0.0, lease)
        self.id = self.row.id

    def claim(self, limit: int = 1, queue: str = "default", front: ScanStart | None = None) -> list[Job]:
        with self.database.write() as connection:
            return claim.claim(self.database, connection, key(queue), limit, self.id, front)

    def wait_for(self, *queues: str) -> None:
        """Say that this node waits for these."""
        with self.database.write() as connection:
            nodes.wait_for(connection, self.id, list(queues))

    def claim_told(self, job: Job, queue: str = "default") -> list[Job]:
        """The job that this node was called for, by the number of its row."""
        with self.database.once() as connection:
            return claim.claim_told(self.database, connection, key(queue), job.seq, self.id, claim.Waiting([queue], 1))

    def claim_one(self, queue: str = "default") -> Job:
        (job,) = self.claim(1, queue)
        return job

    def start(self, *jobs: Job, acked: bool = False) -> int:
        with self.database.write() as connection:
            return finish.started(self.database, connection, [job.hold for job in jobs], acked)

    def complete(self, *jobs: Job) -> int:
        with self.database.write() as connection:
            return finish.completed(self.database, connection, [job.hold for job in jobs])

    def complete_and_claim(self, *jobs: Job, limit: int = 1, queue: str = "default") -> tuple[int, list[Job]]:
        """Both in one statement, where the database can."""
        with self.database.once() as connection:
            holds = [job.hold for job in jobs]
            return claim.complete_and_claim(self.database, connection, holds, key(queue), limit, self.id)

    def end(self, job: Job, state: State, reason: str = "because", traceback: str | None = None) -> int:
        with self.database.write() as connection:
            return finish.ended(self.database, connection, job.hold, state, Cause.RAISED, reason, traceback)

    def give_back(self, *jobs: Job, crashed: bool = False, has_begun: bool = True) -> int:
        with self.database.write() as connection:
            return finish.given_back(self.database, connection, [job.hold for job in jobs], crashed, has_begun)

    def store(self, job: Job, state: State | None = State.COMPLETED, **fields: Any) -> bool:
        written = {"status": "SUCCESS", "result": "1", "traceback": None, "meta": None, **fields}
        return results.store(self.database, job.hold, state, **written)

    def publish_again(self, job: Job, **fields: Any) -> bool:
        """What ``self.retry`` does: the task publishes its own id."""
        return self.publish_as(job, new_job(job.id, **fields))

    def publish_as(self, job: Job, again: Job) -> bool:
        """The same, with what it publishes."""
        return insert.insert(self.database, again, hold=job.hold)

    def note_retry(self, job: Job, reason: str) -> None:
        """And what it then notes of its failure."""
        results.store_retry(self.database, job.hold, result="{}", traceback="Traceback", meta="{}", reason=reason)

    def take(self, limit: int = 10, queue: str = "queue", keep: bool = True) -> list[Message]:
        with self.database.write() as connection:
            return messages.take(self.database, connection, key(queue), limit, self.id, keep)

    def die(self) -> int | None:
        """Somebody finds it dead."""
        return nodes.remove(self.database, self.id)


def without(job: Job, *names: str) -> Job:
    """A copy in which these fields are empty, for comparisons that leave them out."""
    return replace(job, **dict.fromkeys(names))
