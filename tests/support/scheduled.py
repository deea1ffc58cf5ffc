"""The sample app with the entries of ``SCHEDULES``: name -> seconds, as JSON."""

from __future__ import annotations

import json
import os

from celery import Task, shared_task

from tests.support.apps import app, append_line

__all__ = ["app"]


@shared_task(bind=True)
def note(self: Task, name: str) -> None:
    """Note which tick this is."""
    append_line(os.environ["JOURNAL"], f"{name} {self.request.kathikon_tick}")


app.conf.beat_schedule = {
    name: {"task": "tests.support.scheduled.note", "schedule": float(seconds), "args": (name,)}
    for name, seconds in json.loads(os.environ.get("SCHEDULES", "{}")).items()
}
