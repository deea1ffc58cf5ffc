"""django-celery-beat's tables: the workers send each ``PeriodicTask``, and the admin goes on working."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from hashlib import blake2b
from time import monotonic
from typing import TYPE_CHECKING, Any

from celery import current_app
from celery.schedules import crontab, solar
from django.apps import apps
from django.db import close_old_connections, connections, transaction
from django.db.models import F
from django.db.models.signals import post_delete, post_save

from kathikon_celery import beat, frameworks
from kathikon_celery.schedules import entries
from kathikon_celery.schedules import options as options_of_rows
from kathikon_celery.schedules.following import Kept, follow
from kathikon_celery.schedules.timetable import FIELDS
from kathikon_celery.settings.brokers import broker_of, is_kathikon
from kathikon_celery.storage import Storage, reading
from kathikon_celery.storage.schedules import Schedule

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)

#: `Schedule.source` of these.
SOURCE = "django"
#: Seconds between two looks for changes by processes that do not follow them at once, as with beat's own scheduler.
INTERVAL = 5.0
#: Kinds of schedules of a PeriodicTask.
KINDS = ("interval", "crontab", "solar", "clocked")


def install() -> None:
    """Follow changes that this process makes, such as those of the admin, at their commit. May be called twice."""
    for signal in (post_save, post_delete):
        for model in ("PeriodicTask", "PeriodicTasks"):
            signal.connect(_changed, f"django_celery_beat.{model}", dispatch_uid=f"kathikon {id(signal)} {model}")


def _changed(using: str, **kwargs: Any) -> None:
    if not frameworks.has_app() or not is_wanted(current_app):
        return
    pending = connections[using].run_on_commit
    if not any(one[1] is _follow_at_once for one in pending):
        transaction.on_commit(_follow_at_once, using=using, robust=True)


def _follow_at_once() -> None:
    app = current_app._get_current_object()
    mirror(app, Storage.for_app(app))


def is_wanted(app: Celery) -> bool:
    """Whether the workers of *app* send the ticks of django-celery-beat's tables."""
    if not apps.ready or not apps.is_installed("django_celery_beat") or app.conf.beat_scheduler != beat.NAME:
        return False
    return is_kathikon(broker_of(app.conf)) and not Storage.for_app(app, setup=False).settings.in_tests


def follower(app: Celery, storage: Storage) -> Follower | None:
    """Return what keeps a worker's schedules and the tables together; `None`: the project does not have the tables."""
    return Follower(app, storage) if is_wanted(app) else None


class Follower:
    """Follows the tables for one worker, and tells them what was sent. Used by one thread."""

    def __init__(self, app: Celery, storage: Storage) -> None:
        self._app, self._storage = app, storage
        self._next_look = 0.0
        #: Name -> how many ticks were sent since the last look, and when the last one was.
        self._sent: dict[str, tuple[int, datetime]] = {}
        self._seen: datetime | None = None
        self._is_settled = False

    def look(self) -> None:
        """Tell the tables what was sent, and follow them if they have changed. Errors are logged."""
        if monotonic() < self._next_look:
            return
        self._next_look = monotonic() + INTERVAL
        try:
            close_old_connections()
            self._tell()
            changed = _model("PeriodicTasks").last_change()
            # A change is marked before it is made: look once more after the first look that sees the mark.
            if not self._is_settled or changed != self._seen:
                mirror(self._app, self._storage)
            self._is_settled, self._seen = changed == self._seen, changed
        except Exception as error:
            logger.warning("Kathikon: django-celery-beat's tables are not followed for now: %s", error)
            self._is_settled = False

    def sent(self, sent: Iterable[tuple[Schedule, int]], now: datetime) -> None:
        """Note how many ticks of which rows were sent at *now*: the tables are told at the next look."""
        for row, number in sent:
            if number and row.followed is not None:
                before, _ = self._sent.get(row.name, (0, now))
                self._sent[row.name] = before + number, now

    def _tell(self) -> None:
        tasks, is_changed = _model("PeriodicTask").objects, False
        for name, (number, now) in list(self._sent.items()):
            found = tasks.filter(name=name)
            if found.filter(one_off=True).update(last_run_at=now, total_run_count=0, enabled=False):
                is_changed = True
            else:
                found.update(last_run_at=now, total_run_count=F("total_run_count") + number)
            del self._sent[name]
        if is_changed:
            _model("PeriodicTasks").update_changed()


def mirror(app: Celery, storage: Storage) -> None:
    """Make the schedules of this source say what the tables say."""
    bad: dict[str, str] = {}

    def write(again: bool) -> None:
        with storage.database.write(durable=True) as connection:
            # In this order: whoever has the turn later reads later, so that no older state of the tables comes back.
            storage.database.dialect.take_turns(connection)
            follow(connection, kept(app, bad), SOURCE, reading.present(connection))
            storage.database.dialect.ring(connection)

    storage.database.patiently(write)
    for name, why in bad.items():
        logger.error("Kathikon: the periodic task %r is not sent: %s", name, why)


def kept(app: Celery, bad: dict[str, str]) -> Iterator[Kept]:
    """Return all periodic tasks. *bad*: gets the names of those that cannot be used, and why."""
    own = app.conf.beat_schedule or {}
    for task in _model("PeriodicTask").objects.select_related(*KINDS).order_by("name"):
        if task.name == entries.CLEANUP and entries.CLEANUP not in own and app.backend.supports_autoexpire:
            continue  # Celery's beat has added it: results are deleted without it
        try:
            yield _kept(task, app)
        except Exception as error:
            bad[task.name] = str(error)


def _model(name: str) -> Any:
    return apps.get_model("django_celery_beat", name)


def _kept(task: Any, app: Celery) -> Kept:
    options = {name: getattr(task, name) for name in ("queue", "exchange", "routing_key", "priority")}
    options = {name: value for name, value in options.items() if value not in (None, "")}
    if task.expires_:
        options["expires"] = task.expires_
    options["headers"] = {**_read(task.headers, dict), "periodic_task_name": task.name}
    timing, zone = _timing(task, app)
    policies = {"max_runs": 1 if task.one_off else None, "starts_at": task.start_time, "ends_at": task.expires}
    options |= {f"kathikon_{name}": value for name, value in policies.items() if value is not None}
    given = {"args": _read(task.args, list), "kwargs": _read(task.kwargs, dict), "options": options}
    options_of_rows.check({name: value for name, value in options.items() if not name.startswith("kathikon_")})
    row = entries.entry_of(task.name, {"task": task.task, "schedule": timing, **given}, zone).row
    row.paused = not task.enabled
    row.followed = blake2b(f"{row.digest} {task.enabled}".encode(), digest_size=20).hexdigest()
    since = task.last_run_at
    if isinstance(timing, datetime) and not (since and since >= timing):
        since = timing - timedelta(microseconds=1)
    return Kept(row, since)


def _timing(task: Any, app: Celery) -> tuple[Any, Any]:
    """Return the schedule of *task*, as one of Celery's, and its time zone."""
    if task.interval is not None:
        return timedelta(**{task.interval.period: task.interval.every}), app.timezone
    if (one := task.crontab) is not None:
        return crontab(**{name: getattr(one, name) for name in FIELDS}), one.timezone
    if (one := task.solar) is not None:
        return solar(one.event, float(one.latitude), float(one.longitude)), app.timezone
    if task.clocked is not None:
        return task.clocked.clocked_time, app.timezone
    raise ValueError("it has no schedule")


def _read(text: str | None, kind: type) -> Any:
    """Return the value of a field in JSON, which may be empty."""
    return kind() if text in (None, "", "null") else options_of_rows.json_of(text, kind)
