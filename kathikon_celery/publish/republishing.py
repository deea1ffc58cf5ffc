"""A task that publishes its own id again (a retry, ``self.replace``) may do so only while the job is its own."""

from __future__ import annotations

import logging
from datetime import datetime, timezone

from celery._state import get_current_task

from kathikon_celery.job import Hold, Job
from kathikon_celery.publish import outbox

logger = logging.getLogger(__name__)


def hold_on(job_id: str) -> Hold | None:
    """How the task that runs in this context holds *job_id*; `None` when it publishes another id."""
    task = get_current_task()
    request = task.request if task is not None else None
    if request is None or request.id != job_id or request.called_directly or request.is_eager:
        return None
    return Hold.of_tag((request.properties or {}).get("delivery_tag"))


def refused(job_id: str) -> None:
    """Say that the publication was refused: the job is somebody else's now, or cancelled."""
    outbox.change(refused=job_id)
    logger.warning("Kathikon: job %s was cancelled or given to another worker; its retry from here was ignored", job_id)


def is_soon(job: Job, interval: float) -> bool:
    """Whether the job may be due before the promoters look again by themselves (with a second for unequal clocks)."""
    if job.scheduled_at is None:
        return True
    return (job.scheduled_at - datetime.now(timezone.utc)).total_seconds() < interval + 1.0
