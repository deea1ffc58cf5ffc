"""Timetables: when a schedule's ticks are, from Celery's schedule objects and as text in a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from celery.schedules import BaseSchedule, crontab, maybe_schedule, schedule, solar

from kathikon_celery.schedules.wall_clock import Fields
from kathikon_celery.schedules.wall_clock import following as by_wall_clock

#: Returns the first tick after a moment; `None`: there is none.
Following = Callable[[datetime], datetime | None]
#: What a custom schedule class is called in a row: only workers whose code has the entry can compute its ticks.
CODE = "code"
ALLOWED = "seconds, a timedelta, a datetime, crontab(…), solar(…), and other schedule classes"
#: The shortest and the longest time between two ticks, in seconds.
SHORTEST, LONGEST = 0.1, 1e9
#: The fields of a crontab, in the order of a crontab's line.
FIELDS = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")


def of(thing: Any, zone: tzinfo) -> tuple[str, Following]:
    """Return the text of a schedule for its row, and the function of its ticks.

    Arguments:
        thing: as in ``beat_schedule``: seconds, a timedelta, or one of Celery's schedule objects. An aware datetime has
            one tick.
        zone: the time zone of crontabs.
    """
    if isinstance(thing, datetime):
        if thing.tzinfo is None:
            raise ValueError(f"the moment {thing} has no time zone; use an aware datetime")
        return json.dumps({"at": thing.isoformat()}), _at(thing)
    if isinstance(thing, bool):
        raise TypeError(f"{thing!r} is no schedule; allowed are {ALLOWED}")
    if isinstance(thing, int | float):
        _check_period(thing)
    one: Any = maybe_schedule(thing) if isinstance(thing, int | float | timedelta | BaseSchedule) else None
    if type(one) is crontab:
        return json.dumps({"crontab": _words(one)}), _crontab(one, zone)
    if type(one) is schedule:
        every = one.run_every.total_seconds()
        return json.dumps({"every": every, "relative": bool(one.relative)}), _every(every, bool(one.relative), zone)
    if type(one) is solar:
        where = {"event": one.event, "lat": one.lat, "lon": one.lon}
        return json.dumps({"solar": where}), _of_code(one)
    if isinstance(one, BaseSchedule):
        return CODE, _of_code(one)
    raise TypeError(f"{thing!r} is no schedule; allowed are {ALLOWED}")


def read(text: str, zone: tzinfo) -> Following | None:
    """Return the function of the ticks of a row's schedule; `None` for one that only its code can compute.

    Raises `ValueError` for a text that is no schedule.
    """
    if text == CODE:
        return None
    try:
        spec = json.loads(text)
        ((kind, given),) = [(name, spec[name]) for name in ("crontab", "every", "solar", "at") if name in spec]
        if kind == "every":
            return _every(float(given), bool(spec.get("relative")), zone)
        if kind == "at":
            return _at(datetime.fromisoformat(given))
        return _crontab(crontab(**given), zone) if kind == "crontab" else _of_code(solar(**given))
    except Exception as error:
        raise ValueError(f"{text!r} is no schedule: {error}") from error


def _at(moment: datetime) -> Following:
    return lambda after: moment if moment > after else None


def in_words(text: str, zone: str) -> str:
    """Return the schedule with this text in words, for people."""
    try:
        spec = json.loads(text)
    except ValueError:
        return text
    if "every" in spec:
        seconds = float(spec["every"])
        units = (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60))
        size, unit = next(((size, unit) for unit, size in units if seconds % size == 0), (1, "s"))
        return f"every {seconds / size:g} {unit}"
    if "crontab" in spec:
        return f"{' '.join(spec['crontab'].get(name, '*') for name in FIELDS)} {zone}"
    return f"at {spec['at']}" if "at" in spec else f"solar {spec['solar']['event']}"


def crontab_of(line: str) -> crontab:
    """Return Celery's crontab for the five fields of a crontab's line. Raises `ValueError`."""
    fields = line.split()
    if len(fields) != len(FIELDS):
        raise ValueError(f"{line!r} has {len(fields)} fields; a crontab has five: minute hour day month weekday")
    try:
        return crontab(**dict(zip(FIELDS, fields, strict=True)))
    except Exception as error:
        raise ValueError(f"{line!r} is no crontab: {error}") from error


def is_moment(text: str) -> bool:
    """Whether the schedule with this text has one tick only, at a moment."""
    return text != CODE and "at" in json.loads(text)


def _words(one: crontab) -> dict[str, str]:
    return {name: str(getattr(one, f"_orig_{name}")) for name in FIELDS}


def _crontab(one: crontab, zone: tzinfo) -> Following:
    fields = Fields(
        tuple(sorted(one.minute)),
        tuple(sorted(one.hour)),
        frozenset(one.day_of_week),
        frozenset(one.day_of_month),
        frozenset(one.month_of_year),
    )
    return lambda after: by_wall_clock(fields, zone, after)


def _check_period(seconds: float) -> None:
    if not SHORTEST <= seconds <= LONGEST:  # nor NaN
        raise ValueError(f"a schedule each {seconds:g} seconds; it must be from {SHORTEST:g} to {LONGEST:g}")


def _every(seconds: float, is_relative: bool, zone: tzinfo) -> Following:
    _check_period(seconds)

    def following(after: datetime) -> datetime | None:
        try:
            tick = after + timedelta(seconds=seconds)
        except OverflowError:
            return None
        return _rounded(tick, timedelta(seconds=seconds), zone) if is_relative else tick

    return following


def in_step(text: str, tick: datetime, since: datetime) -> datetime:
    """Return the last moment up to *since* from which on the ticks are in step with *tick*, one of the timetable."""
    spec = {} if text == CODE else json.loads(text)
    if "every" not in spec or spec.get("relative"):
        return since
    every = timedelta(seconds=float(spec["every"]))
    return tick + ((since - tick) // every) * every


def _rounded(tick: datetime, every: timedelta, zone: tzinfo) -> datetime:
    """Return *tick* rounded down to a whole day, hour or minute of *zone*, as Celery's ``relative=True`` does."""
    local = tick.astimezone(zone)
    if every.days > 0:
        local = local.replace(hour=0, minute=0, second=0, microsecond=0)
    elif every.total_seconds() >= 3600:
        local = local.replace(minute=0, second=0, microsecond=0)
    elif every.total_seconds() >= 60:
        local = local.replace(second=0, microsecond=0)
    else:
        local = local.replace(microsecond=0)
    return local.astimezone(timezone.utc)


def _of_code(one: Any) -> Following:
    """Return the ticks of a schedule of any class, by Celery's own questions to it."""

    def following(after: datetime) -> datetime | None:
        before, one.nowfun = one.nowfun, lambda: after
        try:
            _, seconds = one.is_due(after)
        finally:
            one.nowfun = before
        if seconds is None:
            return None
        if not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST:
            raise ValueError(f"{type(one).__name__}.is_due() returned {seconds!r} as the seconds to the next tick")
        return after + timedelta(seconds=float(seconds))

    return following


def zone_of(name: str) -> tzinfo:
    """Return the time zone *name*, such as ``Europe/Berlin``. Raises `ValueError`."""
    try:
        return ZoneInfo(name)
    except Exception as error:
        raise ValueError(f"there is no time zone {name!r}; give a name such as 'Europe/Berlin'") from error
