"""Waiting for results: the rows of waits, the NOTIFY when a job ends, and the query for many results at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, literal_column, not_, or_, select

from kathikon_celery.job import TERMINAL, Job, State
from kathikon_celery.storage import reading
from kathikon_celery.storage.clock import now, seconds
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.tables import OUTCOME, jobs, state_in, waits

#: Keys in one query.
CHUNK = 1000
#: Seconds after which a wait's row may be deleted; a longer wait finds the result by its own queries.
LONGEST = 3600.0
#: Celery's states that mean that a result is ready.
READY_WORDS = frozenset({"SUCCESS", "FAILURE", "REVOKED"})

_NAMES = [column.name for column in OUTCOME]
_READY = and_(jobs.c.status.is_(None), state_in(TERMINAL))
_CORRUPT = not_(state_in(State))
_IS_READY_WORD = jobs.c.status.in_([literal_column(f"'{word}'") for word in sorted(READY_WORDS)])
_READY = or_(_IS_READY_WORD, _READY, _CORRUPT)
_ALL = select(*OUTCOME).where(jobs.c.id.in_(bindparam("keys", expanding=True)))
_READY_ONES = _ALL.where(_READY)
#: `_ALL` and `_READY_ONES` for one key.
_ONE = select(*OUTCOME).where(jobs.c.id == bindparam("keys"))
_READY_ONE = _ONE.where(_READY)
_OLD = delete(waits).where(waits.c.entered_at < now(seconds("minus_age")))


def is_ready(job: Job) -> bool:
    """Whether the job's result is there."""
    return job.status in READY_WORDS or (job.status is None and job.state in TERMINAL)


def look(database: Database, keys: Sequence[str], ready: bool = True) -> list[Job]:
    """Return the ready jobs among *keys*, or all of them without *ready*. The id of each is its key."""
    found: list[Job] = []
    with database.read() as connection:
        for chunk in _chunks(keys):
            found += _outcomes(connection, partial(_looked, connection, chunk, ready), chunk, ready)
    return found


def _looked(connection: Connection, keys: list[str], ready: bool) -> Sequence[Any]:
    if len(keys) == 1:
        return prepared.rows(connection, _READY_ONE if ready else _ONE, {"keys": keys[0]})
    return connection.execute(_READY_ONES if ready else _ALL, {"keys": keys}).all()  # compiled for each list


def enter(database: Database, keys: Sequence[str], listener: int) -> list[Job]:
    """Have *listener* (random, 62 bits) called when one of the jobs ends; return the ready ones, as `look` does."""
    if not database.dialect.enters_waits:
        return look(database, keys)
    found: list[Job] = []
    with database.once() as connection:
        for chunk in _chunks(keys):
            ready = _READY_ONE if len(chunk) == 1 else _READY_ONES
            enters = partial(database.dialect.enter_waits, connection, ready, chunk, listener)
            found += _outcomes(connection, enters, chunk, True)
    return found


def _chunks(keys: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), CHUNK):
        yield list(keys[start : start + CHUNK])


def told(outcome: str) -> Job:
    """Return the job in *outcome*, the JSON of a NOTIFY. Its id is its key."""
    values = json.loads(outcome)
    if values["ended_at"] is not None:
        values["ended_at"] = datetime.fromtimestamp(values["ended_at"], timezone.utc)
    return Job(**{**values, "state": State(values["state"])})


def _outcome(row: Any) -> Job:
    values = dict(zip(_NAMES, row, strict=True))
    return Job(**{**values, "state": State(values["state"]), "cause": reading.cause_of(values["cause"])})


def _outcomes(connection: Connection, asks: Callable[[], Sequence[Any]], keys: Sequence[str], ready: bool) -> list[Job]:
    try:
        return [_outcome(row) for row in asks()]
    except (ValueError, TypeError, AttributeError):  # a corrupt row is among them
        found = [replace(job, id=name) for name in keys if (job := reading.fetch(connection, name)) is not None]
        return [job for job in found if not ready or is_ready(job)]


def leave(database: Database, keys: Sequence[str], listener: int) -> None:
    """Undo `enter`."""
    if not database.dialect.enters_waits:
        return
    with database.once() as connection:
        for chunk in _chunks(keys):
            database.dialect.leave_waits(connection, chunk, listener)


def prune(database: Database, age: float = LONGEST) -> int:
    """Delete the waits that are older than *age* seconds; return their number."""
    if not database.dialect.enters_waits:
        return 0
    with database.once() as connection:
        return connection.execute(_OLD, {"minus_age": -age}).rowcount
