"""What operators did, and the history of jobs: written in the transaction that changes the job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from random import getrandbits
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, exists, insert, select, tuple_, update

from kathikon_celery.job import TERMINAL, Job
from kathikon_celery.storage.clock import now
from kathikon_celery.storage.names import key, printable
from kathikon_celery.storage.tables import acts, history, jobs


@dataclass(kw_only=True)
class Act:
    """One call of a verb by an operator. Times are aware datetimes, by the database's clock.

    >>> act = kathikon.acts()[0]
    >>> act.operator, act.verb, act.changed
    ('ada@desk', 'retry', 12)

    Arguments:
        verb: such as ``"retry"``.
        target: the job's id, the selection as JSON, or what was paused.
        operator: who.
        reason: why.
        chosen: how many jobs there were to change, if they were counted.
        changed: how many were changed so far.
        began_at: when the act began.
        ended_at: `None`: the act goes on, or was interrupted.
        id: a random number.
    """

    verb: str
    target: str
    operator: str
    reason: str | None = None
    chosen: int | None = None
    changed: int = 0
    began_at: datetime | None = None
    ended_at: datetime | None = None
    id: int = field(default_factory=lambda: getrandbits(63))


@dataclass(frozen=True)
class Event:
    """One moment of a job's life.

    >>> for event in kathikon.history(job_id):
    ...     print(event.at, event.event, event.operator, event.text)

    Arguments:
        at: when, as an aware datetime.
        event: ``"published"``, ``"failed"``, ``"rescued"``, a verb such as ``"retry"``, or the state that was entered.
        text: for people.
        operator: who did it, for a verb.
        traceback: of a failure, if it was kept.
    """

    at: datetime
    event: str
    text: str | None = None
    operator: str | None = None
    traceback: str | None = None


_BEGUN = insert(acts)


def begin(connection: Connection, act: Act, is_whole: bool = False) -> None:
    """Write *act*; *is_whole*: it ends with this transaction."""
    values = {"id": act.id, "verb": act.verb, "target": printable(act.target), "operator": printable(act.operator)}
    values |= {"reason": printable(act.reason), "chosen": act.chosen, "changed": act.changed}
    connection.execute(_BEGUN.values(**values, began_at=now(), ended_at=now() if is_whole else None))


def is_known(connection: Connection, act: Act) -> bool:
    """Whether *act* is written."""
    return connection.execute(select(acts.c.id).where(acts.c.id == act.id)).first() is not None


def count(connection: Connection, act: Act, number: int) -> None:
    """Note that *act* has changed *number* more jobs."""
    connection.execute(update(acts).where(acts.c.id == act.id).values(changed=acts.c.changed + number))


def end(connection: Connection, act: Act) -> None:
    """Note that *act* has come to its end."""
    connection.execute(update(acts).where(acts.c.id == act.id).values(ended_at=now()))


def page(connection: Connection, limit: int, before: Act | None = None) -> list[Act]:
    """Return up to *limit* acts, the newest first, from the one behind *before* on."""
    query = select(acts).order_by(acts.c.began_at.desc(), acts.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(tuple_(acts.c.began_at, acts.c.id) < tuple_(before.began_at, before.id))
    return [Act(**row._mapping) for row in connection.execute(query)]


# --- the history of jobs


def note(connection: Connection, job_keys: Iterable[str], event: str, text: str | None, act: Act | None = None) -> None:
    """Add *event* to the history of jobs."""
    common = {"event": event, "text": printable(text), "act": act.id if act else None}
    rows = [{"job": name, **common} for name in job_keys]
    if rows:
        connection.execute(insert(history).values(at=now()), rows)


def why_ended(job: Job) -> str | None:
    """Return cause and reason of the job's end, as one text."""
    return ": ".join(text for text in (job.cause and job.cause.value, job.reason) if text) or None


def note_end(connection: Connection, job: Job) -> None:
    """Keep how *job* has ended, which its row is about to forget."""
    if job.state not in TERMINAL or job.ended_at is None:
        return
    values = {"job": key(job.id), "at": job.ended_at, "event": job.state.value, "text": printable(why_ended(job))}
    connection.execute(insert(history).values(**values, traceback=printable(job.traceback)))


_OF_JOB = select(history).where(history.c.job == bindparam("of_job")).order_by(history.c.seq)
_BY_ID = select(acts).where(acts.c.id.in_(bindparam("ids", expanding=True)))


def history_of(connection: Connection, job_id: str) -> list[Event]:
    """Return what the history says of a job, oldest first."""
    found = connection.execute(_OF_JOB, {"of_job": key(job_id)}).all()
    ids = [row.act for row in found if row.act is not None]
    known = {row.id: row for row in connection.execute(_BY_ID, {"ids": ids})} if ids else {}
    events = []
    for row in found:
        act = known.get(row.act)
        text = row.text or (act.reason if act else None)
        events.append(Event(row.at, row.event, text, act.operator if act else None, row.traceback))
    return events


_RETRIED = (
    select(history.c.seq)
    .where(history.c.job == bindparam("of_job"), history.c.event == "retry")
    .where(exists().where(jobs.c.id == bindparam("of_job"), jobs.c.revoked_at.is_(None)))
    .limit(1)
)


def was_retried(connection: Connection, job_id: str) -> bool:
    """Whether an operator has retried the job, and it was not revoked since."""
    return connection.execute(_RETRIED, {"of_job": key(job_id)}).first() is not None


_DONE_BY = select(history.c.job).where(
    history.c.act == bindparam("of_act"), history.c.job.in_(bindparam("keys", expanding=True))
)


def done_by(connection: Connection, act: Act, job_keys: Sequence[str]) -> set[str]:
    """Return those of the jobs that *act* has changed already."""
    return set(connection.execute(_DONE_BY, {"of_act": act.id, "keys": list(job_keys)}).scalars())


_IS_ANY = select(history.c.seq).limit(1)
_FORGOTTEN = delete(history).where(history.c.job.in_(bindparam("keys", expanding=True)))


def is_any(connection: Connection) -> bool:
    """Whether any job has a history."""
    return connection.execute(_IS_ANY).first() is not None


def forget(connection: Connection, job_keys: Sequence[str]) -> None:
    """Delete the history of jobs."""
    connection.execute(_FORGOTTEN, {"keys": list(job_keys)})


def forget_of(connection: Connection, chosen: Select[Any], values: dict[str, Any]) -> None:
    """Delete the history of the jobs whose keys *chosen* selects."""
    connection.execute(delete(history).where(history.c.job.in_(chosen)), values)
