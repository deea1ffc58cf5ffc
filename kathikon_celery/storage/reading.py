"""Reading jobs, without changing them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, bindparam, func, select

from kathikon_celery.job import Job, State
from kathikon_celery.storage.names import key
from kathikon_celery.storage.tables import jobs

_BY_ID = select(jobs).where(jobs.c.id == bindparam("job_id"))
_LOCKED = _BY_ID.with_for_update()
_COUNTS = select(jobs.c.queue, jobs.c.state, func.count()).group_by(jobs.c.queue, jobs.c.state)


def job_of(row: Any) -> Job:
    """The job that *row* describes; columns that it lacks keep their defaults."""
    values = dict(row._mapping)
    values["state"] = State(values["state"])
    if "errors" in values:
        values["errors"] = json.loads(values["errors"]) if values["errors"] else []
    if values["id"].startswith("#"):  # a digest stands for it: see names.py
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            values["id"] = json.loads(values["envelope"])["headers"]["id"]
    return Job(**values)


def fetch(connection: Connection, job_id: str, lock: bool = False) -> Job | None:
    """The job of that id, or `None`. *lock*: nobody else changes it until the transaction ends."""
    row = connection.execute(_LOCKED if lock else _BY_ID, {"job_id": key(job_id)}).first()
    if row is None:
        return None
    job = job_of(row)
    if key(job_id) != job_id:
        job.id = job_id
    return job


def select_all(connection: Connection, queue: str | None = None, state: State | None = None) -> list[Job]:
    """All jobs, oldest first, of one *queue* or *state* where given."""
    query = select(jobs).order_by(jobs.c.seq)
    if queue is not None:
        query = query.where(jobs.c.queue == key(queue))
    if state is not None:
        query = query.where(jobs.c.state == state.value)
    return [job_of(row) for row in connection.execute(query)]


def counts(connection: Connection) -> dict[tuple[str, str], int]:
    """Number of jobs by queue and state."""
    return {(queue or "", state): number for queue, state, number in connection.execute(_COUNTS)}
