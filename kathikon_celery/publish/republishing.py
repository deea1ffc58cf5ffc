"""A task that publishes its own id again (a retry, ``self.replace``) may do so only while the job is its own."""

from __future__ import annotations

import logging
from datetime import datetime, timezone

from celery._state import get_current_task

from kathikon_celery.job import Hold, Job
from kathikon_celery.publish import outbox

logger = logging.getLogger(__name__)


def hold_on(job_id: str) -> Hold | None:
    """Return the running task's claim of its job; `None` when *job_id* is not the id of that job."""
    task = get_current_task()
    request = task.request if task is not None else None
    if request is None or request.id != job_id or request.called_directly or request.is_eager:
        return None
    return Hold.of_tag((request.properties or {}).get("delivery_tag"))


def refused(job_id: str) -> None:
    """Log, and note in this context, that the job was given to another worker or cancelled: its retry is ignored."""
    outbox.change(refused=job_id)
    logger.warning("Kathikon: job %s was cancelled or given to another worker; its retry from here was ignored", job_id)


def is_soon(job: Job, interval: float) -> bool:
    """Whether the job may be due before the promoters' next look, in *interval* seconds (plus 1 for unequal clocks)."""
    if job.scheduled_at is None:
        return True
    return (job.scheduled_at - datetime.now(timezone.utc)).total_seconds() < interval + 1.0
