"""`drain`: runs in the test's own process and thread what was sent, in the test's own transaction, without a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from socket import gethostname
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from celery import current_app
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, NotRegistered, Reject
from kombu.message import Message
from kombu.serialization import prepare_accept_content

from kathikon_celery import frameworks
from kathikon_celery.job import HELD, WAITING, Cause, Hold, Job, State, in_brief
from kathikon_celery.publish.envelope import unfold
from kathikon_celery.results.unattended import tell
from kathikon_celery.storage import Storage
from kathikon_celery.worker.completing import complete_in_transaction
from kathikon_celery.worker.request import REPLACED_BY_NEW_TASK

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult

#: The node that claims the jobs. No node has this number.
NODE = 0


def drain(app: Celery | None = None, *, scheduled: bool = False) -> list[AsyncResult]:
    """Run the waiting tasks of *app* (default: the current app) here, in the order in which they were sent.

    What these tasks send is run too: chains, callbacks, chords. In Django's `TestCase`, and with pytest-django's
    fixture ``db``, these are the tasks that the present test has sent; they see its data, and nothing is committed. A
    task that fails raises nothing here: ask its result.

    >>> order(card="visa")
    >>> [result.get() for result in drain()]
    ['charged visa']

    Arguments:
        scheduled: also run tasks with an ``eta`` or a ``countdown``, and retries, in the order of their times, at once.

    Returns the results of the tasks that have run, in that order. Raises Celery's `NotRegistered` for an unknown task.
    """
    app = app or current_app._get_current_object()
    storage, ran, put_back = Storage.for_app(app), dict[str, Any](), set[str]()
    catch_up: Callable[[], object] = list
    if frameworks.is_django():
        from kathikon_celery.django import in_tests

        catch_up = in_tests.catch_up
        storage.delete(in_tests.forget_gone())
    while True:
        catch_up()
        storage.discard_expired()
        tell(app, storage)
        for job in storage.all(state=State.BLOCKED):  # nothing else runs meanwhile
            job.state = State.AVAILABLE
            storage.update(job)
        jobs = [job for job in storage.all(state=State.AVAILABLE) if job.id not in put_back]
        if not jobs and scheduled:
            jobs = _next_due(storage)
        if not jobs:
            return list(ran.values())
        for job in jobs:
            if not _run(app, storage, job):
                put_back.add(job.id)
            ran[job.id] = app.AsyncResult(job.id)


def _next_due(storage: Storage) -> list[Job]:
    """Make the job ready that is due next, and return it."""
    waiting = [job for state in WAITING for job in storage.all(state=state)]
    due = sorted(waiting, key=lambda job: (job.scheduled_at or job.inserted_at, job.seq))[:1]
    for job in due:
        job.state = State.AVAILABLE
        storage.update(job)
    return due


def _run(app: Celery, storage: Storage, job: Job) -> bool:
    """Run *job*; return whether it is not ready again by ``Reject(requeue=True)``."""
    task = app.tasks.get(job.task)
    if task is None:
        raise NotRegistered(job.task)
    job.state, job.node_id = State.CLAIMED, NODE
    storage.update(job)
    unfolded = unfold(job.envelope, job.body, job.hold.tag, False)
    headers, properties = unfolded["headers"], unfolded["properties"]
    args, kwargs, embed = Message(
        body=unfolded["body"], headers=headers, content_type=unfolded["content-type"],
        content_encoding=unfolded["content-encoding"], accept=prepare_accept_content(app.conf.accept_content),
    ).decode()  # fmt: skip
    info = {**properties["delivery_info"], "priority": job.priority, "redelivered": False}
    request = {
        **headers, **embed, "args": args, "kwargs": kwargs, "properties": properties, "delivery_info": info,
        "reply_to": properties.get("reply_to"), "correlation_id": properties.get("correlation_id"),
        "hostname": gethostname(), "is_eager": False,
    }  # fmt: skip
    with _in_transaction(task, storage):
        traced = build_tracer(task.name, task, app=app)(job.id, args, kwargs, request)
    found = storage.fetch(job.id)
    if found is None or found.hold != job.hold or found.state not in HELD:
        return True
    return _end(storage, job.hold, traced.info.retval if traced.info is not None else None)


def _end(storage: Storage, hold: Hold, error: Any) -> bool:
    """Write the end of a job whose end left no result, as a worker's acknowledgement does."""
    backend = storage.backend
    with storage.database.write() as connection:
        if isinstance(error, Reject):
            if error.requeue:
                backend.given_back(connection, [hold])
                return False
            reason = in_brief(f"rejected: {in_brief(error.reason)}")
            backend.ended(connection, hold, State.DISCARDED, Cause.REJECTED, reason)
        elif isinstance(error, Ignore) and str(error) == REPLACED_BY_NEW_TASK:
            backend.replaced(connection, [hold])
        elif error is None or isinstance(error, Ignore):
            backend.completed(connection, [hold])
        else:
            backend.ended(connection, hold, State.DEAD, Cause.RAISED, in_brief(error), status="FAILURE")
    return True


@contextmanager
def _in_transaction(task: Any, storage: Storage) -> Iterator[None]:
    """Have *task* run in the transaction of its option ``transaction``; of Django: in a savepoint of the test's."""
    named = getattr(task, "transaction", None)
    if named is None:
        yield
        return
    with patch.object(task, "run", task.run):
        if isinstance(named, str):
            task.run = _in_savepoint(task.run, named)
        else:
            complete_in_transaction(task, storage)
        yield


def _in_savepoint(run: Callable[..., Any], alias: str) -> Callable[..., Any]:
    from django.db import transaction

    @wraps(run)
    def run_in_savepoint(*args: Any, **kwargs: Any) -> Any:
        ignored = None
        with transaction.atomic(using=alias):
            try:
                value = run(*args, **kwargs)
            except Ignore as error:  # is committed
                ignored, value = error, None
        if ignored is not None:
            raise ignored
        return value

    return run_in_savepoint
