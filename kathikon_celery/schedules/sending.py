"""Sends the task of one tick, in the transaction that notes the tick as sent."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from celery.beat import _evaluate_entry_args, _evaluate_entry_kwargs
from kombu.utils import json as kombu_json

from kathikon_celery.publish.enqueue_in import enqueue_in
from kathikon_celery.schedules.entries import Entry
from kathikon_celery.storage.schedules import Schedule

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Connection


def job_id(name: str, tick: datetime) -> str:
    """Return the id of the job of a tick."""
    return str(uuid5(NAMESPACE_URL, json.dumps([name, tick.isoformat()])))


def send(
    app: Celery,
    connection: Connection,
    row: Schedule,
    entry: Entry | None,
    tick: datetime,
    now: datetime,
    task_id: str,
) -> str:
    """Send the task of *tick* as job *task_id*, in the transaction of *connection*; return the id.

    *entry*: of this process's code. If the row says the same, the entry is used: it may have what no row can have.
    """
    if entry is not None and entry.row.digest == row.digest and not row.is_changed:
        args, kwargs, options = entry.args, entry.kwargs, dict(entry.options)
    else:
        args, kwargs, options = (kombu_json.loads(text) for text in (row.args, row.kwargs, row.options))
    if isinstance(expires := options.get("expires"), int | float):
        options["expires"] = now + timedelta(seconds=expires)  # by the database's clock, not by this machine's
    if (countdown := options.pop("countdown", None)) is not None:
        options["eta"] = now + timedelta(seconds=countdown)
    said: dict[str, Any] = {
        "celery_beat_task": True,
        "kathikon_schedule": row.name,
        "kathikon_tick": tick.isoformat(),
    }
    options["headers"] = {**(options.get("headers") or {}), **said}
    call = _evaluate_entry_args(args), _evaluate_entry_kwargs(kwargs)
    with enqueue_in(connection):
        task = app.tasks.get(row.task)
        if task is not None:
            result = task.apply_async(*call, task_id=task_id, **options)
        else:
            result = app.send_task(row.task, *call, task_id=task_id, **options)
    return str(result.id)
