"""Waiting for results: the rows of waits, the call when a job ends, and the query for many results at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from sqlalchemy import BigInteger, Connection, Integer, and_, bindparam, delete, literal_column, not_, or_, select

from kathikon_celery.job import TERMINAL, Job, State
from kathikon_celery.storage import reading
from kathikon_celery.storage.clock import now, seconds
from kathikon_celery.storage.dialects import Dialect
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


def tell(
    database: Database,
    connection: Connection,
    statement: Any,
    values: Any,
    ended: bool = True,
    fixed: bool = True,
) -> int:
    """Run *statement*, which changes jobs, and wake the processes that wait for them: see `Dialect.tell`."""
    return database.dialect.tell(connection, statement, values, ended, fixed)


def look(database: Database, keys: Sequence[str], ready: bool = True) -> list[Job]:
    """Return the ready jobs among *keys*, or all of them without *ready*. The id of each is its key."""
    found: list[Job] = []
    with database.read() as connection:
        for chunk in _chunks(keys):
            if len(chunk) == 1:
                found += _outcomes(connection, _READY_ONE if ready else _ONE, {"keys": chunk[0]}, chunk, ready)
            else:
                found += _outcomes(connection, _READY_ONES if ready else _ALL, {"keys": chunk}, chunk, ready)
    return found


@lru_cache(maxsize=8)
def _entering(dialect: Dialect, one: bool) -> Any:
    return dialect.entering(_READY_ONE if one else _READY_ONES)


def enter(database: Database, keys: Sequence[str], listener: int) -> list[Job]:
    """Have *listener* (random, 62 bits) called when one of the jobs ends; return the ready ones, as `look` does."""
    if not database.dialect.enters_waits:
        return look(database, keys)
    found: list[Job] = []
    with database.once() as connection:
        for chunk in _chunks(keys):
            one = len(chunk) == 1
            values = {"keys": chunk[0] if one else chunk, "names": chunk, "listener": listener}
            found += _outcomes(connection, _entering(database.dialect, one), values, chunk, True)
    return found


def _chunks(keys: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), CHUNK):
        yield list(keys[start : start + CHUNK])


def _executed(connection: Connection, query: Any, values: dict[str, Any]) -> Sequence[Any]:
    return connection.execute(query, values).all()


def told(outcome: str) -> Job:
    """Return the job in *outcome*, the JSON of a call. Its id is its key."""
    values = json.loads(outcome)
    if values["ended_at"] is not None:
        values["ended_at"] = datetime.fromtimestamp(values["ended_at"], timezone.utc)
    return Job(**{**values, "state": State(values["state"])})


def _outcome(row: Any) -> Job:
    values = dict(zip(_NAMES, row, strict=True))
    return Job(**{**values, "state": State(values["state"]), "cause": reading.cause_of(values["cause"])})


def _outcomes(
    connection: Connection, query: Any, values: dict[str, Any], keys: Sequence[str], ready: bool
) -> list[Job]:
    try:
        # A statement with a list is compiled each time.
        run = prepared.rows if len(keys) == 1 else _executed
        return [_outcome(row) for row in run(connection, query, values)]
    except (ValueError, TypeError, AttributeError):  # a corrupt row is among them
        found = [replace(job, id=name) for name in keys if (job := reading.fetch(connection, name)) is not None]
        return [job for job in found if not ready or is_ready(job)]


@lru_cache(maxsize=8)
def _leave(dialect: Dialect) -> Any:
    own: Any = waits.c.listener == bindparam("listener", type_=BigInteger())
    mine = select(waits.c.seq).where(waits.c.job.in_(bindparam("keys", expanding=True)), own)
    # Rows that another transaction deletes just now are skipped, without waiting for it.
    return delete(waits).where(dialect.picked(mine.limit(bindparam("at_most", type_=Integer())), waits))


def leave(database: Database, keys: Sequence[str], listener: int) -> None:
    """Undo `enter`."""
    if not database.dialect.enters_waits:
        return
    with database.once() as connection:
        for chunk in _chunks(keys):
            values = {"keys": chunk, "listener": listener, "at_most": CHUNK}
            connection.execute(_leave(database.dialect), values)


def prune(database: Database, age: float = LONGEST) -> int:
    """Delete the waits that are older than *age* seconds; return their number."""
    if not database.dialect.enters_waits:
        return 0
    with database.once() as connection:
        return connection.execute(_OLD, {"minus_age": -age}).rowcount
