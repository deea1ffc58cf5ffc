"""Celery's remote control command ``inspect scheduled``, which also shows the jobs that wait in the table."""

from __future__ import annotations

from functools import wraps
from typing import Any

from celery.worker.control import Panel

from kathikon_celery.job import Job
from kathikon_celery.results.unattended import request_of
from kathikon_celery.settings.brokers import is_kathikon
from kathikon_celery.storage import Storage, reading

#: Celery's priority of such an entry in the worker's timer.
PRIORITY = 6
#: Most jobs that one worker shows, those that are due first.
MOST = 1000


def show_scheduled() -> None:
    """Make the command show jobs that this worker may run when they are due. May be called twice."""
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
