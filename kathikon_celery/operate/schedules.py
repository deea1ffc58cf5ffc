"""Schedules in an operator's hands: added, changed, paused, run now, backfilled, without a worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kombu.utils import json as kombu_json
from sqlalchemy.exc import IntegrityError

from kathikon_celery.publish import callers
from kathikon_celery.schedules import entries, sending, ticking, timetable
from kathikon_celery.schedules import options as task_options
from kathikon_celery.schedules.following import Kept, begin
from kathikon_celery.storage import Storage, acts, reading, schedules
from kathikon_celery.storage.acts import Act
from kathikon_celery.storage.errors import NotFound
from kathikon_celery.storage.schedules import Schedule

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Connection

#: Most ticks of one `Schedules.backfill`.
MOST = 10_000


class Schedules:
    """The schedules of an app. Reached as ``Kathikon(app).schedules``.

    >>> kathikon.schedules.add("report", "proj.report", crontab(hour=6, minute=0), zone="Europe/Berlin")
    >>> kathikon.schedules.pause("report")

    All verbs write in the caller's open transaction, if there is one, as ``delay()`` does. Workers obey at once.
    They raise `NotFound` for a name that does not exist, and `ValueError` for a value that is not allowed.

    Arguments:
        storage: where the schedules are.
        app: sends the tasks of `run_now` and `backfill`; `None`: they raise `TypeError`.
        operator: who acts, for the record.

    Arguments of the methods:
        name: the schedule's name.
        reason: why, for the record of acts.
    """

    def __init__(self, storage: Storage, app: Celery | None, operator: str) -> None:
        self._storage, self._app, self._operator = storage, app, operator

    def every(self) -> list[Schedule]:
        """Return all schedules, by name.

        >>> [(one.name, one.next_at) for one in kathikon.schedules.every() if not one.paused]
        """
        with self._storage.database.read() as connection:
            return schedules.every(connection)

    def late(self, age: timedelta) -> list[str]:
        """Return in words which schedules have a tick that is late by more than *age*, and why: up to 20.

        >>> kathikon.schedules.late(timedelta(minutes=5))
        ["schedule 'report' is late by 412.0 s"]
        """
        with self._storage.database.read() as connection:
            found = schedules.overdue(connection, age.total_seconds())
        return [
            f"schedule {name!r} is late by {seconds:.1f} s{f': {problem}' if problem else ''}"
            for name, seconds, problem in found
        ]

    def get(self, name: str) -> Schedule:
        """Return one. Raises `NotFound`.

        >>> kathikon.schedules.get("report").next_at
        """
        with self._storage.database.read() as connection:
            return _found(schedules.fetch(connection, name), name)

    def add(
        self,
        name: str,
        task: str,
        schedule: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        zone: str | None = None,
        reason: str | None = None,
        **policies: Any,
    ) -> bool:
        """Add a schedule, or replace one that was added so, which stays paused; return whether there was one.

        >>> kathikon.schedules.add("report", "proj.report", 3600.0, kwargs={"mail": True}, missed="skip", jitter=30)

        Raises `ValueError` for the name of a code's entry, for a task or policy that is not allowed, for arguments that
        are no JSON, and for a schedule without a tick from now on.

        Arguments:
            task: the task's name.
            schedule: seconds, a timedelta, Celery's `crontab` or `solar`, or an aware datetime: one tick then.
            args: of the task; what JSON can say.
            kwargs: of the task, as well.
            options: of ``apply_async``.
            zone: the time zone of a crontab; default: the app's.
            policies: ``missed``, ``grace``, ``overlap``, ``jitter``, ``max_runs``, ``starts_at``, ``ends_at``; see
                `kathikon_celery.storage.schedules.Schedule`.
        """
        zone = zone or (str(self._app.timezone) if self._app is not None else "UTC")
        text, following = timetable.of(schedule, timetable.zone_of(zone))
        if text == timetable.CODE:
            raise ValueError(f"{schedule!r} is of a class of the application's; only beat_schedule can have it")
        if unknown := policies.keys() - set(entries.POLICIES):
            raise ValueError(f"{', '.join(sorted(unknown))}: allowed are {', '.join(entries.POLICIES)}")
        texts = _texts({"args": args, "kwargs": kwargs or {}, "options": options or {}})
        was_there = False
        row = Schedule(
            name=name,
            task=task,
            timing=text,
            zone=zone,
            **texts,
            **policies,
        )
        entries.check(row)

        def write(connection: Connection, old: Schedule | None) -> None:
            if old is not None and _ours(old, name).source == "code":
                raise ValueError(f"schedule {name!r} is an entry of the code; change it instead")
            nonlocal was_there
            was_there, row.paused = old is not None, old is not None and old.paused
            tick = _first(row, following, connection)
            row.tick_at = None if row.paused else tick
            row.next_at = ticking.with_jitter(row, row.tick_at)
            if old is not None:
                schedules.change(connection, name, {key: value for key, value in vars(row).items() if key != "name"})
            else:
                schedules.add(connection, row)

        self._write("add", name, reason, write)
        return was_there

    def change(self, name: str, reason: str | None = None, **values: Any) -> None:
        """Change a schedule. A changed entry of the code stays so through deployments, until `reset`.

        >>> kathikon.schedules.change("report", reason="summer", schedule=crontab(hour=5, minute=0))

        Arguments:
            values: ``schedule``, ``zone``, ``args``, ``kwargs``, ``options`` or a policy, as for `add`.
        """
        allowed = {"schedule", "zone", "args", "kwargs", "options", *entries.POLICIES}
        if unknown := values.keys() - allowed:
            raise ValueError(f"{', '.join(sorted(unknown))}: allowed are {', '.join(sorted(allowed))}")

        def write(connection: Connection, old: Schedule | None) -> None:
            row = _ours(old, name)
            new: dict[str, Any] = _texts({one: values[one] for one in ("args", "kwargs", "options") if one in values})
            new |= {one: values[one] for one in entries.POLICIES if one in values}
            zone = values.get("zone", row.zone)
            if "schedule" in values:
                new["timing"], _ = timetable.of(values["schedule"], timetable.zone_of(zone))
            changed = replace(row, zone=zone, **new)
            entries.check(changed)
            following = timetable.read(changed.timing, timetable.zone_of(zone))
            columns = {**new, "zone": zone, "is_changed": row.source == "code"}
            if following is not None and values.keys() & {"schedule", "zone", "starts_at", "ends_at", "max_runs"}:
                tick = _first(changed, following, connection)
                columns |= {} if row.paused else {"tick_at": tick, "next_at": ticking.with_jitter(changed, tick)}
            schedules.change(connection, name, columns)

        self._write("change", name, reason, write, {one: str(value) for one, value in values.items()})

    def pause(self, name: str, reason: str | None = None) -> None:
        """Send no ticks until `resume`. Ticks of that time are not made up for.

        >>> kathikon.schedules.pause("report", reason="holidays")
        """

        def write(connection: Connection, old: Schedule | None) -> None:
            _ours(old, name)
            schedules.change(connection, name, {"paused": True, "tick_at": None, "next_at": None})

        self._write("pause", name, reason, write)

    def resume(self, name: str, reason: str | None = None) -> None:
        """Go on with the first tick from now on.

        >>> kathikon.schedules.resume("report")
        """

        def write(connection: Connection, old: Schedule | None) -> None:
            row = _ours(old, name)
            tick = ticking.first(row, self._following(row), reading.present(connection))
            schedules.change(
                connection, name, {"paused": False, "tick_at": tick, "next_at": ticking.with_jitter(row, tick)}
            )

        self._write("resume", name, reason, write)

    def remove(self, name: str, reason: str | None = None) -> None:
        """Delete a schedule. Raises `ValueError` for an entry of the code of this app: the next worker would add it.

        >>> kathikon.schedules.remove("report")
        """

        def write(connection: Connection, old: Schedule | None) -> None:
            if _ours(old, name).source == "code" and self._app is not None and name in entries.of(self._app, {}):
                raise ValueError(f"schedule {name!r} is an entry of the code: delete it there, or pause it here")
            schedules.remove(connection, name)

        self._write("delete", name, reason, write)

    def reset(self, name: str, reason: str | None = None) -> None:
        """Undo an operator's changes of a code's entry.

        The row says at once what the code of this app says; without the entry there, the next worker that starts writes
        what its code says.

        >>> kathikon.schedules.reset("report")
        """
        own = entries.of(self._app, {}) if self._app is not None else {}

        def write(connection: Connection, old: Schedule | None) -> None:
            row = _ours(old, name)
            if row.source != "code":
                raise ValueError(f"schedule {name!r} is no entry of the code")
            schedules.change(connection, name, {"is_changed": False, "digest": "", "past": "[]"})
            entries.reconcile(connection, {name: own[name]} if name in own else {}, reading.present(connection))

        self._write("reset", name, reason, write)

    def take_over(self, kept: Iterable[Kept], reason: str | None = None, dry_run: bool = False) -> dict[str, str]:
        """Add schedules of another scheduler; return by name what was done: "added", "goes on" or "is there".

        "goes on": an entry of the code, whose first tick follows the last run there, if no worker has sent one yet.
        Stop the other scheduler first. Ticks that were missed since its last run are sent as the schedule's ``missed``
        says.

        Arguments:
            kept: as `kathikon_celery.schedules.imports` reads them.
            dry_run: change nothing.
        """
        own = entries.of(self._app, {}) if self._app is not None else {}
        done: dict[str, str] = {}
        found = list(kept)

        def write(connection: Connection, old: Schedule | None) -> None:
            now = reading.present(connection)
            if not dry_run:
                self._storage.database.dialect.take_turns(connection)
                entries.reconcile(connection, own, now)
            for one in found:
                if one.row.name == entries.CLEANUP and entries.CLEANUP not in own:
                    continue  # Celery's beat adds it: results are deleted without it
                row = schedules.fetch(connection, one.row.name, lock=not dry_run)
                entry = own.get(one.row.name)
                done[one.row.name] = word = _to_take_over(row, entry is not None)
                if dry_run or word == "is there":
                    continue
                if row is not None and row.source == "django":
                    schedules.change(connection, row.name, {"source": "table", "followed": None})
                elif row is None or entry is None:
                    one.row.source = "table"
                    begin(one.row, one.since, now)
                    schedules.add(connection, one.row)
                elif one.since is not None and not row.paused:
                    tick = ticking.first(row, entry.following, now, one.since)
                    values = {"tick_at": tick, "next_at": ticking.with_jitter(row, tick)}
                    schedules.change(connection, row.name, values)

        if dry_run:
            with self._storage.database.read() as connection:
                write(connection, None)
        else:
            self._write("import", "", reason, write)
        return done

    def run_now(self, name: str, reason: str | None = None) -> str:
        """Send the task of a schedule once, beside its ticks; return the job's id.

        >>> app.AsyncResult(kathikon.schedules.run_now("report")).get()
        """
        ids = self._send(name, "run", reason, lambda row, now: [(now, str(uuid4()))])
        return ids[0]

    def backfill(self, name: str, since: datetime, until: datetime, reason: str | None = None) -> list[str]:
        """Send the ticks after *since* up to *until*; return the jobs' ids. A tick that was sent is not sent again.

        Ticks each so many seconds are in step with those that the schedule has now.

        >>> monday = datetime(2026, 11, 16, tzinfo=timezone.utc)
        >>> ids = kathikon.schedules.backfill("report", monday, monday + timedelta(days=7))

        Raises `TypeError` for *since* or *until* that is no datetime, and `ValueError` for one without a time zone, for
        an *until* that has not come yet, and for more than 10,000 ticks.
        """
        for word, moment in (("since", since), ("until", until)):
            if not isinstance(moment, datetime):
                raise TypeError(f"{word} = {moment!r} is no datetime")
            if moment.tzinfo is None:
                raise ValueError(f"{word} = {moment} has no time zone; use an aware datetime")
        if since >= until:
            raise ValueError(f"since = {since} is not before until = {until}")

        def ticks(row: Schedule, now: datetime) -> list[tuple[datetime, str]]:
            if until > now:
                raise ValueError(f"until = {until} has not come yet")
            found, following = [], self._following(row)
            known = row.tick_at or row.last_tick
            tick = timetable.in_step(row.timing, known, since) if known is not None else since
            while (one := following(tick)) is not None and one <= until:
                tick = one
                if tick > since:
                    found.append((tick, sending.job_id(name, tick)))
                if len(found) > MOST:
                    raise ValueError(f"there are more than {MOST:,} ticks between {since} and {until}")
            return found

        return self._send(name, "backfill", reason, ticks)

    def _send(
        self,
        name: str,
        verb: str,
        reason: str | None,
        which: Callable[[Schedule, datetime], list[tuple[datetime, str]]],
    ) -> list[str]:
        if self._app is None:
            raise TypeError("a task is sent by an app: say Kathikon(app), not Kathikon(storage)")
        app, own = self._app, entries.of(self._app, {})
        ids: list[str] = []

        def write(connection: Connection, old: Schedule | None) -> None:
            row, now = _found(old, name), reading.present(connection)
            ids.clear()
            for tick, job_id in which(row, now):
                if reading.fetch(connection, job_id) is None:
                    ids.append(sending.send(app, connection, row, own.get(name), tick, now, job_id))
            act.changed = len(ids)

        act = self._act(verb, name, reason)
        self._do(act, name, write)
        return ids

    def _following(self, row: Schedule) -> timetable.Following:
        following = timetable.read(row.timing, timetable.zone_of(row.zone))
        if following is None and self._app is not None and row.name in (own := entries.of(self._app)):
            following = own[row.name].following
        if following is None:
            raise ValueError(f"only the code that made schedule {row.name!r} can compute its ticks")
        return following

    def _write(
        self,
        verb: str,
        name: str,
        reason: str | None,
        step: Callable[[Connection, Schedule | None], None],
        values: Mapping[str, str] | None = None,
    ) -> None:
        self._do(self._act(verb, name, reason, values), name, step)

    def _act(self, verb: str, name: str, reason: str | None, values: Mapping[str, str] | None = None) -> Act:
        target = f"schedule {name}" if name else "schedules"
        said = f": {json.dumps(values)}" if values else ""
        return Act(verb=verb, target=target + said, operator=self._operator, reason=reason)

    def _do(self, act: Act, name: str, step: Callable[[Connection, Schedule | None], None]) -> None:
        def write(there: Storage) -> None:
            with there.database.write(durable=True) as connection:
                step(connection, schedules.fetch(connection, name, lock=True))
                acts.begin(connection, act, is_whole=True)
                there.database.dialect.ring(connection)

        def once_more(there: Storage) -> None:
            try:
                write(there)
            except IntegrityError:  # another process has added the same name meanwhile
                if there is not self._storage:
                    raise
                write(there)

        callers.write(self._storage, once_more)


def _texts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments, keyword arguments and options as JSON. Raises `ValueError` for what a row cannot keep."""
    for name, value in given.items():
        kind: Any = list | tuple if name == "args" else Mapping
        if not isinstance(value, kind):
            raise ValueError(f"{name} = {value!r:.200} is no {'list' if name == 'args' else 'mapping'}")
        if name == "options":
            task_options.check(value)
    try:
        return {name: kombu_json.dumps(value if name == "args" else dict(value)) for name, value in given.items()}
    except (TypeError, RecursionError) as error:
        raise ValueError(f"only what JSON can say can be kept in a schedule: {error}") from error


def _first(row: Schedule, following: timetable.Following, connection: Connection) -> datetime:
    tick = ticking.first(row, following, reading.present(connection))
    if tick is None:
        raise ValueError(f"schedule {row.name!r} has no tick from now on: see its ends_at, max_runs and schedule")
    return tick


def _found(row: Schedule | None, name: str) -> Schedule:
    if row is None:
        raise NotFound(f"there is no schedule {name!r}")
    return row


def _ours(row: Schedule | None, name: str) -> Schedule:
    """Return the schedule, unless its master is elsewhere."""
    row = _found(row, name)
    if row.source == "django":
        raise ValueError(f"schedule {name!r} is a periodic task of django-celery-beat; change it there")
    return row


def as_dict(row: Schedule) -> dict[str, Any]:
    """Return a schedule by column, for programs."""
    found: dict[str, Any] = {}
    for name, value in vars(row).items():
        if name in ("past", "digest", "followed"):
            continue
        found[name] = value.isoformat() if isinstance(value, datetime) else value
    return {**found, **{one: json.loads(found[one]) for one in ("args", "kwargs", "options")}}


def _to_take_over(row: Schedule | None, is_of_code: bool) -> str:
    if is_of_code:
        return "goes on" if row is None or (row.source == "code" and not row.runs) else "is there"
    return "added" if row is None or row.source == "django" else "is there"


def lag(row: Schedule) -> timedelta | None:
    """Return by how much the last tick was sent late."""
    return row.last_sent - row.last_tick if row.last_sent and row.last_tick else None
