"""The entries of ``beat_schedule``: as rows, and what their code alone knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from celery.schedules import crontab
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
        given["celery.backend_cleanup"] = cleanup
    given |= app.conf.beat_schedule or {}
    found = {}
    for name, one in given.items():
        try:
            found[str(name)] = entry_of(str(name), one, app.timezone)
        except (ValueError, TypeError, KeyError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            if bad is None:
                raise ValueError(f"beat_schedule[{name!r}] cannot be used: {why}") from error
            bad[str(name)] = why
    return found


def entry_of(name: str, given: Mapping[str, Any], zone: tzinfo) -> Entry:
    """Return an entry as ``beat_schedule`` has them; *zone*: of its crontab, unless the entry says another."""
    options = {**(given.get("options") or {})}
    zone_name = options.pop("kathikon_zone", None) or str(zone)
    if zone_name != str(zone):
        zone = timetable.zone_of(zone_name)
    text, following = timetable.of(given["schedule"], zone)
    policies = {key: options.pop(f"kathikon_{key}") for key in POLICIES if f"kathikon_{key}" in options}
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
    for name in ("grace", "jitter"):
        value = getattr(row, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
            raise ValueError(f"{name} = {value!r} is no number of seconds, 0 or more")
    if row.max_runs is not None and not (isinstance(row.max_runs, int) and row.max_runs > 0):
        raise ValueError(f"max_runs = {row.max_runs!r} is no whole number above 0")
    for name in ("starts_at", "ends_at"):
        moment = getattr(row, name)
        if moment is not None and not (isinstance(moment, datetime) and moment.tzinfo):
            raise ValueError(f"{name} = {moment!r} is no aware datetime")


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
