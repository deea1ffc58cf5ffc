"""Publishing: a job gets a new row, or the row with the same id waits again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, bindparam, null, or_, select

from kathikon_celery.job import Cause, Hold, Job, State
from kathikon_celery.storage import limits, transitions, unique
from kathikon_celery.storage.dialects.parameters import Upsert
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key, printable
from kathikon_celery.storage.tables import jobs

#: Columns that a publication writes, also to an existing row.
_BROUGHT = ("queue", "task", "priority", "publication", "max_attempts", "root_id", "parent_id", "group_id")
_PAYLOAD = ("expires_at", "envelope", "body")


_LIMITED = ("limits", "line", "gate")


@lru_cache(maxsize=16)
def _published(later: bool, own: bool, limited: bool, is_unique: bool = False) -> Upsert:
    names = _BROUGHT + _PAYLOAD + (_LIMITED if limited else ())
    columns = {name: bindparam(f"new_{name}", type_=jobs.c[name].type) for name in names}
    return transitions.published(columns, later, own, limited, spares_held=not own and (limited or is_unique))


_OWN = (
    select(jobs.c.seq, jobs.c.revoked_at)
    .where(jobs.c.seq == bindparam("number"), jobs.c.fence == bindparam("held_fence"))
    # a task may set its own end, and retry
    .where(or_(jobs.c.node_id == bindparam("holder"), jobs.c.node_id.is_(None)))
    .where(jobs.c.state != State.CANCELLED.value)
    .with_for_update()
)
_REVOKED = transitions.ended(
    State.CANCELLED,
    jobs.c.seq == bindparam("number"),
    **dict.fromkeys(transitions.WRITTEN, null()),
    reason=transitions.REVOKED,
    cause=Cause.REVOKED.value,
).of()


def envelope_of(job: Job) -> str:
    """Return the job's envelope, with its id or queue if the key is only a digest; reading.py finds the name there."""
    kept: dict[str, Any] = {"headers": {"id": job.id}} if job.envelope == "{}" and key(job.id) != job.id else {}
    if job.queue is not None and key(job.queue) != job.queue:
        kept["queue"] = job.queue
    if not kept:
        return job.envelope
    try:
        return json.dumps({**json.loads(job.envelope), **kept}, separators=(",", ":"))
    except (ValueError, TypeError):  # no JSON: a worker will report that
        return job.envelope


def _values(job: Job) -> dict[str, Any]:
    own_key, queue_key = key(job.id), _key(job.queue)
    values = {
        "new_id": own_key,
        "new_queue": queue_key,
        "new_task": printable(job.task),
        "new_priority": job.priority,
        "new_publication": job.publication,
        "new_max_attempts": job.max_attempts,
        "new_root_id": _key(job.root_id),
        "new_parent_id": _key(job.parent_id),
        "new_group_id": _key(job.group_id),
        "new_expires_at": job.expires_at,
        "new_envelope": job.envelope if (own_key, queue_key) == (job.id, job.queue) else envelope_of(job),
        "new_body": job.body,
    }
    if job.limits:
        ordered = limits.in_order(job.limits)
        values |= {"new_limits": limits.written(ordered), "new_line": ordered[0].key, "new_gate": ordered[0].key}
    if job.scheduled_at is not None:
        values["new_scheduled_at"] = job.scheduled_at
        values["new_state"] = (State.RETRYABLE if job.state is State.RETRYABLE else State.SCHEDULED).value
    return values


def _key(name: str | None) -> str | None:
    return None if name is None else key(name)


def insert(database: Database, job: Job, hold: Hold | None = None, soon: bool = True) -> bool:
    """Publish *job*, on disk when this returns; return false if it was refused (see *hold*).

    An existing row with the same id waits again and keeps its errors, unless it is of this very publication: then it
    does not change, also if its job has ended.

    Arguments:
        hold: the claim of the run that publishes its own job again. If the job was given to another worker meanwhile,
            or cancelled, nothing is written. If the job was revoked meanwhile, it is cancelled instead.
        soon: wake the promoters: a job with a due time is due before their next look.
    """
    values = _values(job)

    own, later, limited = hold is not None, job.scheduled_at is not None, bool(job.limits)
    unique_one = job.unique is not None and not own  # its own run publishes it again: it has the key
    claim = {"number": hold.seq, "held_fence": hold.fence, "holder": hold.node_id} if hold else {}

    def publish(again: bool) -> bool:
        if own or limited or unique_one or (later and not soon):
            with database.write(durable=True) as connection:
                if own:
                    rows = prepared.rows(connection, _OWN, claim)
                    if not rows:
                        return again
                    if rows[0][1] is not None:  # revoked while it ran: the lifeline tells errbacks, chains and chords
                        connection.execute(_REVOKED, {"number": claim["number"]})
                        database.events.changed(connection, ids=[values["new_id"]])
                        return True
                if not unique_one:
                    database.dialect.upsert(connection, _published(later, own, limited), values)
                elif not unique.publish(database, connection, job, values, _published(later, False, limited, True)):
                    return True
                if soon:
                    _announce(database, connection, [job])
                database.events.published(connection, [job])
        else:
            with database.once(durable=True) as connection:
                database.dialect.publish(connection, _published(later, False, False), values, later, again)
                database.events.published(connection, [job])
        return True

    is_published = database.patiently(publish)
    offer(database, [job])
    return is_published


def insert_many(database: Database, batch: Sequence[Job]) -> None:
    """Publish *batch* in one transaction, on disk when this returns."""

    def write(again: bool) -> None:
        with database.write(durable=True) as connection:
            publish(database, connection, batch)

    database.patiently(write)
    offer(database, batch)


def offer(database: Database, batch: Iterable[Job]) -> None:
    """Let out of their lines what may start, after *batch* was published and committed.

    In a transaction of the caller's, this is done in that transaction, so that a `limits.sweep` may have to follow.
    """
    keys = limits.keys_of(batch)
    if keys:
        database.patiently(lambda again: limits.offer(database, keys))


def publish(database: Database, connection: Connection, batch: Sequence[Job]) -> None:
    """Publish *batch* as a part of a transaction; call `offer` after its commit."""
    kinds: defaultdict[tuple[bool, bool], list[Job]] = defaultdict(list)
    gone = set()
    for job in batch:
        if job.unique is not None:
            upsert = _published(job.scheduled_at is not None, False, bool(job.limits), True)
            if not unique.publish(database, connection, job, _values(job), upsert):
                gone.add(id(job))
            continue
        kinds[job.scheduled_at is not None, bool(job.limits)].append(job)
    for (later, limited), chosen in sorted(kinds.items(), key=itemgetter(0)):
        rows = [_values(job) for job in chosen]
        database.dialect.upsert_many(connection, _published(later, False, limited), rows)
    batch = [job for job in batch if id(job) not in gone] if gone else batch
    _announce(database, connection, batch)
    database.events.published(connection, batch)


def _announce(database: Database, connection: Connection, batch: Sequence[Job]) -> None:
    at_once = [key(job.queue or "") for job in batch if job.scheduled_at is None and not job.limits]
    if at_once:
        database.dialect.wake(connection, set(at_once), len(at_once))
    if any(job.scheduled_at is not None for job in batch):
        database.dialect.ring(connection)
