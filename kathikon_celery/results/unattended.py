"""Handles jobs that ended without a run: their processes were lost too often, or they expired, or were given up.

`tell` calls their errbacks, fails the tasks that were to follow them, and counts them in their chords, as Celery does
for a task that failed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from celery.app.task import Context
from kombu.message import Message

from kathikon_celery.job import Cause, Job, State
from kathikon_celery.publish import outbox
from kathikon_celery.publish.envelope import unfold
from kathikon_celery.results.backend import WORDS, error_of
from kathikon_celery.storage import finish
from kathikon_celery.storage.errors import is_refusal
from kathikon_celery.storage.settle import JobEnd, TaskEnd

if TYPE_CHECKING:
    from celery import Celery

    from kathikon_celery.storage import Storage

logger = logging.getLogger(__name__)


def tell(app: Celery, storage: Storage) -> None:
    """Handle up to 100 unreported jobs. Several workers may do so at once; each end is written by one of them."""
    with storage.database.read() as connection:
        unreported = finish.unreported(connection)
    for job in unreported:
        try:
            _tell_of(app, job)
        except Exception as error:
            if not is_refusal(error):
                raise
            logger.exception("Kathikon: what was to follow job %s could not be written", job.id)
            written = {"status": WORDS[job.state], "result": None, "traceback": None, "meta": None}
            end = JobEnd(task_id=job.id, hold=None, state=job.state, written=written, unreported=True)
            storage.backend.settle(TaskEnd(ends=[end]), {})  # else each of the next steps would fail at this job


def _tell_of(app: Celery, job: Job) -> None:
    request, why = request_of(job), job.reason or job.state.value
    with outbox.within(unreported=job.id):
        if job.state is State.DEAD:
            app.backend.mark_as_failure(job.id, error_of(job), request=request)
        elif job.cause is Cause.REJECTED:
            app.backend.mark_as_failure(job.id, error_of(job), request=request, call_errbacks=False)
        else:
            app.backend.mark_as_revoked(job.id, why, request=request)


def request_of(job: Job) -> Context:
    """Return the request as the task would have seen it; without its callbacks if the message cannot be read."""
    request: dict[str, Any] = {"id": job.id, "task": job.task, "group": job.group_id}
    request["delivery_info"] = {"routing_key": job.queue}
    try:
        unfolded = unfold(job.envelope, job.body, "", False)
        headers = unfolded["headers"]
        message = Message(
            body=unfolded["body"],
            headers=headers,
            content_type=unfolded["content-type"],
            content_encoding=unfolded["content-encoding"],
        )
        args, kwargs, embed = message.decode()
        request |= {**headers, "args": args, "kwargs": kwargs, **embed}
    except Exception as error:
        logger.warning("Kathikon: what was to follow job %s cannot be read: %s", job.id, error)
    return Context(request)
