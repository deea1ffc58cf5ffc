"""What each state of a job brings with it: every statement that writes a state is made here.

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
    update,
)
from sqlalchemy.sql.dml import Update
from sqlalchemy.sql.expression import ColumnElement, TextClause

from kathikon_celery.job import HELD, TERMINAL, WAITING, Cause, Job, State, sources
from kathikon_celery.storage.clock import Instant, now
from kathikon_celery.storage.dialects import Dialect
from kathikon_celery.storage.tables import jobs, state_in

#: The reason on the row of a job whose process was lost too often.
LOST_TOO_OFTEN = "the process that ran it was lost, as often as max_attempts allows"
#: The reason on the row of a job whose message was acknowledged before its process was lost.
LOST_AT_MOST_ONCE = "the worker was lost while the task ran, and acks_late=False forbids to run it again"
#: The reason on the row of a job that waited longer than its `expires`, in Celery's word.
EXPIRED = "expired"

#: What a WHERE takes.
_Condition = ColumnElement[bool] | TextClause

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


def _becomes(state: State, *where: _Condition, **more: Any) -> Update:
    """The UPDATE by which the rows *where* that may, become *state*."""
    values = {"state": state.value, **BRINGS[state], **more}
    return update(jobs).where(*where, may_become(state)).values(values)


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


def published(dialect: Dialect, brought: Mapping[str, Any], later: bool, own: bool, again: bool) -> Any:
    """The INSERT of a job, which makes a row of the same id wait again.

    Arguments:
        brought: the columns that the message brings, and their parameters.
        later: it has a due time.
        own: it is known that the job holds still for it.
        again: it may have been committed before.
    """
    columns = {**brought, **_due(later)}
    insert = dialect.insert_or_update(jobs).values(
        id=bindparam("new_id", type_=jobs.c.id.type),
        fence=dialect.first_fence,
        attempts=0,
        crashes=0,
        acked=false(),
        inserted_at=now(),
        **columns,
    )
    new, has_ended = insert.excluded, state_in(TERMINAL)
    changes: dict[str, Any] = {name: new[name] for name in columns}
    changes |= {name: null() for name in OF_A_RUN}
    changes |= {
        "fence": jobs.c.fence + 1,
        "acked": false(),
        "attempts": case((has_ended, literal_column("0")), else_=jobs.c.attempts),
        "crashes": case((has_ended, literal_column("0")), else_=jobs.c.crashes),
        "inserted_at": case((has_ended, new.inserted_at), else_=jobs.c.inserted_at),
    }
    other = jobs.c.publication != new.publication
    condition = None if own else other if again else or_(other, has_ended)
    return insert.on_conflict_do_update(index_elements=[jobs.c.id], set_=changes, where=condition)


def promoted(picked: ColumnElement[bool]) -> Update:
    """The UPDATE by which the due rows that are *picked* become ready."""
    return update(jobs).where(picked).values(state=State.AVAILABLE.value)


# --- held


def claimed(rows: Update) -> Update:
    """*rows* of ready jobs, taken by the node ``by_node``."""
    return rows.values(
        state=State.CLAIMED.value,
        node_id=bindparam("by_node", type_=BigInteger()),
        status=null(),  # a new run, of which nothing is known yet
        **BRINGS[State.CLAIMED],
    )


def started(*where: _Condition, **more: Any) -> Update:
    """The rows *where*, accepted by their worker's pool."""
    return _becomes(State.RUNNING, *where, **more)


def returned(*where: _Condition, crashed: Any) -> Update:
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
    return update(jobs).where(*where, IS_HELD).values(values)


def replaced(*where: _Condition) -> Update:
    """The rows *where*, whose tasks have handed their work to others, which may have ended already.

    With those the job has ended as well: its state was left for this report.
    """
    ends = {"SUCCESS": State.COMPLETED, "FAILURE": State.DEAD, "REVOKED": State.CANCELLED}
    open_ = State.WAITING_FOR_CHILDREN
    state = case({word: end.value for word, end in ends.items()}, value=jobs.c.status, else_=open_.value)
    ended_at = case(dict.fromkeys(ends, now()), value=jobs.c.status, else_=null())
    return _becomes(open_, *where).values(state=state, ended_at=ended_at)


# --- ended


def ended(state: State, *where: _Condition, **more: Any) -> Update:
    """The rows *where*, ended in the terminal *state*."""
    return _becomes(state, *where, **more)


def expired(picked: ColumnElement[bool]) -> Update:
    """The rows that are *picked* and wait, given up."""
    why = {"reason": EXPIRED, "cause": Cause.EXPIRED.value}
    return update(jobs).where(picked).values(state=State.DISCARDED.value, status=null(), ended_at=now(), **why)


def ended_from_afar(
    dialect: Dialect,
    task_id: str,
    ended: State | None,
    reason: str | None,
    cause: Cause | None,
    written: Mapping[str, str | None],
) -> Any:
    """The INSERT of a result of whoever ran it; a row that is there *ended* so, unless a worker holds it.

    ``None`` for *ended*: it is news of a task that goes on. A success is never written over.
    """
    becomes, because = ended or State.COMPLETED, cause.value if cause else None
    row = dict(
        id=task_id, task="", priority=0, publication=0, fence=dialect.first_fence,
        attempts=0, crashes=0, max_attempts=0, acked=false(), state=becomes.value,
        inserted_at=now(), available_at=now(), ended_at=now(), envelope="{}", body="", reason=reason, cause=because,
        **written,
    )  # fmt: skip
    changes: dict[str, Any] = dict(written)
    if ended:
        changes["state"] = case((IS_HELD, jobs.c.state), else_=ended.value)
        changes["ended_at"] = case((IS_HELD, null()), else_=now())
        changes["reason"] = case((IS_HELD, jobs.c.reason), else_=reason)
        changes["cause"] = case((IS_HELD, jobs.c.cause), else_=because)
    if ended is State.CANCELLED:  # by another process, which does not know what was to follow: the lifeline tells that
        changes["status"] = case((or_(IS_HELD, jobs.c.queue.is_(None)), written["status"]), else_=null())
    fits = or_(may_become(becomes), jobs.c.state == becomes.value) if ended else not_(state_in(TERMINAL))
    return (
        dialect.insert_or_update(jobs)
        .values(row)
        .on_conflict_do_update(
            index_elements=[jobs.c.id],
            set_=changes,
            where=and_(func.coalesce(jobs.c.status, "") != "SUCCESS", or_(jobs.c.queue.is_(None), fits)),
        )
    )


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
