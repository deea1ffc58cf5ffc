"""Why a job does not run, in words and as a value."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone

from sqlalchemy import Connection

from kathikon_celery.job import TERMINAL, WAITING, Job, State
from kathikon_celery.storage import Storage, limit_numbers, nodes, pauses, reading


@dataclass(frozen=True)
class Explanation:
    """Why a job does not run, or how it ended. Its `str` is the text.

    >>> explanation = kathikon.explain(job_id)
    >>> explanation.why
    'paused'

    Arguments:
        why: for programs: ``"paused"``, ``"not_due"``, ``"overdue"``, ``"expired"``, ``"no_consumer"``, ``"limit"``,
            ``"in_line"``, ``"claimed"``, ``"running"``, ``"children"``, or the state in which the job has ended.
        text: for people.
        job: as it was read.
    """

    why: str
    text: str
    job: Job

    def __str__(self) -> str:
        return self.text


def explain(storage: Storage, job: Job) -> Explanation:
    """Return why *job* does not run."""
    with storage.database.read() as connection:
        why, text = _explained(connection, job)
    return Explanation(why, text, job)


def _explained(connection: Connection, job: Job) -> tuple[str, str]:
    if job.state in TERMINAL:
        because = "".join(f", {what}" for what in (job.cause and f"cause {job.cause}", job.last_error) if what)
        return job.state.value, f"it is {job.state} since {_at(job.ended_at)}{because}"
    if job.state in (State.CLAIMED, State.RUNNING):
        holder = nodes.name_of(connection, job.node_id)
        by = f"node {job.node_id} ({holder})" if holder else f"node {job.node_id}, which is gone: a worker will free it"
        marked = f"; it was revoked at {_at(job.revoked_at)}, and will not run again" if job.revoked_at else ""
        if job.state is State.RUNNING:
            return "running", f"it is running on {by} since {_at(job.started_at)}{marked}"
        return "claimed", f"it is held by {by} since {_at(job.claimed_at)}, and waits for a free slot there{marked}"
    if job.state is State.WAITING_FOR_CHILDREN:
        return "children", "its task was replaced by others: it ends when the last of them ends"
    present = reading.present(connection)
    if job.expires_at is not None and job.expires_at <= present:
        return "expired", f"it has expired at {_at(job.expires_at)}: a worker will discard it"
    if job.state in WAITING:
        ahead = (job.available_at - present).total_seconds() if job.available_at else 0.0
        if ahead > 0:
            return "not_due", f"it is due in {ahead:,.1f} s, at {_at(job.available_at)}"
        return "overdue", f"it is due since {_at(job.available_at)}: no live worker promotes jobs"
    for pause in pauses.every(connection):
        if pause.holds(job.queue, job.task):
            return "paused", f"it waits: {pause}"
    if job.queue is None or nodes.without_consumer([job.queue], nodes.consumed(connection)):
        return "no_consumer", f"it waits: no live worker consumes its queue {job.queue!r}"
    if job.state is State.BLOCKED:
        return "limit", _in_line(connection, job)
    before = reading.ready_before(connection, job)
    if not before:
        return "in_line", f"it is the next one of its queue {job.queue!r}, whose workers have no free slot"
    return "in_line", f"it waits in its queue {job.queue!r}: {before} jobs are before it"


def _in_line(connection: Connection, job: Job) -> str:
    use = next((use for use in job.limits if use.key == job.gate), None)
    if use is None:  # a corrupt row
        return f"it waits in the line of the limit {job.gate!r}"
    key = limit_numbers.of_key(connection, use)
    if key.has_room:
        return f"it waits in the line of the limit {use.key!r}: others were let out before it"
    return f"it waits for the limit {use.key!r}: {key}"


def _at(moment: datetime | None) -> str:
    return "an unknown moment" if moment is None else moment.astimezone(timezone.utc).isoformat(" ", "seconds")
