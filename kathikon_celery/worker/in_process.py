"""Reports the errors that Celery's tracer does not catch, in the pools that run tasks in the worker's own process.

A process of the prefork pool sends such an error to the worker. The other pools drop the error (threads, greenlets) or
let it end the worker (solo), and Celery would wait for the end of the task for ever.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import WorkerLostError, WorkerShutdown, WorkerTerminate
from celery.worker import state

from kathikon_celery.worker.request import Request

_MODULES = {f"celery.concurrency.{name}" for name in ("solo", "thread", "gevent", "eventlet")}


def report_errors(pool: Any) -> None:
    """Make *pool*, if it runs tasks in this process, report each error of a task to its request."""
    apply = pool.on_apply
    if not any(one.__module__ in _MODULES for one in type(pool).__mro__) or hasattr(apply, "reports_errors"):
        return

    def on_apply(target: Any, *args: Any, callback: Any = None, **options: Any) -> Any:
        request = getattr(callback, "__self__", None)
        if isinstance(request, Request):
            target = partial(_run, target, request)
        return apply(target, *args, callback=callback, **options)

    on_apply.reports_errors = True  # type: ignore[attr-defined]
    pool.on_apply = on_apply


def _run(target: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
    try:
        return target(*args, **kwargs)
    except Exception:
        return ExceptionInfo()  # given to `Request.on_success`, as an error of any other kind is by the pool
    except (WorkerShutdown, WorkerTerminate) as error:
        if state.should_stop is None and state.should_terminate is None:  # raised by the task itself
            lost = WorkerLostError(repr(error))
            request.on_failure(ExceptionInfo((WorkerLostError, lost, error.__traceback__)))
        raise
