"""Pruning: deletes jobs that ended long ago, expired messages and old groups, in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    ScalarSelect,
    Select,
    bindparam,
    delete,
    func,
    literal_column,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.types import NullType

from kathikon_celery.job import TERMINAL, State
from kathikon_celery.storage import acts
from kathikon_celery.storage.clock import Instant, now, seconds
from kathikon_celery.storage.dialects.parameters import Pick
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.tables import (
    BLOCKED,
    DUE,
    ENDED,
    EXPIRING,
    EXPIRING_BLOCKED,
    FREE,
    chords,
    groups,
    jobs,
    messages,
    ready_in,
    waits,
)

#: Rows of one DELETE.
CHUNK = 500
#: Age in seconds that no row reaches: the retention of rows that are kept for ever.
CENTURIES = 1e10


def _old(column: Column[Any], state: State) -> Select[Any]:
    of_state = jobs.c.state == literal_column(f"'{state.value}'")
    long_ago = jobs.c.ended_at < now(seconds("minus_age"))
    return (
        select(column)
        .where(ENDED, of_state, long_ago)
        .order_by(jobs.c.ended_at)
        .limit(bindparam("at_most", type_=Integer()))
    )


_PRUNABLE = {state: _old(jobs.c.id, state) for state in State}


#: When a job ended, as the driver returns it, without conversion.
_ENDED_AT = (type_coerce(jobs.c.ended_at, NullType()),)
_WITH_ID = (*_ENDED_AT, jobs.c.id)


@lru_cache(maxsize=64)
def _pick(state: State, from_front: bool) -> Pick:
    old = _old(jobs.c.seq, state)
    if from_front:
        old = old.where(jobs.c.ended_at >= bindparam("front", type_=Instant()))
    return Pick(jobs, (old,), "kathikon_jobs_ended")


_CLOCK = select(now())


def clock(connection: Connection) -> float:
    """Return the database's clock, in epoch seconds."""
    at: datetime = connection.execute(_CLOCK).scalar_one()
    return at.timestamp()


def prunable(connection: Connection, retention: Mapping[State, float | None], limit: int = CHUNK) -> list[str]:
    """Return keys of up to *limit* jobs that ended longer ago than *retention* (seconds by state; `None`: for ever)."""
    found: list[str] = []
    for state, age in retention.items():
        if age is not None and len(found) < limit:
            values = {"minus_age": -age, "at_most": limit - len(found)}
            found += connection.execute(_PRUNABLE[state], values).scalars()
    return found


def prune(
    database: Database,
    retention: Mapping[State, float | None],
    limit: int = CHUNK,
    fronts: dict[State, datetime] | None = None,
) -> int:
    """Delete the jobs that `prunable` returns, unless they were published again meanwhile; return their number.

    Arguments:
        fronts: state -> latest end among the jobs that earlier calls have deleted; this call updates it. If the dialect
            ``keeps_old_rows``, the search begins there, and at the oldest entry only if that finds too few jobs.
    """
    if not database.dialect.keeps_old_rows:
        fronts = None
    with database.read() as connection:
        has_history = acts.is_any(connection)
    pruned = 0
    for state, age in retention.items():
        while age is not None and pruned < limit:
            front = fronts.pop(state, None) if fronts is not None else None
            values = {"minus_age": -age, "at_most": limit - pruned, **({"front": front} if front else {})}
            pick, columns = _pick(state, front is not None), _WITH_ID if has_history else _ENDED_AT
            with database.write() if has_history else database.once() as connection:
                taken = database.dialect.pick_and_delete(connection, pick, columns, values)
                if has_history and taken.rows:
                    acts.forget(connection, [job for _, job in taken.rows])
            pruned += taken.number
            if pruned < limit and front is None:
                break
            if pruned >= limit and fronts is not None:
                fronts[state] = max(row[0] for row in taken.rows)
    return pruned


_DELETE = delete(jobs).where(jobs.c.id.in_(bindparam("keys", expanding=True)))
_FROM = bindparam("from_queue", type_=jobs.c.queue.type)
_WAITS: list[tuple[Any, ...]] = [
    (ready_in(_FROM),),
    (jobs.c.queue == _FROM, DUE),
    (jobs.c.queue == _FROM, BLOCKED),
]
_OLD_GROUPS = delete(groups).where(groups.c.inserted_at < now(seconds("minus_age")))


def _first(column: Column[Any], *conditions: Any) -> ScalarSelect[Any]:
    # A minimum is found at the end of an index, whether or not the planner has statistics.
    return select(func.min(column)).where(*conditions).scalar_subquery()


def _is_old(name: str, column: Column[Any], *conditions: Any) -> ColumnElement[bool]:
    return _first(column, *conditions) < now(seconds(f"minus_age_{name}"))


#: Whether the pruner may have something to do. The parameters are those of `ages`.
IS_ANYTHING_OLD = or_(
    *(
        _is_old(state.value, jobs.c.ended_at, ENDED, jobs.c.state == literal_column(f"'{state.value}'"))
        for state in sorted(TERMINAL)
    ),
    _first(jobs.c.expires_at, EXPIRING) <= now(),
    _first(jobs.c.expires_at, EXPIRING_BLOCKED) <= now(),
    _first(messages.c.expires_at) <= now(),
    _is_old("group", groups.c.inserted_at),
    _is_old("chord", chords.c.inserted_at),
    _is_old("wait", waits.c.entered_at),
)


def ages(retention: Mapping[str, float | None], **others: float | None) -> dict[str, float]:
    """Return the parameters of `IS_ANYTHING_OLD`.

    Arguments:
        retention: seconds by state; `None`: for ever.
        others: seconds for ``group``, ``chord`` and ``wait``; `None`: for ever.
    """
    every = {**retention, **others}
    return {f"minus_age_{name}": -(CENTURIES if age is None else age) for name, age in every.items()}


def delete_keys(database: Database, keys: Sequence[str]) -> int:
    """Delete the jobs with these *keys*, in any state; return their number."""
    if not keys:
        return 0
    with database.write() as connection:
        return delete_rows(connection, keys)


def delete_rows(connection: Connection, keys: Sequence[str]) -> int:
    """Delete the jobs with these *keys*, with their history, as a part of a transaction; return their number."""
    acts.forget(connection, keys)
    return connection.execute(_DELETE, {"keys": list(keys)}).rowcount


def purge(connection: Connection, queue: str) -> int:
    """Delete the jobs of *queue* (a key) that are ready, blocked, scheduled or retryable; return their number."""
    if acts.is_any(connection):
        for waits in _WAITS:
            acts.forget_of(connection, select(jobs.c.id).where(*waits), {"from_queue": queue})
    return sum(connection.execute(delete(jobs).where(*waits), {"from_queue": queue}).rowcount for waits in _WAITS)


_EXPIRED_MESSAGES = select(messages.c.seq).where(messages.c.expires_at <= now(), FREE).limit(CHUNK)
_PICK_EXPIRED_MESSAGES = Pick(messages, (_EXPIRED_MESSAGES,), "kathikon_messages_expires")


def expired_messages(database: Database) -> int:
    """Delete up to `CHUNK` messages whose time to live is over and that no node holds; return their number."""
    with database.once() as connection:
        return database.dialect.pick_and_delete(connection, _PICK_EXPIRED_MESSAGES, (), {}).number


def old_groups(database: Database, age: float) -> int:
    """Delete the saved groups older than *age* seconds; return their number."""
    with database.once() as connection:
        return connection.execute(_OLD_GROUPS, {"minus_age": -age}).rowcount
