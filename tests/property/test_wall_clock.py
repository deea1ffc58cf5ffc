"""Crontabs in all time zones: each wall-clock time fires once, whatever daylight saving does."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from hypothesis import given
from hypothesis import strategies as st

from kathikon_celery.schedules.wall_clock import Fields, following, instant

ZONES = sorted(available_timezones())
DAYS = frozenset(range(1, 32))
MONTHS = frozenset(range(1, 13))
WEEK = frozenset(range(7))
FIRST, LAST = datetime(2020, 1, 1, tzinfo=timezone.utc), datetime(2031, 1, 1, tzinfo=timezone.utc)


def shifts(name: str) -> list[tuple[datetime, timedelta | None, timedelta | None]]:
    """The days, within a day, on which the clock of a zone is put forward or back, and its offsets before and after."""
    zone, found, day = ZoneInfo(name), [], FIRST
    before = day.astimezone(zone).utcoffset()
    while day < LAST:
        day += timedelta(days=1)
        offset = day.astimezone(zone).utcoffset()
        if offset != before:
            found.append((day - timedelta(days=1), before, offset))
        before = offset
    return found


@cache
def distinct() -> dict[Any, str]:
    """One name for each set of shifts: many zones have the same."""
    return {tuple(shifts(name)): name for name in ZONES}


def ticks(fields: Fields, zone: ZoneInfo, since: datetime, until: datetime) -> list[datetime]:
    found, at = [], since
    while (tick := following(fields, zone, at)) is not None and tick <= until:
        found.append(tick)
        at = tick
    return found


def expected(fields: Fields, zone: ZoneInfo, since: datetime, until: datetime) -> list[datetime]:
    """The moment of each wall-clock time, once."""
    margin = timedelta(days=2)
    found = set()
    for wall in fields.walls((since - margin).replace(tzinfo=None)):
        if wall > (until + margin).replace(tzinfo=None):
            break
        at = instant(wall, zone)
        if since < at <= until:
            found.add(at)
    return sorted(found)


def test_every_zone_on_the_days_of_its_shifts() -> None:
    """Daily, hourly and weekly entries, from 2020 to 2030, around each day on which a clock is changed."""
    hourly = Fields((30,), tuple(range(24)), WEEK, DAYS, MONTHS)
    assert len(ZONES) > 400
    for found, name in distinct().items():
        zone = ZoneInfo(name)
        for day, *_ in found:
            since, until = day - timedelta(days=1), day + timedelta(days=2)
            weekly = Fields((15,), (2,), frozenset({(day + timedelta(days=1)).isoweekday() % 7}), DAYS, MONTHS)
            for fields in (hourly, weekly, *(Fields((30,), (hour,), WEEK, DAYS, MONTHS) for hour in (0, 1, 2, 3))):
                assert ticks(fields, zone, since, until) == expected(fields, zone, since, until), (name, day, fields)


@given(
    name=st.sampled_from(ZONES),
    days=st.floats(0, 3990),
    minutes=st.sets(st.integers(0, 59), min_size=1, max_size=4),
    hours=st.sets(st.integers(0, 23), min_size=1, max_size=6),
    week=st.sets(st.integers(0, 6), min_size=1),
)
def test_any_crontab_at_any_time(name: str, days: float, minutes: set[int], hours: set[int], week: set[int]) -> None:
    zone, since = ZoneInfo(name), FIRST + timedelta(days=days)
    fields = Fields(tuple(sorted(minutes)), tuple(sorted(hours)), frozenset(week), DAYS, MONTHS)
    until = since + timedelta(days=3)
    assert ticks(fields, zone, since, until) == expected(fields, zone, since, until)


def test_as_the_docs_say() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    daily = Fields((30,), (2,), WEEK, DAYS, MONTHS)
    autumn = following(daily, berlin, datetime(2026, 10, 24, 12, tzinfo=timezone.utc))
    assert autumn == datetime(2026, 10, 25, 0, 30, tzinfo=timezone.utc)
    assert following(daily, berlin, autumn) == datetime(2026, 10, 26, 1, 30, tzinfo=timezone.utc)
    spring = following(daily, berlin, datetime(2026, 3, 28, 12, tzinfo=timezone.utc))
    assert spring == datetime(2026, 3, 29, 1, 30, tzinfo=timezone.utc)
    assert following(daily, berlin, spring) == datetime(2026, 3, 30, 0, 30, tzinfo=timezone.utc)


def test_rare_days() -> None:
    leap = Fields((0,), (0,), WEEK, frozenset({29}), frozenset({2}))
    utc = ZoneInfo("UTC")
    assert following(leap, utc, datetime(2026, 1, 1, tzinfo=timezone.utc)) == datetime(2028, 2, 29, tzinfo=timezone.utc)
    never = Fields((0,), (0,), WEEK, frozenset({30}), frozenset({2}))
    assert following(never, utc, datetime(2026, 1, 1, tzinfo=timezone.utc)) is None
