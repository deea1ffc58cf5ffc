"""Wraps a task's body and its tracer: its result is written with what Celery sends after it, or with other results."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from celery.app.trace import task_has_custom

from kathikon_celery.internals import TRACING, is_usable
from kathikon_celery.job import Hold
from kathikon_celery.limits import RateLimited
from kathikon_celery.publish import outbox
from kathikon_celery.results.backend import KathikonBackend
from kathikon_celery.results.carrier import CARRIED, Carried, Carrier
from kathikon_celery.storage import Storage, limits
from kathikon_celery.storage.names import key
from kathikon_celery.storage.settle import TaskEnd


def collect_successors(task: Any, storage: Storage) -> None:
    """Make *task* collect what it sends after its body has returned. Call this before its tracer is built."""
    run = task.run
    if getattr(run, "collects_successors", False) or not is_usable(TRACING):
        return

    @wraps(run)
    def run_and_collect(*args: Any, **kwargs: Any) -> Any:
        try:
            value = run(*args, **kwargs)
        except RateLimited as limited:
            _wait(task, storage, limited)
            raise
        request = task.request
        if (request.callbacks or request.chain) and not request.called_directly and not request.is_eager:
            backend = task.backend
            is_ours = isinstance(backend, KathikonBackend) and backend.storage is storage
            if is_ours and Hold.of_tag((request.properties or {}).get("delivery_tag")):
                outbox.begin(storage.database)
        return value

    run_and_collect.collects_successors = True  # type: ignore[attr-defined]
    task.run = run_and_collect


def _wait(task: Any, storage: Storage, limited: RateLimited) -> None:
    """Close the limit for all, and let the job of *task* wait as long, if it is one of ours."""
    limits.close(storage.database, key(limited.key), limited.retry_after)
    request = task.request
    if not request.called_directly and not request.is_eager:
        request.retries = (request.retries or 0) - 1  # `retry` adds 1: this is none
        task.retry(exc=limited, countdown=limited.retry_after, max_retries=sys.maxsize, throw=False)


def carry_results(task: Any, storage: Storage) -> None:
    """Make the tracer of *task* pass the result to the main process if the message says so. May be called twice."""
    trace = task.__trace__
    if trace is None or getattr(trace, "carries_results", False):  # None: Celery makes it at the first call
        return
    if not is_usable(TRACING):
        return
    if task_has_custom(task, "on_success") or task_has_custom(task, "after_return"):
        return  # they may need the stored result, and may take long

    @wraps(trace)
    def trace_and_carry(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        properties = (request or {}).get("properties") or {}
        hold = Hold.of_tag(properties.get("delivery_tag"))
        if hold is None:
            return trace(uuid, args, kwargs, request)
        with Carrier(hold, bool(properties.get(CARRIED))) as carrier:
            try:
                traced = trace(uuid, args, kwargs, request)
            except BaseException:
                if carrier.end is not None:  # the main process will not get the result
                    storage.backend.settle(TaskEnd(ends=[carrier.end]), {})
                raise
        if carrier.end is None and not carrier.is_written:
            return traced
        written = carrier.end.written if carrier.end is not None else None
        return traced._replace(retstr=Carried(traced.retstr or "", written))

    trace_and_carry.carries_results = True  # type: ignore[attr-defined]
    task.__trace__ = trace_and_carry
