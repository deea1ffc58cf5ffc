"""Where a published job goes: into its row, now or with the caller's transaction or a task's end, or into a `bulk`."""

from __future__ import annotations

import logging
from datetime import datetime, timezone

from celery._state import get_current_task

from kathikon_celery.job import Hold, Job
from kathikon_celery.publish import callers, outbox
from kathikon_celery.storage import Storage
from kathikon_celery.unique import instead

logger = logging.getLogger(__name__)


def publish(storage: Storage, job: Job) -> None:
    """Publish *job*. It is on disk when this returns, unless it is collected for a task's end or a `bulk`.

    A task that publishes its own job again (a retry, ``self.replace``) may do so only while the job is its own.
    """
    hold = _hold_on(job.id)
    if hold is None:
        publish_new(storage, job)
    elif (completion := outbox.scope().completion) is not None:
        completion.publish_own(job)
    elif not storage.backend.insert(job, hold, soon=_is_soon(storage, job)):
        outbox.change(refused=job.id)
        logger.warning(
            "Kathikon: job %s was cancelled or given to another worker; its retry from here was ignored", job.id
        )


def publish_new(storage: Storage, job: Job) -> None:
    """`publish` a job that is not the running task's own."""
    if (ending := outbox.current(storage.database)) is not None:
        ending.jobs.append(job)
        return
    caller, chunks = callers.current(), outbox.scope().chunks
    found = instead.get() if job.unique is not None else None
    if job.unique is not None and found is not None:
        is_now = caller is None or not (caller.is_late or caller.guest(storage) is None)
        job.unique = job.unique._replace(answers=is_now)
    if chunks is not None and chunks.place == (caller and caller.place) and not (job.unique and job.unique.answers):
        chunks.add(storage, job)
    elif caller is not None:
        caller.write(storage, lambda there: there.backend.insert(job, soon=_is_soon(storage, job)), [job.id])
    else:
        callers.check_alone(storage)
        storage.backend.insert(job, soon=_is_soon(storage, job))
    if job.duplicate_of is not None and found is not None:
        found.append(job.duplicate_of)


def _hold_on(job_id: str) -> Hold | None:
    """Return the running task's claim of its job; `None` when *job_id* is not the id of that job."""
    task = get_current_task()
    request = task.request if task is not None else None
    if request is None or request.id != job_id or request.called_directly or request.is_eager:
        return None
    return Hold.of_tag((request.properties or {}).get("delivery_tag"))


def _is_soon(storage: Storage, job: Job) -> bool:
    """Whether *job* may be due before the promoters look again by themselves (plus 1 second for unequal clocks)."""
    if job.scheduled_at is None:
        return True
    wait = (job.scheduled_at - datetime.now(timezone.utc)).total_seconds()
    return wait < storage.settings.scheduler_interval + 1.0
