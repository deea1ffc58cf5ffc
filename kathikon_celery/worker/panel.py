"""Celery's remote control commands that concern the tables.

``inspect scheduled`` also shows the jobs that wait in the table. ``control rate_limit`` changes the limit of the fleet,
if the setting ``kathikon_rate_limits`` says so.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from celery.worker.control import Panel, nok, ok

from kathikon_celery.job import Job
from kathikon_celery.publish.limiting import name_for
from kathikon_celery.results.unattended import request_of
from kathikon_celery.settings import Settings, checks
from kathikon_celery.settings.brokers import is_kathikon
from kathikon_celery.storage import Storage, reading
from kathikon_celery.storage.acts import Act
from kathikon_celery.storage.errors import NotFound, StorageError, in_words

#: Celery's priority of such an entry in the worker's timer.
PRIORITY = 6
#: Most jobs that one worker shows, those that are due first.
MOST = 1000


#: Who has set a rate by Celery's remote control, for the record.
OPERATOR = "celery control rate_limit"


def replace_commands() -> None:
    """Put ours in the place of Celery's commands. May be called twice."""
    command = Panel.data["rate_limit"]
    if not getattr(command, "is_for_the_fleet", False):
        Panel.data["rate_limit"] = _for_the_fleet(command)
    for name in ("scheduled", "dump_schedule"):
        command = Panel.data[name]
        if not getattr(command, "shows_the_table", False):
            Panel.data[name] = _with_the_table(command)


def _with_the_table(command: Any) -> Any:
    @wraps(command)
    def scheduled(state: Any, **kwargs: Any) -> list[dict[str, Any]]:
        app = state.app
        shown: list[dict[str, Any]] = command(state, **kwargs)
        if not is_kathikon(app.conf.broker_read_url):
            return shown
        with Storage.for_app(app, setup=False).database.read() as connection:
            jobs = reading.scheduled(connection, list(app.amqp.queues.consume_from), MOST)
        return shown + [_entry(job, state.hostname) for job in jobs]

    scheduled.shows_the_table = True  # type: ignore[attr-defined]
    return scheduled


def _entry(job: Job, hostname: str) -> dict[str, Any]:
    context = request_of(job)
    info = {"exchange": "", "routing_key": job.queue, "priority": job.priority, "redelivered": False}
    request = {
        "id": job.id,
        "name": context.shadow or job.task,
        "args": context.args,
        "kwargs": context.kwargs,
        "type": job.task,
        "hostname": hostname,
        "time_start": None,
        "acknowledged": False,
        "delivery_info": info,
        "worker_pid": None,
    }
    due = job.scheduled_at.isoformat() if job.scheduled_at is not None else None
    return {"eta": due, "priority": PRIORITY, "request": request}


def _for_the_fleet(command: Any) -> Any:
    @wraps(command)
    def rate_limit(state: Any, task_name: str, rate_limit: Any, **kwargs: Any) -> Any:
        app = state.app
        if not is_kathikon(app.conf.broker_read_url) or Settings.load(app.conf).rate_limits != "fleet":
            return command(state, task_name, rate_limit, **kwargs)
        if task_name not in app.tasks:
            return nok("unknown task")
        try:
            given = _numbers(rate_limit)
        except ValueError as error:
            return nok(f"Invalid rate limit string: {error}")
        name = name_for(task_name)
        act = Act(verb="limit", target=f"limit {name}: rate {rate_limit}", operator=OPERATOR)
        try:
            # Each worker of the fleet gets the command: the first one changes the numbers.
            Storage.for_app(app, setup=False).backend.set_limit(name, given, act)
        except NotFound:
            return nok(f"task {task_name} has no rate_limit in the code, so its jobs count for none; add one there")
        except StorageError as error:
            return nok(in_words(error))
        return ok("new rate limit set successfully" if given["rate"] else "rate limit disabled successfully")

    rate_limit.is_for_the_fleet = True  # type: ignore[attr-defined]
    return rate_limit


def _numbers(rate_limit: Any) -> dict[str, int | float | None]:
    """Return what a rate of Celery's is in the table: 0 and nothing mean no limit. Raises `ValueError`."""
    if not rate_limit or str(rate_limit).partition("/")[0].strip() in ("0", "0.0"):
        return {"rate": None, "per": 1.0}
    rate, per = checks.rate(rate_limit)
    return {"rate": rate, "per": per}
