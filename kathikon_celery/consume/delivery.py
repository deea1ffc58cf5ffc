"""What was claimed: a job or a message on its way through this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from threading import Lock

from kathikon_celery.job import Cause, Hold, Job, State
from kathikon_celery.storage.messages import Message


class Verdict(Enum):
    """What becomes of a delivery."""

    DONE = auto()  # completed; a message is gone
    BACK = auto()  # ready again, for any node
    UNBEGUN = auto()  # the same, before its task began: its claim does not count as an attempt
    CRASHED = auto()  # ready again, its process was lost
    ENDED = auto()  # dead, cancelled or discarded: see `Outcome.state`
    REPLACED = auto()  # other tasks do its work, and the last of them gets its id
    PASSED_ON = auto()  # published again by its own task: its row waits again
    WRITTEN = auto()  # its end is on the row already


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a delivery ended, for the row."""

    verdict: Verdict
    state: State | None = None
    cause: Cause | None = None
    reason: str = ""
    #: Celery's state, if errbacks, chains and chords know of the end; `None`: see `finish.unreported`.
    status: str | None = None
    traceback: str | None = None
    #: Texts of the result to write, by column.
    written: Mapping[str, str | None] | None = None
    #: The task was acknowledged before it ran: a caller waits for the result, which is stored later.
    result_follows: bool = False


DONE = Outcome(Verdict.DONE)
BEGUN = Outcome(Verdict.DONE, result_follows=True)
BACK = Outcome(Verdict.BACK)
UNBEGUN = Outcome(Verdict.UNBEGUN)
CRASHED = Outcome(Verdict.CRASHED)
REPLACED = Outcome(Verdict.REPLACED)
PASSED_ON = Outcome(Verdict.PASSED_ON)
WRITTEN = Outcome(Verdict.WRITTEN)
#: A task that must not run twice was cut short.
LOST = Outcome(
    Verdict.ENDED,
    State.DEAD,
    Cause.LOST_ONCE,
    "the process that ran the task ended before the task did, and acks_late=False forbids to run it again",
)


@dataclass(slots=True, eq=False)
class Delivery:
    """One claimed row.

    Threads: there is no lock of its own, as each attribute has one writer at a time. The intake's thread writes all of
    them before the delivery is handed out. Then the worker's threads, which handle the request and the pool's messages,
    write `accepted`, `stored` and `outcome`, until they report the end; the intake's thread writes `marked` and
    `running`. After the report only the intake's thread reads them.
    """

    item: Job | Message
    #: Key of the queue it came from.
    queue: str
    #: Monotonic time of the claim's commit.
    claimed: float
    #: The message is acknowledged before the task runs.
    early: bool = False
    #: The start of an `early` task is on disk: the job may be handed to the pool.
    marked: bool = False
    #: Monotonic time at which the pool accepted it.
    accepted: float | None = None
    #: The request of an `early` task does not say that the pool accepted it: it counts as accepted when handed out.
    is_silent: bool = False
    #: The row says that it runs.
    running: bool = False
    #: Celery stores result and state, and reports a row that has moved on: the intake need not warn again.
    stored: bool = False
    #: The task has a `Strategy` of its own, which keeps the delivery: it needs no slot until it goes to the pool.
    is_kept: bool = False
    #: Jobs wait behind this one: its result is written in the worker's batch, not in a transaction of its own.
    carried: bool = False
    #: Taken once and never released: by what runs the task, or by what gives the delivery back before the task begins.
    #: `None` if the consumer does not ask before it runs the task.
    decision: Lock | None = None
    #: How the delivery has ended if the consumer acknowledges it; the worker's request changes this.
    outcome: Outcome = DONE
    is_job: bool = field(init=False)
    #: The delivery tag: see `Hold.tag`.
    tag: str = field(init=False)

    def __post_init__(self) -> None:
        item = self.item
        self.is_job = isinstance(item, Job)
        self.tag = item.hold.tag if isinstance(item, Job) else f"message.{item.seq}.{item.fence}.{item.node_id}"

    @property
    def when_left(self) -> Outcome:
        """The end if the consumer stops: given back, unless the task has begun and must not run twice."""
        if self.accepted is None:
            return BACK if self.decision is None else UNBEGUN  # without a decision, nobody says that a task has begun
        return LOST if self.early else BACK

    @property
    def hold(self) -> Hold:
        return self.item.hold
