"""Where a published job goes: into its row at once, with the end of the task that sends it, or into an open `bulk`."""

from __future__ import annotations

from kathikon_celery.job import Job
from kathikon_celery.publish import outbox, republishing
from kathikon_celery.storage import Storage


def publish(storage: Storage, job: Job) -> None:
    """Publish *job*. It is on disk when this returns, unless it is collected for a task's end or a `bulk`."""
    hold = republishing.hold_on(job.id)
    if hold is None:
        publish_new(storage, job)
    elif not storage.backend.insert(job, hold, soon=_is_soon(storage, job)):
        republishing.refused(job.id)


def publish_new(storage: Storage, job: Job) -> None:
    """`publish` a job that is not the running task's own."""
    if (ending := outbox.current(storage.database)) is not None:
        ending.jobs.append(job)
    elif (chunks := outbox.scope().chunks) is not None:
        chunks.add(storage, job)
    else:
        storage.backend.insert(job, soon=_is_soon(storage, job))


def _is_soon(storage: Storage, job: Job) -> bool:
    return job.scheduled_at is None or republishing.is_soon(job, storage.settings.scheduler_interval)
