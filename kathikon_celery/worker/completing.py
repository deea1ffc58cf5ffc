"""Runs a task within a transaction of the application's, which also writes the end of the task: all of it or nothing.

The body runs in the transaction, and what it sends goes there. When Celery reports the end, `results.canvas` writes the
end and its successors there too, and commits. The end names the claim of the run: a run that has lost its claim is
rolled back with all that its body has done.

How a body ends decides: a return value, ``Ignore`` and ``self.replace`` commit; ``Retry``, ``Reject`` and every error,
also a time limit, roll back first, and are then reported as for any other task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Ignore, Retry, WorkerLostError
from celery.states import FAILURE

from kathikon_celery.internals import TRACING, is_usable
from kathikon_celery.job import Hold
from kathikon_celery.publish import outbox
from kathikon_celery.publish.destination import publish
from kathikon_celery.publish.enqueue_in import caller_of
from kathikon_celery.results.backend import KathikonBackend
from kathikon_celery.results.completion import CommitLost, Completion, beginning, current_session
from kathikon_celery.settings import SettingError
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import TransactionRefused
from kathikon_celery.worker.request import REPLACED_BY_NEW_TASK

logger = logging.getLogger(__name__)


def complete_in_transaction(task: Any, storage: Storage) -> None:
    """Make *task* run in the transaction that its option ``transaction`` names. Call this before `collect_successors`.

    Raises `SettingError` when that is impossible.
    """
    named = getattr(task, "transaction", None)
    if named is None or getattr(task.run, "completes", False):
        return
    begin = _beginner(task, named, storage)
    run = task.run

    @wraps(run)
    def run_and_complete(*args: Any, **kwargs: Any) -> Any:
        request = task.request
        hold = Hold.of_tag((request.properties or {}).get("delivery_tag"))
        if request.called_directly or request.is_eager or hold is None:
            return run(*args, **kwargs)
        with beginning():
            completion = begin(storage, hold)
        try:
            with beginning():
                completion.check()
            with outbox.within(caller=completion.caller, completion=completion):
                value = run(*args, **kwargs)
        except Ignore as error:  # also `self.replace`
            completion.ignore(request.id, str(error) == REPLACED_BY_NEW_TASK)
            raise
        except Retry:
            if (job := completion.roll_back()) is not None:
                publish(storage, job)
            raise
        except BaseException:
            completion.roll_back()
            raise
        outbox.change(completion=completion)  # until the end is written
        return value

    run_and_complete.completes = True  # type: ignore[attr-defined]
    task.run = run_and_complete
    if not hasattr(type(task), "session"):
        type(task).session = property(lambda self: current_session())


def _beginner(task: Any, named: Any, storage: Storage) -> Callable[[Storage, Hold], Completion]:
    if not is_usable(TRACING):
        raise SettingError(f"task {task.name} has a transaction, but the tracer of this version of Celery is unknown")
    if not (isinstance(task.backend, KathikonBackend) and task.backend.storage.database is storage.database):
        raise SettingError(f"task {task.name} has a transaction; that needs result_backend = 'kathikon'")
    if isinstance(named, str):
        _check_alias(task, named)
        return partial(_begin_in_django, named)
    if callable(named):
        return partial(_begin_session, named)
    raise SettingError(f"transaction = {named!r} of task {task.name} is neither a Django alias nor a sessionmaker")


def _check_alias(task: Any, alias: str) -> None:
    from django.db import connections

    if alias not in connections:
        known = ", ".join(map(repr, connections))
        raise SettingError(f"transaction = {alias!r} of task {task.name} is no alias in DATABASES; there are {known}")


def _begin_in_django(alias: str, storage: Storage, hold: Hold) -> Completion:
    from django.db import connections, transaction

    atomic = transaction.atomic(using=alias)
    atomic.__enter__()
    committed: list[bool] = []
    transaction.on_commit(lambda: committed.append(True), using=alias)

    def commit() -> None:
        if connections[alias].needs_rollback:
            raise TransactionRefused(
                "the task's body has caught an error of the database within its transaction, or called set_rollback()"
            )
        try:
            atomic.__exit__(None, None, None)
        except Exception:
            if not committed:
                raise
            logger.exception("Kathikon: a function that the task gave to on_commit has raised; the task is committed")

    def abort() -> None:
        error = _Aborted()
        atomic.__exit__(_Aborted, error, None)

    return Completion(storage, hold, caller_of(alias), commit, abort)


class _Aborted(Exception):
    """Makes Django roll back."""


def _begin_session(maker: Callable[[], Any], storage: Storage, hold: Hold) -> Completion:
    session = maker()
    begun = session.begin()

    def commit() -> None:
        if not begun.is_active:
            raise TransactionRefused("the task's body has ended its transaction by itself")
        try:
            session.commit()
        finally:
            session.close()

    return Completion(storage, hold, caller_of(session), commit, session.close, session)


def end_transactions(task: Any) -> None:
    """Make the tracer of *task* leave no transaction open. May be called twice."""
    trace = task.__trace__
    if trace is None or not getattr(task.run, "completes", False) or getattr(trace, "ends_transactions", False):
        return

    @wraps(trace)
    def trace_and_end(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        try:
            return trace(uuid, args, kwargs, request)
        except CommitLost as error:
            lost = WorkerLostError(str(error))
            return trace_ok_t(
                ExceptionInfo((WorkerLostError, lost, error.__traceback__)), TraceInfo(FAILURE, lost), 0.0, None
            )
        finally:
            completion = outbox.scope().completion
            if completion is not None:  # Celery has failed between the body and its end
                outbox.change(completion=None)
                completion.roll_back()

    trace_and_end.ends_transactions = True  # type: ignore[attr-defined]
    task.__trace__ = trace_and_end
