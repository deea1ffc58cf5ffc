"""The columns that change with a job's state: every statement that writes a state is built here.

A `Change` becomes an UPDATE, an `Upsert` an INSERT that may change an existing row. A dialect's verb runs them.

A job becomes

- ``scheduled``, ``retryable`` or ``available`` by `published`, and by `put_back`, `returned` and `promoted`,
- ``blocked`` by `published` and `promoted`, if it has limits, and by `parked`; ``available`` then by `offered`,
- ``claimed`` by `claimed`,
- ``running`` by `started`,
- ``completed``, ``dead``, ``cancelled`` or ``discarded`` by `ended`; if no worker holds it, by `expired`, `revoked` and
  `ended_from_afar`; ``dead`` also by `returned`, if its processes were lost too often,
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
from kathikon_celery.storage.tables import first_fence, jobs, next_fence, one_more, state_in

#: The reason on the row of a job whose process was lost too often.
LOST_TOO_OFTEN = "the process that ran it was lost, as often as max_attempts allows"
#: The reason on the row of a job whose message was acknowledged before its worker was lost: the task may have begun.
LOST_AT_MOST_ONCE = "the worker was lost after its pool had got the task, and acks_late=False forbids to run it again"
#: The reason on the row of a job that waited longer than its `expires`: Celery's own word.
EXPIRED = "expired"
#: The reason on the row of a job that was revoked before it began.
REVOKED = "revoked"

IS_HELD = state_in(HELD)

#: Columns about one run only. They are NULL again when the job waits for another run.
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
    "revoked_at",
)
#: The columns that a result backend writes, each from a parameter ``new_…``.
WRITTEN = {name: bindparam(f"new_{name}", type_=Text()) for name in ("status", "result", "traceback", "meta")}

_END: dict[str, Any] = {"ended_at": now(), "node_id": null()}
#: The columns that change whenever a job enters a state, by the database's clock.
BRINGS: Mapping[State, Mapping[str, Any]] = {
    State.CLAIMED: {
        "claimed_at": now(),
        "fence": next_fence(jobs),
        "attempts": one_more(jobs.c.attempts),
        "waiting_key": null(),  # for good: another job may have the key when this one waits again
    },
    State.RUNNING: {"started_at": now()},
    State.WAITING_FOR_CHILDREN: {"node_id": null()},
    # A job that ends before its start is written keeps started_at NULL; claimed_at is the best estimate then.
    **dict.fromkeys(TERMINAL, _END),
}


def may_become(state: State) -> ColumnElement[bool]:
    """Return the condition that the state machine allows a row to enter *state*."""
    return state_in(sources(state))


def _becomes(state: State, *where: Condition, **more: Any) -> Change:
    """Return the change to *state*, for those of the rows *where* that may enter it."""
    return Change(jobs, {"state": state.value, **BRINGS[state], **more}, (*where, may_become(state)))


# --- published


def _due(later: bool, ready: State) -> dict[str, Any]:
    """Return state and times of a published job. *later*: it has a due time, the parameter ``new_scheduled_at``."""
    if not later:
        return {"scheduled_at": null(), "available_at": now(), "state": ready.value}
    due = bindparam("new_scheduled_at", type_=Instant())
    ahead, state = due > now(), bindparam("new_state", type_=jobs.c.state.type)
    return {
        "scheduled_at": due,
        "available_at": case((ahead, due), else_=now()),
        "state": case((ahead, state), else_=ready.value),
    }


def published(
    brought: Mapping[str, Any], later: bool, own: bool, limited: bool = False, spares_held: bool = False
) -> Upsert:
    """A new row for a job; an existing row with the same id waits again, if it is of another publication.

    Arguments:
        brought: columns of the message -> their parameters.
        later: the job has a due time.
        own: the caller has locked the existing row, which waits again without a condition.
        limited: the job has limits: it waits in a line until there is room.
        spares_held: an existing row that a node holds stays as it is: a second run beside the first would exceed the
            limits, or have the unique key of the first.
    """
    columns = {**brought, **_due(later, State.BLOCKED if limited else State.AVAILABLE)}
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
            **{name: null() for name in (*OF_A_RUN, *(() if limited else ("limits", "line", "gate")))},
            "fence": next_fence(jobs),
            "acked": false(),
            "attempts": case((has_ended, literal_column("0")), else_=jobs.c.attempts),
            "crashes": case((has_ended, literal_column("0")), else_=jobs.c.crashes),
            "inserted_at": case((has_ended, new["inserted_at"]), else_=jobs.c.inserted_at),
        }

    def is_another(new: NewRow) -> ColumnElement[bool]:
        other: ColumnElement[bool] = jobs.c.publication != new["publication"]
        return and_(other, jobs.c.node_id.is_(None)) if spares_held else other

    return Upsert(jobs, (jobs.c.id,), values, changes, None if own else is_another)


def promoted() -> Change:
    """Due rows become ready; those with limits wait in their lines."""
    ready = case((jobs.c.line.is_(None), State.AVAILABLE.value), else_=State.BLOCKED.value)
    return Change(jobs, {"state": ready, "gate": jobs.c.line})


def offered() -> Change:
    """Blocked rows become ready, behind those that are ready: so the keys of a limit take turns."""
    return Change(jobs, {"state": State.AVAILABLE.value, "available_at": now()})


# --- held


def claimed(*where: Condition) -> Change:
    """The node ``by_node`` claims the ready jobs *where*."""
    values = {
        "state": State.CLAIMED.value,
        "node_id": bindparam("by_node", type_=BigInteger()),
        **BRINGS[State.CLAIMED],
    }
    return Change(jobs, values, where)


def parked() -> Change:
    """The held rows, whose tasks have not begun, wait in the line of the limit ``at_gate``."""
    gate = bindparam("at_gate", type_=jobs.c.gate.type)
    values = {
        "state": State.BLOCKED.value,
        "gate": gate,
        # In its own line it is where it was; in the line of a limit of others, behind those that came before.
        "available_at": case((gate == jobs.c.line, jobs.c.inserted_at), else_=jobs.c.available_at),
        "node_id": null(),
        "claimed_at": null(),
        "fence": next_fence(jobs),
        "attempts": jobs.c.attempts - 1,
    }
    return Change(jobs, values, (IS_HELD,))


def started(*where: Condition, **more: Any) -> Change:
    """The rows *where* are running: their worker's pool has accepted them."""
    return _becomes(State.RUNNING, *where, **more)


def returned(*where: Condition, crashed: Any, begun: Any) -> Change:
    """The held rows *where* become ready again; a row that fits *crashed* gets one more crash.

    The claim of a row that does not fit *begun* does not count as an attempt. A crashed job becomes dead if it must not
    run again (``acked``) or has reached ``max_attempts`` crashes. A job that was revoked while a worker held it is
    cancelled: the other workers may not know of it.
    """
    crashes = case((crashed, one_more(jobs.c.crashes)), else_=jobs.c.crashes)
    lost = and_(crashed, or_(jobs.c.acked, crashes >= jobs.c.max_attempts))
    claimed_and_revoked = and_(jobs.c.state == literal_column(f"'{State.CLAIMED.value}'"), jobs.c.status == "REVOKED")
    revoked = or_(jobs.c.revoked_at.is_not(None), claimed_and_revoked)
    ends = or_(lost, revoked)
    why = case((revoked, REVOKED), (jobs.c.acked, LOST_AT_MOST_ONCE), else_=LOST_TOO_OFTEN)
    cause = case(
        (revoked, Cause.REVOKED.value), (jobs.c.acked, Cause.LOST_ONCE.value), else_=Cause.LOST.value
    )  # fmt: skip
    # NULL at an end, so that the lifeline tells chains and chords. Any other status stays, as with any result backend:
    # the next run may read it, for example Celery's ABORTED.
    forgets = or_(ends, func.coalesce(jobs.c.status, "STARTED") == "STARTED")
    values = {
        "state": case((revoked, State.CANCELLED.value), (lost, State.DEAD.value), else_=State.AVAILABLE.value),
        "ended_at": case((ends, now()), else_=null()),
        "reason": case((ends, why), else_=null()),
        "cause": case((ends, cause), else_=null()),
        "crashes": crashes,
        "attempts": case((begun, jobs.c.attempts), else_=jobs.c.attempts - 1),
        "node_id": null(),
        "acked": false(),
        "fence": next_fence(jobs),
        "claimed_at": case((ends, jobs.c.claimed_at), else_=null()),
        "started_at": case((ends, jobs.c.started_at), else_=null()),
        **{name: case((forgets, null()), else_=jobs.c[name]) for name in WRITTEN},
    }
    return Change(jobs, values, (*where, IS_HELD))


#: Celery's states of a task that has ended -> the job's state.
_ENDS = {"SUCCESS": State.COMPLETED, "FAILURE": State.DEAD, "REVOKED": State.CANCELLED}


def replaced(*where: Condition) -> Change:
    """The rows *where*, whose tasks were replaced by others, wait for children.

    If the others have ended already, ``status`` says how, and the job enters the terminal state for that instead.
    """
    open_ = State.WAITING_FOR_CHILDREN
    state = case({word: end.value for word, end in _ENDS.items()}, value=jobs.c.status, else_=open_.value)
    ended_at = case(dict.fromkeys(_ENDS, now()), value=jobs.c.status, else_=null())
    cause = case({"FAILURE": Cause.CHILDREN.value}, value=jobs.c.status, else_=jobs.c.cause)
    waits = _becomes(open_, *where)
    return Change(jobs, {**waits.values, "state": state, "ended_at": ended_at, "cause": cause}, waits.where)


# --- ended


def ended(state: State, *where: Condition, **more: Any) -> Change:
    """The rows *where* enter the terminal *state*."""
    return _becomes(state, *where, **more)


def expired() -> Change:
    """Waiting rows are discarded, because they have expired."""
    why = {"reason": EXPIRED, "cause": Cause.EXPIRED.value}
    return Change(jobs, {"state": State.DISCARDED.value, "status": null(), "ended_at": now(), **why})


def revoked(*where: Condition) -> Change:
    """Open rows *where* are cancelled; those that a worker holds get ``revoked_at``, and do not run again."""
    new = {"state": State.CANCELLED.value, "ended_at": now(), "reason": REVOKED, "cause": Cause.REVOKED.value}
    new |= dict.fromkeys(WRITTEN, null())
    values = {name: case((IS_HELD, jobs.c[name]), else_=value) for name, value in new.items()}
    values["revoked_at"] = case((IS_HELD, now()), else_=jobs.c.revoked_at)
    return Change(jobs, values, (*where, may_become(State.CANCELLED)))


def ended_from_afar(ended: State | None) -> Upsert:
    """A new row for a result that is written without a claim; an existing row gets the result instead.

    An existing row also enters the state *ended*, unless a worker holds it; `None`: the result is progress of a task
    that goes on. A SUCCESS is never overwritten. A job that was completed without a result gets a failure as its
    result, and stays completed: a strategy of its own may acknowledge a task first, and store the failure then.
    Parameters: those of `WRITTEN`, ``of_id``, ``why`` and ``because``.
    """
    becomes = ended or State.COMPLETED
    reason, cause = bindparam("why", type_=Text()), bindparam("because", type_=Text())
    row = dict(
        id=bindparam("of_id", type_=jobs.c.id.type), task="", priority=0, publication=0, fence=first_fence(),
        attempts=0, crashes=0, max_attempts=0, acked=false(), state=becomes.value,
        inserted_at=now(), available_at=now(), ended_at=now(), envelope="{}", body="", reason=reason, cause=cause,
        **WRITTEN,
    )  # fmt: skip

    is_late = and_(jobs.c.state == State.COMPLETED.value, func.coalesce(jobs.c.status, "PENDING") == "PENDING")
    stays = or_(IS_HELD, is_late) if ended is State.DEAD else IS_HELD

    def changes(new: NewRow) -> dict[str, Any]:
        changed: dict[str, Any] = dict(WRITTEN)
        if ended:
            changed["state"] = case((stays, jobs.c.state), else_=ended.value)
            changed["ended_at"] = case((IS_HELD, null()), (stays, jobs.c.ended_at), else_=now())
            changed["reason"] = case((stays, jobs.c.reason), else_=reason)
            changed["cause"] = case((stays, jobs.c.cause), else_=cause)
        if ended is State.DEAD:
            was_replaced = jobs.c.state == State.WAITING_FOR_CHILDREN.value
            changed["cause"] = case((was_replaced, Cause.CHILDREN.value), else_=changed["cause"])
        if ended is State.CANCELLED:  # by another process: leave status NULL, so that the lifeline runs errbacks
            changed["status"] = case((or_(IS_HELD, jobs.c.queue.is_(None)), WRITTEN["status"]), else_=null())
            changed["revoked_at"] = case((IS_HELD, now()), else_=jobs.c.revoked_at)
        return changed

    def is_open(new: NewRow) -> ColumnElement[bool]:
        fits = or_(may_become(becomes), jobs.c.state == becomes.value, stays) if ended else not_(state_in(TERMINAL))
        return and_(func.coalesce(jobs.c.status, "") != "SUCCESS", or_(jobs.c.queue.is_(None), fits))

    return Upsert(jobs, (jobs.c.id,), row, changes, is_open)


# --- by hand


def put_back(job: Job, old: State) -> dict[str, Any]:
    """Return new values by column for a row that `update` changes from the state *old* to the state of *job*."""
    if job.state in BRINGS:
        # Such as RETRY: NULL, so that the lifeline runs the errbacks of a job that did not succeed.
        is_progress = old not in TERMINAL and job.status not in _ENDS
        forgotten = WRITTEN if job.state in (State.CANCELLED, State.DISCARDED) else ("status",)
        progress = dict.fromkeys(forgotten, null()) if is_progress else {}
        return {"state": job.state.value, **BRINGS[job.state], **progress}
    due = job.scheduled_at if job.state in WAITING and job.scheduled_at else now()
    waits: dict[str, Any] = {"available_at": due, "acked": false(), "fence": next_fence(jobs)}
    if old in TERMINAL:  # another job may have its unique key by now
        waits |= {"attempts": 0, "crashes": 0, "waiting_key": null(), "active_key": null()}
    return {"state": job.state.value, **dict.fromkeys(OF_A_RUN, null()), **waits}


def is_so(name: str) -> Any:
    """Return a condition of `returned` as a parameter, one for all rows."""
    return bindparam(name, type_=Boolean())
