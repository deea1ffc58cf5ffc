"""Schedules of other schedulers, as they are kept there: the file of Celery's beat, and RedBeat's keys in Redis."""

from __future__ import annotations

import json
import shelve
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from celery.beat import ScheduleEntry
from celery.schedules import crontab, schedule
from kombu.utils import json as kombu_json
from kombu.utils.url import maybe_sanitize_url

from kathikon_celery.schedules import entries, options, timetable
from kathikon_celery.schedules.following import Kept


def of_beat_file(path: Path, zone: tzinfo, bad: dict[str, str]) -> Iterator[Kept]:
    """Return the entries of the file that Celery's beat has written (`celery.beat.PersistentScheduler`).

    The file is a pickle: reading a stranger's file runs the stranger's code.

    Arguments:
        zone: of crontabs.
        bad: gets the names of entries that cannot be used, and why.

    Raises `ValueError` if *path* is no such file.
    """
    if not any(path.parent.glob(f"{path.name}*")):  # some modules for such files add an ending
        raise ValueError(f"there is no file {path}")
    try:
        with closing(shelve.open(str(path), flag="r")) as store:
            found = dict(store["entries"])
    except Exception as error:
        raise ValueError(f"{path} is no file of Celery's beat: {error!r}") from error
    for name, entry in found.items():
        if isinstance(entry, ScheduleEntry):
            given = {key: getattr(entry, key) for key in ("task", "schedule", "args", "kwargs", "options")}
            yield from _kept(str(name), given, zone, entry.last_run_at, bad)
        else:
            bad[str(name)] = f"it is no entry of beat's, but {entry!r:.200}"


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
        with closing(redis.Redis.from_url(url)) as client:
            keys = sorted(client.scan_iter(match=f"{_literal(prefix)}*", _type="hash"))
            found = {key: client.hgetall(key) for key in keys}
    except (redis.RedisError, ValueError) as error:
        raise ValueError(f"{maybe_sanitize_url(url)} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"there are no entries with the prefix {prefix!r} in {maybe_sanitize_url(url)}")
    for key, said in found.items():
        name = key.decode(errors="replace").removeprefix(prefix)
        try:
            given = json.loads(said[b"definition"], object_hook=_object)
            meta = json.loads(said.get(b"meta") or "{}", object_hook=_object)
            if not isinstance(given, dict) or not isinstance(meta, dict):
                raise ValueError("its definition and its meta must be objects in JSON")
        except Exception as error:
            bad[name] = f"it cannot be read: {error}"
            continue
        wanted = {word: given.get(word) for word in ("task", "schedule", "args", "kwargs", "options")}
        for one in _kept(str(given.get("name") or name), wanted, zone, meta.get("last_run_at"), bad):
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


def _kept(name: str, given: dict[str, Any], zone: tzinfo, since: object, bad: dict[str, str]) -> Iterator[Kept]:
    try:
        if since is not None and not isinstance(since, datetime):
            raise ValueError(f"its last run is {since!r:.200}, and no moment")
        args, kwargs = given.get("args") or [], given.get("kwargs") or {}
        if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
            raise ValueError("its arguments must be a list, and its keyword arguments a mapping")
        if not isinstance(given.get("task"), str):
            raise ValueError(f"its task is {given.get('task')!r:.200}, and no name")
        entry = entries.entry_of(name, {**given, "args": args, "kwargs": kwargs}, zone)
        if entry.row.timing == timetable.CODE:
            kind = type(given["schedule"]).__name__
            raise ValueError(f"its schedule is of the class {kind}; only code can have it")
        options.check(entry.options)
        kombu_json.dumps([entry.args, entry.kwargs, entry.options])
    except Exception as error:
        bad[name] = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        return
    if isinstance(since, datetime) and since.tzinfo is None:
        since = since.replace(tzinfo=timezone.utc)
    yield Kept(entry.row, since)
