"""The verbs that change one job: for which states each is, and what it makes of the job."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

from kathikon_celery.job import HELD, TERMINAL, Cause, Job, State
from kathikon_celery.publish.envelope import alone, anew

#: The states of the jobs that each verb is for.
MAY = {
    "cancel": frozenset(State) - TERMINAL,
    "retry": frozenset({State.DEAD, State.CANCELLED, State.DISCARDED, State.RETRYABLE, State.SCHEDULED}),
    "rerun": frozenset(State),
    "discard": frozenset(State) - HELD - {State.COMPLETED, State.CANCELLED, State.DISCARDED},
    "delete": TERMINAL,
}
#: The states that a bulk verb is for if none is asked for.
BY_DEFAULT = {**MAY, "retry": frozenset({State.DEAD})}
#: The reason on the job's row if the operator gives none.
BY_HAND = {"cancel": "cancelled by hand", "discard": "discarded by hand"}
#: What a verb does to a job that allows the verb.
Change = Callable[[Job], None]


class NotAllowed(ValueError):
    """The job does not allow the verb; nothing was changed."""

    def __init__(self, verb: str, job: Job, why: str | None = None) -> None:
        self.job = job
        allowed = ", ".join(state for state in State if state in MAY[verb])
        what = f"is {job.state}" if job.queue is not None else "is only a result, without a message"
        said = why or f"{what}; nothing was done: {verb} is for jobs that are {allowed}"
        super().__init__(f"job {job.id!r} {said}")


def check(verb: str, job: Job) -> None:
    """Raise `NotAllowed` unless *verb* is allowed for *job*."""
    if job.state not in MAY[verb] or (job.queue is None and verb != "delete"):
        raise NotAllowed(verb, job)
    if verb == "retry" and job.cause is Cause.CHILDREN:
        raise NotAllowed(
            verb, job, "was replaced by others, one of which has not succeeded; nothing was done: retry that one"
        )


def checked(verb: str, change: Change) -> Change:
    """Return *change*, which is made only if *verb* is allowed for the job; otherwise it raises `NotAllowed`."""

    def by_hand(job: Job) -> None:
        check(verb, job)
        change(job)

    return by_hand


def cancelled(reason: str) -> Change:
    """Return the change of ``cancel``."""

    def change(job: Job) -> None:
        job.state, job.cause, job.reason = State.CANCELLED, Cause.REVOKED, reason

    return change


def retried(job: Job) -> None:
    """Make *job* ready again: due now, without an expiry, and without Celery's earlier retries."""
    job.state, job.scheduled_at, job.expires_at = State.AVAILABLE, None, None
    job.envelope = anew(job.envelope)


def discarded(reason: str) -> Change:
    """Return the change of ``discard``."""

    def change(job: Job) -> None:
        job.state, job.cause, job.reason = State.DISCARDED, Cause.GIVEN_UP, reason

    return change


def copied() -> Change:
    """Return the change that makes of a job the job that is to be published as its copy, the same one at each call.

    The change raises `NotAllowed` for a message that cannot be read.
    """
    new_id = str(uuid4())

    def change(job: Job) -> None:
        try:
            envelope, body = alone(job.envelope, job.body, new_id)
        except ValueError as error:
            raise NotAllowed("rerun", job, f"cannot run again: {error}") from error
        copy = Job(
            id=new_id,
            queue=job.queue,
            task=job.task,
            priority=job.priority,
            envelope=envelope,
            body=body,
            max_attempts=job.max_attempts,
        )
        for name in Job.__dataclass_fields__:
            setattr(job, name, getattr(copy, name))

    return change


def unchanged(job: Job) -> None:
    """Change nothing: the change of ``delete``."""
