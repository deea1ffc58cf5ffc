"""A job, its states, and the transitions between them.

States and rules are Kathikon's. ``publish/envelope.py`` makes a job of a Celery message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from random import getrandbits
from typing import Any, NamedTuple


class State(str, Enum):
    """Where a job stands. The comment at each member says which event leads there. A member is also its text.

    >>> kathikon.job(job_id).state == "dead"
    True
    """

    SCHEDULED = "scheduled"  # published with an eta or a countdown that lies ahead
    AVAILABLE = "available"  # published, promoted, given back or rescued: ready to claim
    BLOCKED = "blocked"  # waits in the line of a limit that has no room
    CLAIMED = "claimed"  # taken by a worker, not started
    RUNNING = "running"  # accepted by the worker's pool
    RETRYABLE = "retryable"  # failed and published again by its task: waits for its backoff
    WAITING_FOR_CHILDREN = "waiting_for_children"  # replaced by others, or the parent of an open batch
    COMPLETED = "completed"  # returned
    DEAD = "dead"  # raised for good, or its process was lost too often: the dead-letter queue
    CANCELLED = "cancelled"  # revoked
    DISCARDED = "discarded"  # rejected or expired: given up for good

    def __str__(self) -> str:
        return self.value


class Cause(str, Enum):
    """Why a job has ended without returning. `Job.reason` says it in words, which no code reads.

    `None`: a caller wrote the job's state, or a version before 0.1 wrote the row. A member is also its text.

    >>> kathikon.jobs("dead", cause=Cause.TIME_LIMIT).count()
    3
    """

    RAISED = "raised"  # the task raised
    TIME_LIMIT = "time_limit"  # the task ran longer than its hard time limit
    LOST = "lost"  # the processes that ran the task were lost, as often as max_attempts allows
    LOST_ONCE = "lost_once"  # the process that ran the task was lost, and acks_late=False forbids a second run
    UNREADABLE = "unreadable"  # no worker can read the row or its message
    UNREGISTERED = "unregistered"  # the worker does not know the task
    REJECTED = "rejected"  # the task raised Celery's Reject, or a consumer rejected the message
    EXPIRED = "expired"  # the job waited longer than its `expires`
    REFUSED = "refused"  # the database cannot store how the task ended
    GIVEN_UP = "given_up"  # discarded by hand
    CHILDREN = "children"  # a job that replaced the task has not succeeded
    REVOKED = "revoked"  # revoked before the task ran, or terminated while the task ran
    DUPLICATE = "duplicate"  # a job with the same unique key was there
    REPLACED = "replaced"  # a newer job with the same unique key has taken its place

    def __str__(self) -> str:
        return self.value


#: States that a job does not leave by itself.
TERMINAL = frozenset({State.COMPLETED, State.DEAD, State.CANCELLED, State.DISCARDED})

#: States in which a worker holds the job.
HELD = frozenset({State.CLAIMED, State.RUNNING})

#: States that wait for a due time.
WAITING = frozenset({State.SCHEDULED, State.RETRYABLE})

_PUBLISHED = {State.SCHEDULED, State.RETRYABLE, State.AVAILABLE, State.BLOCKED}
_GIVEN_UP = {State.CANCELLED, State.DISCARDED}
_ENDED = {State.COMPLETED, State.DEAD, *_GIVEN_UP}

#: The state machine: for each state, the states that may follow. A message published again under the id of a job makes
#: the job wait again, from any state; all other transitions go forward.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.SCHEDULED: frozenset(_PUBLISHED | _GIVEN_UP),
    State.RETRYABLE: frozenset(_PUBLISHED | _GIVEN_UP | {State.DEAD}),
    State.AVAILABLE: frozenset(_PUBLISHED | _GIVEN_UP | {State.CLAIMED, State.DEAD}),
    State.BLOCKED: frozenset(_PUBLISHED | _GIVEN_UP | {State.DEAD}),
    State.CLAIMED: frozenset(_PUBLISHED | _ENDED | {State.RUNNING, State.WAITING_FOR_CHILDREN}),
    State.RUNNING: frozenset(_PUBLISHED | _ENDED | {State.WAITING_FOR_CHILDREN}),
    State.WAITING_FOR_CHILDREN: frozenset(_PUBLISHED | _ENDED),
    State.COMPLETED: frozenset(_PUBLISHED),
    State.CANCELLED: frozenset(_PUBLISHED),
    State.DISCARDED: frozenset(_PUBLISHED),
    State.DEAD: frozenset(_PUBLISHED | {State.DISCARDED}),
}


class TransitionError(ValueError):
    """The state machine does not allow the transition; nothing was changed."""

    def __init__(self, job_id: str, old: State, new: State) -> None:
        allowed = ", ".join(sorted(TRANSITIONS[old])) or "nothing"
        super().__init__(f"job {job_id!r} cannot go from {old} to {new}; from {old} it may go to {allowed}")


def check_transition(job_id: str, old: State, new: State) -> None:
    """Raise `TransitionError` unless *new* may follow *old*."""
    if new not in TRANSITIONS[old]:
        raise TransitionError(job_id, old, new)


def sources(new: State) -> list[State]:
    """Return the states that *new* may follow, for the WHERE of a transition."""
    return [old for old in State if new in TRANSITIONS[old]]


#: Longest reason that is kept with a job, in characters; the traceback has the rest.
LONGEST_REASON = 1000


def in_brief(error: object) -> str:
    """Return *error* as a text of at most `LONGEST_REASON` characters."""
    try:
        text = repr(error) if isinstance(error, BaseException) else str(error)
    except Exception as failure:  # of a class of the application
        text = f"<{type(error).__name__}, which has no text: {type(failure).__name__}>"
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def backoff(attempt: int) -> float:
    """Return the seconds that a job waits after its *attempt*-th failure: Kathikon's ``min(n² × 5, 86400)``."""
    return float(min(attempt * attempt * 5, 86400))


class Hold(NamedTuple):
    """One node's claim of one row. A report under a claim that is over changes nothing.

    The node is part of it, since a server that crashed may give the same fence twice: the server forgets claims that
    were not yet on disk.
    """

    seq: int
    fence: int
    node_id: int | None

    @property
    def tag(self) -> str:
        """The delivery tag of the job: all that a pool child needs to write the result."""
        return f"job.{self.seq}.{self.fence}.{self.node_id}"

    @classmethod
    def of_tag(cls, tag: object) -> Hold | None:
        """Return the claim in a job's delivery tag; `None` for any other tag."""
        kind, *numbers = str(tag).split(".")
        if kind != "job" or len(numbers) != 3 or not all(map(str.isdigit, numbers)):
            return None
        return cls(*map(int, numbers))


class Use(NamedTuple):
    """What one run of a job takes of one limit, and that limit's numbers as the sender's code has them.

    The numbers count until a worker has stored those of its own code, or an operator has set others.
    """

    #: The limit for one value of its fields, such as ``account:7``, and the limit, such as ``account:{account_id}``.
    key: str
    name: str
    weight: int = 1
    #: How much weight may run at once; `None`: any.
    concurrency: int | None = None
    #: How much weight may start in `per` seconds; `None`: any.
    rate: int | None = None
    per: float = 1.0
    #: How much of the rate may start at once.
    burst: int = 1


class UniqueKey(NamedTuple):
    """What a job may be the only one with, and what becomes of another one."""

    key: str
    #: How long the job has the key: while it "waiting", "active" (has not ended), or "kept" (is in the table).
    while_: str
    #: Seconds since its publication after which it has the key no longer; `None`: that does not matter.
    within: float | None = None
    #: What a publication does if another job has the key: "return", "raise", "drop" or "replace".
    on_conflict: str = "return"
    #: Whether the publisher can take the id of the other job; otherwise the new job is discarded.
    answers: bool = False


@dataclass(slots=True, kw_only=True)
class Job:
    """One row of ``kathikon_jobs``. Times are aware datetimes in UTC, set by the database's clock.

    >>> job = storage.fetch(result.id)
    >>> job.task, job.state, job.attempts, job.last_error
    ('proj.charge', <State.RETRYABLE: 'retryable'>, 1, "ConnectionError('bank is busy')")
    """

    #: The job's id, which is the task's id.
    id: str
    #: Name of the queue; `None`: the row is only a result, stored for a task that ran elsewhere.
    queue: str | None = "default"
    #: Name of the task.
    task: str = ""
    #: Where the job stands.
    state: State = State.AVAILABLE
    #: Higher runs first.
    priority: int = 0
    #: The Celery message without its body, as JSON: headers, properties, content type and encoding.
    envelope: str = "{}"
    #: The message's body: text as it is, anything else in base64 (``envelope`` says which).
    body: str = ""
    #: Due time; `None` or a past time means now.
    scheduled_at: datetime | None = None
    #: When the job is discarded if it has not begun; `None`: never.
    expires_at: datetime | None = None
    #: Number of lost processes after which the job is dead.
    max_attempts: int = 20
    #: The id of the job with which the workflow began.
    root_id: str | None = None
    #: The id of the job whose task has sent this one.
    parent_id: str | None = None
    #: The id of the group, if the job is one of its members.
    group_id: str | None = None
    #: Random id of this publication: a publication that is repeated after a lost connection happens once.
    publication: int = field(default_factory=lambda: getrandbits(63), compare=False)
    #: Number of the row.
    seq: int = 0
    #: Grows with every claim, return and publication: a report under an old fence changes nothing.
    fence: int = 0
    #: How often the job was claimed to run. A claim that was given back before the task began does not count.
    attempts: int = 0
    #: How often the process that ran it was lost.
    crashes: int = 0
    #: Whether the message was acknowledged before the task ran (``acks_late=False``): it never runs twice.
    acked: bool = False
    #: The process that holds the job, or held it last.
    node_id: int | None = None
    #: When it was published.
    inserted_at: datetime | None = None
    #: When it became ready, or will.
    available_at: datetime | None = None
    #: When it was claimed last.
    claimed_at: datetime | None = None
    #: When its task began last.
    started_at: datetime | None = None
    #: When it ended.
    ended_at: datetime | None = None
    #: Celery's state, as it was stored; `None`: derived from `state`.
    status: str | None = None
    #: The return value or exception as the result backend encoded it.
    result: str | None = None
    #: The traceback of the exception.
    traceback: str | None = None
    #: What else the result backend keeps, encoded as `result` is.
    meta: str | None = None
    #: Why the job is dead, discarded or cancelled, in words.
    reason: str | None = None
    #: Why the job is dead, discarded or cancelled, as a value.
    cause: Cause | None = None
    #: One ``{"at", "attempt", "reason"}`` for each failure.
    errors: list[dict[str, Any]] = field(default_factory=list)
    #: The id of the job of which this one is a copy, made by hand.
    rerun_of: str | None = None
    #: When it was revoked while a worker held it: it does not run again.
    revoked_at: datetime | None = None
    #: What a run of it takes of which limits. It waits in the line of the first one when it is published.
    limits: tuple[Use, ...] = ()
    #: The key of the limit in whose line it waits while it is blocked, or has waited last.
    gate: str | None = None
    #: Of a publication: the key that no other job may have.
    unique: UniqueKey | None = None
    #: Of a publication: the id of the job that has the key, so that this one was not written.
    duplicate_of: str | None = None

    @property
    def hold(self) -> Hold:
        """The claim of its node."""
        return Hold(self.seq, self.fence, self.node_id)

    def _ended_as(self, state: State) -> datetime | None:
        return self.ended_at if self.state is state else None

    @property
    def completed_at(self) -> datetime | None:
        """When it returned."""
        return self._ended_as(State.COMPLETED)

    @property
    def failed_at(self) -> datetime | None:
        """When it became dead."""
        return self._ended_as(State.DEAD)

    @property
    def cancelled_at(self) -> datetime | None:
        """When it was revoked."""
        return self._ended_as(State.CANCELLED)

    @property
    def discarded_at(self) -> datetime | None:
        """When it was given up."""
        return self._ended_as(State.DISCARDED)

    @property
    def last_error(self) -> str | None:
        """The reason of the newest failure, or else of the job's end."""
        return self.errors[-1]["reason"] if self.errors else self.reason
