"""Wraps a task's body, so that what Celery sends after it is published together with its result."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kathikon_celery.backend import KathikonBackend
from kathikon_celery.storage import Storage
from kathikon_celery.transport import collecting
from kathikon_celery.transport.delivery import hold_of


def collect_successors(task: Any, storage: Storage) -> None:
    """Make *task*, once its body has returned, collect what it sends. Twice is once; before its tracer is built."""
    run = task.run
    if getattr(run, "collects_successors", False):
        return

    @wraps(run)
    def run_and_collect(*args: Any, **kwargs: Any) -> Any:
        value = run(*args, **kwargs)
        request = task.request
        if (request.callbacks or request.chain) and not request.called_directly and not request.is_eager:
            backend = task.backend
            is_ours = isinstance(backend, KathikonBackend) and backend.storage is storage
            if is_ours and hold_of((request.properties or {}).get("delivery_tag")):
                collecting.begin(storage.database)
        return value

    run_and_collect.collects_successors = True  # type: ignore[attr-defined]
    task.run = run_and_collect
