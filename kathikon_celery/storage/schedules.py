"""Schedules as rows: which are due, what they were last, and the change of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, or_, select, update
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.storage.clock import now, seconds, seconds_until
from kathikon_celery.storage.column_types import rows_of
from kathikon_celery.storage.names import key, label, name_of
from kathikon_celery.storage.tables import schedules

#: Seconds for which a missed tick is still sent.
GRACE = 3600.0


@dataclass(kw_only=True)
class Schedule:
    """When a task is sent again and again. Times are aware datetimes.

    >>> schedule = kathikon.schedules.get("report")
    >>> schedule.task, schedule.zone, schedule.runs
    ('proj.report', 'Europe/Berlin', 41)

    Arguments:
        name: the schedule's name.
        task: the task's name.
        timing: when, as `kathikon_celery.schedules.timetable` writes it.
        zone: the time zone of crontabs.
        args: of the task, as JSON.
        kwargs: of the task, as JSON.
        options: of ``apply_async``, as JSON.
        missed: what is sent of ticks that were missed: "once" (one job for all of them), "skip" or "all".
        grace: seconds for which a missed tick is still sent.
        overlap: what happens at a tick whose job before has not ended: "allow", "skip", "queue" or "cancel".
        jitter: seconds; each tick is sent up to so much later.
        starts_at: no tick before; `None`: from now on.
        ends_at: no tick after; `None`: without an end.
        max_runs: how many ticks are sent in all.
        source: who has made the entry: "code" (``beat_schedule``), "table" (an operator, a program), or "django"
            (django-celery-beat's tables, which are followed).
        paused: no ticks are sent.
        runs: how many ticks were sent.
        next_at: when a worker acts next; `None`: never.
        tick_at: the moment of the timetable for that; `None`: the worker that acts computes it.
        last_tick: the last tick.
        last_sent: when it was sent.
        last_job: the id of its job.
        skipped: how many ticks were not sent.
        problem: why the last attempt to send failed.
        digest: of the code's entry as it was when the row was written.
        past: earlier digests, as JSON.
        is_changed: an operator has changed an entry of the code.
        followed: the digest of the schedule in another scheduler's tables that the row follows; `None`: none.
    """

    name: str
    task: str
    timing: str
    zone: str = "UTC"
    args: str = "[]"
    kwargs: str = "{}"
    options: str = "{}"
    missed: str = "once"
    grace: float = GRACE
    overlap: str = "allow"
    jitter: float = 0.0
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    max_runs: int | None = None
    source: str = "table"
    paused: bool = False
    runs: int = 0
    next_at: datetime | None = None
    tick_at: datetime | None = None
    last_tick: datetime | None = None
    last_sent: datetime | None = None
    last_job: str | None = None
    skipped: int = 0
    problem: str | None = None
    digest: str | None = None
    past: str = "[]"
    is_changed: bool = False
    followed: str | None = None


_FIELDS = [one.name for one in fields(Schedule) if one.name != "name"]


def _of(row: Any) -> Schedule:
    return Schedule(name=name_of(row.label), **{name: getattr(row, name) for name in _FIELDS})


def _is_ours() -> ColumnElement[bool]:
    """The condition that this process may send a row's ticks: any may, but for those of other code."""
    names = rows_of("own_schedules")
    return or_(schedules.c.source != "code", schedules.c.name.in_(select(names.c.value)))


#: Seconds until a worker has to act, for the schedules of `of_own`.
NEXT_TICK = (
    select(seconds_until(schedules.c.next_at))
    .where(schedules.c.next_at.is_not(None), _is_ours())
    .order_by(schedules.c.next_at)
    .limit(1)
)
_LATER_TICK = NEXT_TICK.where(schedules.c.next_at > now())
_DUE = (
    select(schedules)
    .where(schedules.c.next_at <= now(), _is_ours())
    .order_by(schedules.c.next_at)
    .limit(bindparam("at_most"))
    .with_for_update(skip_locked=True)
)


def of_own(names: Iterable[str]) -> dict[str, Any]:
    """Return the parameters of `NEXT_TICK`: *names* of the entries of this process's code."""
    return {"own_schedules": [key(name) for name in names]}


def next_tick(connection: Connection, names: Iterable[str], later: bool = False) -> float | None:
    """Return the seconds until the next tick (negative: overdue), or `None`. *later*: of those that are not due yet."""
    found = connection.execute(_LATER_TICK if later else NEXT_TICK, of_own(names)).first()
    return None if found is None else float(found[0])


def due(connection: Connection, names: Iterable[str], limit: int) -> list[Schedule]:
    """Return up to *limit* schedules with a tick to send, without those that others have locked; lock their rows."""
    return [_of(row) for row in connection.execute(_DUE, {**of_own(names), "at_most": limit})]


_OVERDUE = (
    select(schedules.c.label, -seconds_until(schedules.c.next_at), schedules.c.problem)
    .where(schedules.c.next_at < now(seconds("minus_age")))
    .order_by(schedules.c.next_at)
    .limit(20)
)


def overdue(connection: Connection, age: float) -> list[tuple[str, float, str | None]]:
    """Return up to 20 schedules whose tick is late by more than *age* seconds: name, by how many, and its problem."""
    return [(name_of(row[0]), row[1], row[2]) for row in connection.execute(_OVERDUE, {"minus_age": -age})]


def every(connection: Connection) -> list[Schedule]:
    """Return all schedules by name."""
    return [_of(row) for row in connection.execute(select(schedules).order_by(schedules.c.name))]


def fetch(connection: Connection, name: str, lock: bool = False) -> Schedule | None:
    """Return the schedule, or `None`. *lock*: lock its row until the transaction ends."""
    query = select(schedules).where(schedules.c.name == key(name))
    row = connection.execute(query.with_for_update() if lock else query).first()
    return None if row is None else _of(row)


def add(connection: Connection, schedule: Schedule) -> None:
    """Insert a row."""
    values = {name: getattr(schedule, name) for name in _FIELDS}
    connection.execute(insert(schedules).values(name=key(schedule.name), label=label(schedule.name), **values))


def change(connection: Connection, name: str, values: Mapping[str, Any]) -> None:
    """Write *values* by column."""
    connection.execute(update(schedules).where(schedules.c.name == key(name)).values(**values))


def remove(connection: Connection, name: str) -> int:
    """Delete the row; return how many there were."""
    return connection.execute(delete(schedules).where(schedules.c.name == key(name))).rowcount
