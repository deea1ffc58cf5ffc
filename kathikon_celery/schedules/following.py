"""Schedules that are kept in other tables, and followed: their rows are made to say the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from kathikon_celery.schedules import ticking, timetable
from kathikon_celery.schedules.entries import DEFINED
from kathikon_celery.storage import schedules
from kathikon_celery.storage.schedules import Schedule


@dataclass
class Kept:
    """A schedule as it is kept elsewhere.

    Arguments:
        row: as it should be here; `Schedule.followed` is the digest of all that is followed.
        since: until then, ticks were sent by another scheduler; `None`: none was.
    """

    row: Schedule
    since: datetime | None = None


def follow(connection: Connection, kept: Iterable[Kept], source: str, now: datetime) -> None:
    """Make the rows of *source* say what is *kept*; the caller has taken its turn.

    Of an entry of the code that is kept as well, only whether it is paused is followed.
    """
    known = {row.name: row for row in schedules.every(connection)}
    for one in kept:
        row, old = one.row, known.pop(one.row.name, None)
        if old is None:
            row.source = source
            begin(row, one.since, now)
            schedules.add(connection, row)
        elif old.source == source and old.followed != row.followed:
            values: dict[str, Any] = {name: getattr(row, name) for name in (*DEFINED, "paused", "followed")}
            is_moved = (old.timing, old.zone, old.starts_at) != (row.timing, row.zone, row.starts_at)
            if row.paused or old.paused or is_moved:
                begin(row, one.since if timetable.is_moment(row.timing) else None, now)
                values |= {"tick_at": row.tick_at, "next_at": row.next_at, "problem": None}
                values |= {"runs": 0} if row.max_runs else {}
            schedules.change(connection, row.name, values)
        elif old.source == "code" and old.followed != row.followed:
            values = {"followed": row.followed}
            if old.paused != row.paused:
                # A worker with that code computes the first tick.
                values |= {"paused": row.paused, "tick_at": None, "next_at": None if row.paused else now}
            schedules.change(connection, row.name, values)
    for name, old in known.items():
        if old.source == source:
            schedules.remove(connection, name)


def begin(row: Schedule, since: datetime | None, now: datetime) -> None:
    """Set the first tick of a row whose timetable is not of the code; *since*: see `Kept`."""
    following = timetable.read(row.timing, timetable.zone_of(row.zone))
    assert following is not None
    row.last_tick = since or row.last_tick
    oldest = now - timedelta(seconds=row.grace)
    if since is not None and since < oldest:  # what was missed before would not be sent
        since = timetable.in_step(row.timing, since, oldest)
    row.tick_at = None if row.paused else ticking.first(row, following, now, since)
    row.next_at = ticking.with_jitter(row, row.tick_at)
