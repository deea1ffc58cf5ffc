"""Results: what a task returned or raised, on its job's own row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from sqlalchemy import Connection, Text, bindparam, case, delete, null, select, update

from kathikon_celery.job import TERMINAL, Cause, Hold, State
from kathikon_celery.storage import result_listeners, transitions
from kathikon_celery.storage.clock import now
from kathikon_celery.storage.dialects.parameters import Change, Upsert
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.finish import add_error
from kathikon_celery.storage.names import key, printable
from kathikon_celery.storage.tables import UNREPORTED, groups, held_as, jobs, of_hold, state_in
from kathikon_celery.storage.transitions import WRITTEN, may_become

#: UPDATE for a task's own `update_state()`: the row's state does not change.
_NOTED = Change(jobs, WRITTEN, (held_as(jobs), may_become(State.COMPLETED)))
_WHY = {"reason": bindparam("why", type_=Text()), "cause": bindparam("because", type_=Text())}
_ENDED = {
    state: transitions.ended(state, held_as(jobs), **WRITTEN, **_WHY)
    for state in (State.COMPLETED, State.DEAD, State.CANCELLED, State.DISCARDED)
}
_STARTED = transitions.started(held_as(jobs)).of()
_RETURNED = transitions.ended(State.COMPLETED)
_RETRIED = update(jobs).where(jobs.c.seq == bindparam("of_seq"), jobs.c.fence == bindparam("of_fence")).values(WRITTEN)


def store(
    database: Database,
    hold: Hold,
    state: State | None,
    *,
    status: str,
    result: str | None,
    traceback: str | None,
    meta: str | None,
    reason: str | None = None,
    cause: Cause | None = None,
) -> bool:
    """Write status and result of the run that holds the job under *hold*; return false if the job has moved on.

    If *state* is running or terminal, the job enters that state in the same transaction.
    """
    texts = {"status": status, "result": result, "traceback": traceback, "meta": meta}

    def write(again: bool) -> bool:
        with database.write() as connection:
            if state in _ENDED:
                return end(database, connection, hold, state, **texts, reason=reason, cause=cause) or again
            if state is State.RUNNING and prepared.count(connection, _STARTED, of_hold(hold)):
                database.events.changed(connection, seqs=[hold.seq])
            values = {**of_hold(hold), **_new(texts)}
            is_ready = status in result_listeners.READY_WORDS
            return database.dialect.change_and_tell(connection, _NOTED, values, is_ready) > 0 or again

    return database.patiently(write)


def _new(texts: Mapping[str, str | None]) -> dict[str, str | None]:
    return {f"new_{name}": printable(text) for name, text in texts.items()}


def end(
    database: Database,
    connection: Connection,
    hold: Hold,
    state: State,
    *,
    reason: str | None,
    cause: Cause | None,
    **written: str | None,
) -> bool:
    """Write the end of the run that holds the job under *hold*; return false if the job has moved on."""
    values = {**of_hold(hold), **_new(written), "why": printable(reason), "because": cause.value if cause else None}
    which = database.events.which()
    if not database.dialect.change_and_tell(connection, _ENDED[state], values, True, which=which):
        return False
    database.events.entered(connection, which, state, cause)
    if state is State.DEAD:
        add_error(connection, hold.seq, reason or str(written["status"]), hold.fence)
    return True


def end_many(database: Database, connection: Connection, ends: Mapping[Hold, Mapping[str, str | None]]) -> int:
    """Complete the jobs held under *ends*, which maps claims to texts by column; return the number still held so."""
    texts = {hold: {name: printable(text) for name, text in written.items()} for hold, written in ends.items()}
    which = database.events.which()
    number = database.dialect.end_held(connection, _RETURNED, texts, which=which)
    database.events.entered(connection, which, State.COMPLETED)
    return number


def store_retry(database: Database, hold: Hold, *, reason: str, **written: str | None) -> None:
    """Write the failure because of which the run under *hold* has published its job again."""
    values = {"of_seq": hold.seq, "of_fence": hold.fence + 1}
    new = _new({"status": "RETRY", **written})

    def write(again: bool) -> None:
        with database.write() as connection:
            add_error(connection, hold.seq, reason, hold.fence)
            connection.execute(_RETRIED, {**values, **new})

    database.patiently(write)


_TOLD = Change(jobs, WRITTEN, (jobs.c.id == bindparam("job_id"), UNREPORTED))


def tell(database: Database, connection: Connection, task_id: str, **written: str | None) -> bool:
    """Write the result of an unreported job (`finish.unreported`); return false if it is reported already."""
    values = {"job_id": key(task_id), **_new(written)}
    return database.dialect.change_and_tell(connection, _TOLD, values, True) > 0


@lru_cache(maxsize=8)
def _alone(ended: State | None) -> Upsert:
    return transitions.ended_from_afar(ended)


def store_alone(
    database: Database,
    task_id: str,
    state: State | None,
    *,
    reason: str | None = None,
    cause: Cause | None = None,
    **written: str | None,
) -> None:
    """Write a result by the task's id, without a claim; if there is no job, insert a row for the result alone.

    A job that a worker holds keeps its state, which the worker reports. A SUCCESS is never overwritten.
    """

    def write(again: bool) -> None:
        with database.once() as connection:
            end_alone(database, connection, task_id, state, reason, cause, **written)

    database.patiently(write)


def end_alone(
    database: Database,
    connection: Connection,
    task_id: str,
    state: State | None,
    reason: str | None,
    cause: Cause | None,
    **written: str | None,
) -> bool:
    """Do what `store_alone` does as a part of a transaction; return false if the job has ended otherwise."""
    ended = state if state in _ENDED else None
    why = {"why": printable(reason), "because": cause.value if cause else None}
    values = {"of_id": key(task_id), **why, **_new(written)}
    which = database.events.which()
    number = database.dialect.change_and_tell(connection, _alone(ended), values, ended is not None, which=which)
    if ended is not None:
        database.events.changed(connection, ids=[job.id for job in which or ()])
    return number > 0


#: The status of an ended job whose result was forgotten, or is still to come: with NULL, its end might be reported
#: once more.
FORGOTTEN = "PENDING"
_AWAITED = update(jobs).where(
    jobs.c.seq == bindparam("of_seq"),
    jobs.c.fence == bindparam("of_fence"),
    jobs.c.state == State.COMPLETED.value,
    jobs.c.status.is_(None),
)
_AWAITED = _AWAITED.values(status=FORGOTTEN)
_FORGET = update(jobs).where(jobs.c.id == bindparam("job_id"))
_FORGET = _FORGET.values(
    status=case((UNREPORTED, null()), (state_in(TERMINAL), FORGOTTEN), else_=null()),
    result=null(),
    traceback=null(),
    meta=null(),
)
_FORGET_ALONE = delete(jobs).where(jobs.c.id == bindparam("job_id"), jobs.c.queue.is_(None))


def forget(database: Database, task_id: str) -> None:
    """Delete the result; the job stays until it is pruned."""
    with database.write() as connection:
        connection.execute(_FORGET_ALONE, {"job_id": key(task_id)})
        connection.execute(_FORGET, {"job_id": key(task_id)})


def await_results(connection: Connection, holds: Sequence[Hold]) -> None:
    """Note that the results of the completed jobs of *holds* are still to come, unless they are stored already."""
    connection.execute(_AWAITED, [{"of_seq": hold.seq, "of_fence": hold.fence} for hold in holds])


_MEMBERS = bindparam("members", type_=Text())
_SAVED = Upsert(
    groups,
    (groups.c.id,),
    {"id": bindparam("group"), "result": _MEMBERS, "inserted_at": now()},
    lambda new: {"result": _MEMBERS},
)


def save_group(database: Database, group_id: str, result: str) -> None:
    """Save the members of a group, encoded in *result*, under its id."""
    with database.once() as connection:
        database.dialect.upsert(connection, _SAVED, {"group": key(group_id), "members": result})


def restore_group(database: Database, group_id: str) -> str | None:
    """Return the saved members, encoded, or `None`."""
    with database.read() as connection:
        return connection.execute(select(groups.c.result).where(groups.c.id == key(group_id))).scalar()


def delete_group(database: Database, group_id: str) -> None:
    """Delete the saved group."""
    with database.once() as connection:
        connection.execute(delete(groups).where(groups.c.id == key(group_id)))
