"""Crontabs by the wall clock of a time zone: each wall-clock time fires once, whatever daylight saving does.

A time that exists twice fires the first time. A time that does not exist fires as much later as the clock was put
forward: 02:30 becomes 03:30. If another tick of the same crontab falls on that moment, the two are one.

Examples, in Europe/Berlin: on 2026-10-25 02:30 exists twice, and fires at 00:30 UTC. On 2026-03-29 02:30 does not
exist, and fires at 03:30, 01:30 UTC.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone, tzinfo

#: No clock is put forward or back by more than this.
LONGEST_SHIFT = timedelta(hours=25)
#: How many years ahead a day is searched: February 29th comes after at most eight.
YEARS = 9


@dataclass(frozen=True)
class Fields:
    """The sets of a crontab; a day of the week is counted from Sunday, 0, as Celery does."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days_of_week: frozenset[int]
    days_of_month: frozenset[int]
    months: frozenset[int]

    def walls(self, since: datetime) -> Iterator[datetime]:
        """Yield the wall-clock times, naive, from *since* on, ascending; they end after `YEARS`."""
        day, last = since.date(), since.year + YEARS
        while day.year <= last:
            if self._has(day):
                for hour in self.hours:
                    for minute in self.minutes:
                        wall = datetime.combine(day, time(hour, minute))
                        if wall >= since:
                            yield wall
            try:
                day = day + timedelta(days=1) if day.month in self.months else _next_month(day)
            except (OverflowError, ValueError):
                return

    def _has(self, day: date) -> bool:
        is_month, is_day = day.month in self.months, day.day in self.days_of_month
        return is_month and is_day and day.isoweekday() % 7 in self.days_of_week


def _next_month(day: date) -> date:
    return date(day.year + day.month // 12, day.month % 12 + 1, 1)


def instant(wall: datetime, zone: tzinfo) -> datetime:
    """Return the moment, in UTC, at which the clock of *zone* shows *wall* for the first time, or would show it."""
    return wall.replace(tzinfo=zone, fold=0).astimezone(timezone.utc)


def following(fields: Fields, zone: tzinfo, after: datetime) -> datetime | None:
    """Return the first tick after the moment *after*, in UTC; `None`: there is none within `YEARS`."""
    wall = after.astimezone(zone).replace(tzinfo=None)
    if not _shifts(zone, after - LONGEST_SHIFT, after + LONGEST_SHIFT):
        first = next(fields.walls(wall.replace(second=0, microsecond=0)), None)
        while first is not None and instant(first, zone) <= after:
            first = next(fields.walls(first + timedelta(minutes=1)), None)
        if first is None:
            return None
        # If the clock is put forward or back there, another tick may come first.
        found = instant(first, zone)
        if not _shifts(zone, found - LONGEST_SHIFT, found + LONGEST_SHIFT):
            return found
    best: datetime | None = None
    for one in fields.walls(wall - LONGEST_SHIFT):
        at = instant(one, zone)
        if at > after and (best is None or at < best):
            best = at
        if best is not None and at > best + LONGEST_SHIFT:
            break
    return best


def _shifts(zone: tzinfo, since: datetime, until: datetime) -> bool:
    """Whether the clock of *zone* is put forward or back between two moments."""
    offset = since.astimezone(zone).utcoffset()
    while since < until:
        since = min(since + timedelta(hours=12), until)
        if since.astimezone(zone).utcoffset() != offset:
            return True
    return False
