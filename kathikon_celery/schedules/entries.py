"""The entries of ``beat_schedule``: as rows, and what their code alone knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone, tzinfo
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from celery.schedules import crontab, maybe_schedule
from kombu.utils import json as kombu_json

from kathikon_celery.schedules import ticking, timetable
from kathikon_celery.schedules.timetable import Following
from kathikon_celery.storage import schedules
from kathikon_celery.storage.schedules import Schedule

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Connection

#: Keys of an entry that are Kathikon's: columns of the row.
POLICIES = ("missed", "grace", "overlap", "jitter", "max_runs", "starts_at", "ends_at")
#: The entry that Celery's beat adds for result backends that do not delete by themselves.
CLEANUP = "celery.backend_cleanup"
#: Keys of an entry, as Celery's beat takes them.
KEYS = ("task", "schedule", "args", "kwargs", "options", "relative")
#: Characters of a name at most.
LONGEST_NAME = 500
#: Seconds of a policy, and runs, at most.
LONGEST, LARGEST = 1e9, 2**31 - 1
#: How many digests of earlier definitions a row remembers.
MOST_PAST = 50


@dataclass
class Entry:
    """An entry of the code: its row as the code would have it, and what cannot be in a row."""

    row: Schedule
    following: Following
    args: Any
    kwargs: Any
    options: dict[str, Any]


def of(app: Celery, bad: dict[str, str] | None = None) -> dict[str, Entry]:
    """Return the entries of the app's code by name, with those that Celery's beat adds.

    *bad*: gets the names of entries that cannot be used, and why; without it, the first one raises `ValueError`.
    """
    given: dict[str, Any] = {}
    if app.conf.result_expires and not app.backend.supports_autoexpire:
        cleanup = {"task": "celery.backend_cleanup", "schedule": crontab("0", "4", "*"), "options": {"expires": 43200}}
        given[CLEANUP] = cleanup
    given |= app.conf.beat_schedule or {}
    found = {}
    for name, one in given.items():
        try:
            entry = entry_of(str(name), one, app.timezone)
            entry.following(datetime.now(timezone.utc))  # of a class of the application's: whether it works
        except Exception as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error) or repr(error)
            if bad is None:
                raise ValueError(f"beat_schedule[{name!r}] cannot be used: {why}") from error
            bad[str(name)] = why
        else:
            found[str(name)] = entry
    return found


def entry_of(name: str, given: Mapping[str, Any], zone: tzinfo) -> Entry:
    """Return an entry as ``beat_schedule`` has them; *zone*: of its crontab, unless the entry says another."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{given!r} is no mapping with a task and a schedule")
    if unknown := [str(one) for one in given if one not in KEYS]:
        raise ValueError(f"it has {', '.join(unknown)}; allowed are {', '.join(KEYS)}")
    options = {**(given.get("options") or {})}
    zone_name = options.pop("kathikon_zone", None) or str(zone)
    if zone_name != str(zone):
        zone = timetable.zone_of(zone_name)
    schedule = maybe_schedule(given["schedule"], relative=True) if given.get("relative") else given["schedule"]
    text, following = timetable.of(schedule, zone)
    policies = {key: options.pop(f"kathikon_{key}") for key in POLICIES if f"kathikon_{key}" in options}
    if unknown := [str(one) for one in options if str(one).startswith("kathikon_")]:
        allowed = ", ".join(f"kathikon_{key}" for key in ("zone", *POLICIES))
        raise ValueError(f"options have {', '.join(unknown)}; allowed are {allowed}")
    args, kwargs = given.get("args") or (), given.get("kwargs") or {}
    row = Schedule(
        name=name,
        task=str(given["task"]),
        timing=text,
        zone=zone_name,
        args=_text(args),
        kwargs=_text(kwargs),
        options=_text(options),
        source="code",
        **policies,
    )
    check(row)
    row.digest = digest(row)
    return Entry(row, following, args, kwargs, options)


def check(row: Schedule) -> None:
    """Raise `ValueError` for a value that is not allowed."""
    for name, allowed in (("missed", ticking.MISSED), ("overlap", ticking.OVERLAP)):
        if getattr(row, name) not in allowed:
            raise ValueError(f"{name} = {getattr(row, name)!r}; allowed are {', '.join(allowed)}")
    for name in ("name", "task"):
        value = getattr(row, name)
        if not (isinstance(value, str) and value.strip() and value.isprintable() and len(value) <= LONGEST_NAME):
            raise ValueError(f"{name} = {value!r:.100} is no name of 1 to {LONGEST_NAME} printable characters")
    for name in ("grace", "jitter"):
        value = getattr(row, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LONGEST:
            raise ValueError(f"{name} = {value!r} is no number of seconds from 0 to {LONGEST:g}")
    runs = row.max_runs
    if runs is not None and (isinstance(runs, bool) or not isinstance(runs, int) or not 0 < runs <= LARGEST):
        raise ValueError(f"max_runs = {runs!r} is no whole number from 1 to {LARGEST}")
    for name in ("starts_at", "ends_at"):
        moment = getattr(row, name)
        if moment is not None and not (isinstance(moment, datetime) and moment.tzinfo):
            raise ValueError(f"{name} = {moment!r} is no aware datetime")
        if moment is not None and not 1970 <= moment.year <= 9000:
            raise ValueError(f"{name} = {moment} is not between the years 1970 and 9000")
    if row.starts_at is not None and row.ends_at is not None and row.starts_at > row.ends_at:
        raise ValueError(f"starts_at = {row.starts_at} is after ends_at = {row.ends_at}")


def _text(value: Any) -> str:
    """Return *value* as JSON, as far as it can be: what only the code can say is said by the code."""
    try:
        return str(kombu_json.dumps(value))
    except Exception:
        return json.dumps(repr(type(value)))


#: The columns that the code's entry says.
DEFINED = ("task", "timing", "zone", "args", "kwargs", "options", *POLICIES)


def digest(row: Schedule) -> str:
    """Return a digest of what *row* says of its ticks and tasks."""
    said = json.dumps([getattr(row, name) for name in DEFINED], default=str)
    return blake2b(said.encode(), digest_size=20).hexdigest()


def reconcile(connection: Connection, entries: Mapping[str, Entry], now: datetime) -> None:
    """Write the code's *entries* to their rows; the caller has taken its turn.

    A definition that another one has replaced does not come back by itself: an older deployment that starts again
    undoes nothing. What an operator has changed stays until `reset`. A row of tables that are followed becomes the
    code's, as django-celery-beat has it, and stays paused.
    """
    for name, entry in entries.items():
        row, new = schedules.fetch(connection, name, lock=True), entry.row
        if row is None:
            new.tick_at = ticking.first(new, entry.following, now)
            new.next_at = ticking.with_jitter(new, new.tick_at)
            schedules.add(connection, new)
            continue
        past = json.loads(row.past)
        was_followed = row.source == "django"
        if not was_followed and (row.source != "code" or row.digest == new.digest or new.digest in past):
            continue
        values: dict[str, Any] = {"digest": new.digest, "source": "code"}
        if row.digest and not was_followed:
            values["past"] = json.dumps([*past, row.digest][-MOST_PAST:])
        if not row.is_changed:
            values |= {column: getattr(new, column) for column in DEFINED}
            if (row.timing, row.zone) != (new.timing, new.zone) or row.next_at is None:
                new.runs = row.runs
                tick = None if row.paused else ticking.first(new, entry.following, now)
                values |= {"tick_at": tick, "next_at": ticking.with_jitter(new, tick)}
        schedules.change(connection, name, values)
