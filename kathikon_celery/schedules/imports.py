"""Schedules of other schedulers, as they are kept there: the file of Celery's beat, and RedBeat's keys in Redis."""

from __future__ import annotations

import json
import shelve
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from celery.schedules import crontab, schedule
from kombu.utils import json as kombu_json

from kathikon_celery.schedules import entries, timetable
from kathikon_celery.schedules.following import Kept


def of_beat_file(path: Path, zone: tzinfo, bad: dict[str, str]) -> Iterator[Kept]:
    """Return the entries of the file that Celery's beat has written (`celery.beat.PersistentScheduler`).

    The file is a pickle: reading a stranger's file runs the stranger's code.

    Arguments:
        zone: of crontabs.
        bad: gets the names of entries that cannot be used, and why.

    Raises `ValueError` if *path* is no such file.
    """
    try:
        with closing(shelve.open(str(path), flag="r")) as store:
            found = dict(store["entries"])
    except Exception as error:
        raise ValueError(f"{path} is no file of Celery's beat: {error!r}") from error
    for name, entry in found.items():
        given = {key: getattr(entry, key) for key in ("task", "schedule", "args", "kwargs", "options")}
        yield from _kept(str(name), given, zone, entry.last_run_at, bad)


def of_redbeat(url: str, prefix: str, zone: tzinfo, bad: dict[str, str]) -> Iterator[Kept]:
    """Return the entries of RedBeat (`redbeat.RedBeatSchedulerEntry`) in the Redis at *url*.

    Arguments:
        prefix: of the keys, RedBeat's setting ``redbeat_key_prefix``.
        zone: of crontabs.
        bad: gets the names of entries that cannot be used, and why.

    Raises `ValueError` if Redis cannot be read, or the package ``redis`` is not installed.
    """
    try:
        import redis
    except ImportError as error:
        raise ValueError("reading RedBeat's entries needs the package redis: pip install redis") from error
    try:
        with closing(redis.Redis.from_url(url, decode_responses=True)) as client:
            keys = sorted(client.scan_iter(match=f"{_literal(prefix)}*", _type="hash"))
            found = {key: client.hgetall(key) for key in keys}
    except (redis.RedisError, ValueError) as error:
        raise ValueError(f"{url} cannot be read: {error}") from error
    for key, said in found.items():
        name = key.removeprefix(prefix)
        try:
            given = json.loads(said["definition"], object_hook=_object)
            since = json.loads(said.get("meta") or "{}", object_hook=_object).get("last_run_at")
        except (ValueError, TypeError, KeyError) as error:
            bad[name] = str(error)
            continue
        for one in _kept(str(given.get("name") or name), given, zone, since, bad):
            one.row.paused = given.get("enabled") is False
            yield one


def _literal(text: str) -> str:
    return "".join(f"\\{one}" if one in "*?[]\\" else one for one in text)


def _object(found: dict[str, Any]) -> Any:
    """Return what RedBeat has written as this JSON object."""
    kind = found.pop("__type__", None)
    if kind is None:
        return found
    if kind == "interval":
        return schedule(timedelta(seconds=found["every"]), relative=bool(found.get("relative")))
    if kind == "crontab":
        return crontab(**found)
    if kind == "datetime":
        zone = found.pop("timezone", "UTC")
        is_offset = isinstance(zone, int | float)
        return datetime(tzinfo=timezone(timedelta(seconds=zone)) if is_offset else ZoneInfo(zone), **found)
    raise ValueError(f"a schedule of the kind {kind!r} is not known; interval and crontab are")


def _kept(
    name: str, given: Mapping[str, Any], zone: tzinfo, since: datetime | None, bad: dict[str, str]
) -> Iterator[Kept]:
    try:
        entry = entries.entry_of(name, given, zone)
        if entry.row.timing == timetable.CODE:
            kind = type(given["schedule"]).__name__
            raise ValueError(f"its schedule is of the class {kind}; only code can have it")
        kombu_json.dumps([entry.args, entry.kwargs, entry.options])
    except (ValueError, TypeError, KeyError) as error:
        bad[name] = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        return
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=timezone.utc)
    yield Kept(entry.row, since)
