"""What each state of a job brings with it: every change that writes a state is made here.

A `Change` says what rows become, and an `Upsert` what a row is that may be there; a dialect's verb makes statements of
them and runs those.

A job becomes

- ``scheduled``, ``retryable`` or ``available`` by `published`, and by `put_back`, `returned` and `promoted`,
- ``claimed`` by `claimed`,
- ``running`` by `started`,
- ``completed``, ``dead``, ``cancelled`` or ``discarded`` by `ended`, and where nobody holds it by `expired` and
  `ended_from_afar`; ``dead`` as well by `returned`, when its processes were lost too often,
- ``waiting_for_children`` by `replaced`.

`TRANSITIONS` in job.py says which state may follow which; `may_become` is that table as a condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Text,
    and_,
    bindparam,
    case,
    false,
    func,
    literal_column,
    not_,
    null,
    or_,
)
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.job import HELD, TERMINAL, WAITING, Cause, Job, State, sources
from kathikon_celery.storage.clock import Instant, now
from kathikon_celery.storage.dialects.parameters import Change, Condition, NewRow, Upsert
from kathikon_celery.storage.tables import first_fence, jobs, state_in

#: The reason on the row of a job whose process was lost too often.
LOST_TOO_OFTEN = "the process that ran it was lost, as often as max_attempts allows"
#: The reason on the row of a job whose message was acknowledged before its process was lost.
LOST_AT_MOST_ONCE = "the worker was lost while the task ran, and acks_late=False forbids to run it again"
#: The reason on the row of a job that waited longer than its `expires`, in Celery's word.
EXPIRED = "expired"

IS_HELD = state_in(HELD)

#: Columns that tell of one run only.
OF_A_RUN = (
    "node_id",
    "claimed_at",
    "started_at",
    "ended_at",
    "status",
    "result",
    "traceback",
    "meta",
    "reason",
    "cause",
)
#: The columns that a result backend writes, each by a parameter ``new_…``.
WRITTEN = {name: bindparam(f"new_{name}", type_=Text()) for name in ("status", "result", "traceback", "meta")}

_END: dict[str, Any] = {"ended_at": now(), "node_id": null()}
#: The columns that change whenever a job enters a state, by the database's clock.
BRINGS: Mapping[State, Mapping[str, Any]] = {
    State.CLAIMED: {"claimed_at": now(), "fence": jobs.c.fence + 1, "attempts": jobs.c.attempts + 1},
    State.RUNNING: {"started_at": now()},
    State.WAITING_FOR_CHILDREN: {"node_id": null()},
    # A job that ended before its start was written started when it was claimed, as far as we know.
    **dict.fromkeys(TERMINAL, _END),
}


def may_become(state: State) -> ColumnElement[bool]:
    """The condition that the state machine allows a row to become *state*."""
    return state_in(sources(state))


def _becomes(state: State, *where: Condition, **more: Any) -> Change:
    """The change by which the rows *where* that may, become *state*."""
    return Change(jobs, {"state": state.value, **BRINGS[state], **more}, (*where, may_become(state)))


# --- published


def _due(later: bool) -> dict[str, Any]:
    """State and times of a message; *later*: it has a due time, the parameter ``new_scheduled_at``."""
    if not later:
        return {"scheduled_at": null(), "available_at": now(), "state": State.AVAILABLE.value}
    due = bindparam("new_scheduled_at", type_=Instant())
    ahead, state = due > now(), bindparam("new_state", type_=jobs.c.state.type)
    return {
        "scheduled_at": due,
        "available_at": case((ahead, due), else_=now()),
        "state": case((ahead, state), else_=State.AVAILABLE.value),
    }


def published(brought: Mapping[str, Any], later: bool, own: bool, again: bool) -> Upsert:
    """The row of a job; one of the same id waits again.

    Arguments:
        brought: the columns that the message brings, and their parameters.
        later: it has a due time.
        own: it is known that the job holds still for it.
        again: it may have been committed before.
    """
    columns = {**brought, **_due(later)}
    values = {
        "id": bindparam("new_id", type_=jobs.c.id.type),
        "fence": first_fence(),
        "attempts": 0,
        "crashes": 0,
        "acked": false(),
        "inserted_at": now(),
        **columns,
    }
    has_ended = state_in(TERMINAL)

    def changes(new: NewRow) -> dict[str, Any]:
        return {
            **{name: new[name] for name in columns},
            **{name: null() for name in OF_A_RUN},
            "fence": jobs.c.fence + 1,
            "acked": false(),
            "attempts": case((has_ended, literal_column("0")), else_=jobs.c.attempts),
            "crashes": case((has_ended, literal_column("0")), else_=jobs.c.crashes),
            "inserted_at": case((has_ended, new["inserted_at"]), else_=jobs.c.inserted_at),
        }

    def is_another(new: NewRow) -> ColumnElement[bool]:
        other: ColumnElement[bool] = jobs.c.publication != new["publication"]
        return other if again else or_(other, has_ended)

    return Upsert(jobs, (jobs.c.id,), values, changes, None if own else is_another)


def promoted() -> Change:
    """Due rows become ready."""
    return Change(jobs, {"state": State.AVAILABLE.value})


# --- held


def claimed(*where: Condition) -> Change:
    """The rows of ready jobs *where*, taken by the node ``by_node``."""
    values = {
        "state": State.CLAIMED.value,
        "node_id": bindparam("by_node", type_=BigInteger()),
        "status": null(),  # a new run, of which nothing is known yet
        **BRINGS[State.CLAIMED],
    }
    return Change(jobs, values, where)


def started(*where: Condition, **more: Any) -> Change:
    """The rows *where*, accepted by their worker's pool."""
    return _becomes(State.RUNNING, *where, **more)


def returned(*where: Condition, crashed: Any) -> Change:
    """The held rows *where*, ready again; where *crashed* holds, a crash more is on their account.

    It makes those dead that must not run again, or have lost their process too often.
    """
    crashes = jobs.c.crashes + case((crashed, 1), else_=0)
    lost = and_(crashed, or_(jobs.c.acked, crashes >= jobs.c.max_attempts))
    why = case((jobs.c.acked, LOST_AT_MOST_ONCE), else_=LOST_TOO_OFTEN)
    cause = case((jobs.c.acked, Cause.LOST_ONCE.value), else_=Cause.LOST.value)
    values = {
        "state": case((lost, State.DEAD.value), else_=State.AVAILABLE.value),
        "ended_at": case((lost, now()), else_=null()),
        "reason": case((lost, why), else_=null()),
        "cause": case((lost, cause), else_=null()),
        "crashes": crashes,
        "node_id": null(),
        "acked": false(),
        "fence": jobs.c.fence + 1,
        "claimed_at": case((lost, jobs.c.claimed_at), else_=null()),
        "started_at": case((lost, jobs.c.started_at), else_=null()),
        **dict.fromkeys(WRITTEN, null()),
    }
    return Change(jobs, values, (*where, IS_HELD))


def replaced(*where: Condition) -> Change:
    """The rows *where*, whose tasks have handed their work to others, which may have ended already.

    With those the job has ended as well: its state was left for this report.
    """
    ends = {"SUCCESS": State.COMPLETED, "FAILURE": State.DEAD, "REVOKED": State.CANCELLED}
    open_ = State.WAITING_FOR_CHILDREN
    state = case({word: end.value for word, end in ends.items()}, value=jobs.c.status, else_=open_.value)
    ended_at = case(dict.fromkeys(ends, now()), value=jobs.c.status, else_=null())
    waits = _becomes(open_, *where)
    return Change(jobs, {**waits.values, "state": state, "ended_at": ended_at}, waits.where)


# --- ended


def ended(state: State, *where: Condition, **more: Any) -> Change:
    """The rows *where*, ended in the terminal *state*."""
    return _becomes(state, *where, **more)


def expired() -> Change:
    """Rows that wait are given up."""
    why = {"reason": EXPIRED, "cause": Cause.EXPIRED.value}
    return Change(jobs, {"state": State.DISCARDED.value, "status": null(), "ended_at": now(), **why})


def ended_from_afar(ended: State | None) -> Upsert:
    """The row of a result of whoever ran it; a row that is there *ended* so, unless a worker holds it.

    ``None`` for *ended*: it is news of a task that goes on. A success is never written over. The parameters are those
    of `WRITTEN`, ``of_id``, ``why`` and ``because``.
    """
    becomes = ended or State.COMPLETED
    reason, cause = bindparam("why", type_=Text()), bindparam("because", type_=Text())
    row = dict(
        id=bindparam("of_id", type_=jobs.c.id.type), task="", priority=0, publication=0, fence=first_fence(),
        attempts=0, crashes=0, max_attempts=0, acked=false(), state=becomes.value,
        inserted_at=now(), available_at=now(), ended_at=now(), envelope="{}", body="", reason=reason, cause=cause,
        **WRITTEN,
    )  # fmt: skip

    def changes(new: NewRow) -> dict[str, Any]:
        changed: dict[str, Any] = dict(WRITTEN)
        if ended:
            changed["state"] = case((IS_HELD, jobs.c.state), else_=ended.value)
            changed["ended_at"] = case((IS_HELD, null()), else_=now())
            changed["reason"] = case((IS_HELD, jobs.c.reason), else_=reason)
            changed["cause"] = case((IS_HELD, jobs.c.cause), else_=cause)
        if ended is State.CANCELLED:  # by another process, which does not know what was to follow: the lifeline tells
            changed["status"] = case((or_(IS_HELD, jobs.c.queue.is_(None)), WRITTEN["status"]), else_=null())
        return changed

    def is_open(new: NewRow) -> ColumnElement[bool]:
        fits = or_(may_become(becomes), jobs.c.state == becomes.value) if ended else not_(state_in(TERMINAL))
        return and_(func.coalesce(jobs.c.status, "") != "SUCCESS", or_(jobs.c.queue.is_(None), fits))

    return Upsert(jobs, (jobs.c.id,), row, changes, is_open)


# --- by hand


def put_back(job: Job, old: State) -> dict[str, Any]:
    """What changes on a row that is written back by hand as *job*, whose state was *old*."""
    if job.state in BRINGS:
        return {"state": job.state.value, **BRINGS[job.state]}
    due = job.scheduled_at if job.state in WAITING and job.scheduled_at else now()
    waits: dict[str, Any] = {"available_at": due, "acked": false(), "fence": jobs.c.fence + 1}
    if old in TERMINAL:
        waits |= {"attempts": 0, "crashes": 0}
    return {"state": job.state.value, **dict.fromkeys(OF_A_RUN, null()), **waits}


def has_crashed() -> Any:
    """The parameter of `returned` that says it of all rows."""
    return bindparam("has_crashed", type_=Boolean())
