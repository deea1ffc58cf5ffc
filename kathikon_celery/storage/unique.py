"""Unique jobs: writes a job unless another one has its unique key, or gives it the other one's place.

A unique index of the jobs themselves keeps out others: a key belongs to a job that is there, and to nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, bindparam, null, select, update

from kathikon_celery.job import Cause, Job, State, UniqueKey
from kathikon_celery.storage import transitions
from kathikon_celery.storage.clock import seconds_until
from kathikon_celery.storage.dialects.parameters import Upsert
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.errors import NotUnique, Unavailable
from kathikon_celery.storage.tables import UNIQUE, jobs

#: How often the key is tried to get, while jobs that had the key end or lose it.
TRIES = 1000
#: The reasons on the rows of jobs that are discarded.
DUPLICATE, REPLACED = "job {} has the same unique key", "job {} has the same unique key, and is newer"

_WAITS = frozenset({State.SCHEDULED, State.RETRYABLE, State.AVAILABLE, State.BLOCKED})
_KEY = bindparam("of_key", type_=jobs.c.active_key.type)
_HOLDERS = {
    while_: select(
        jobs.c.seq, jobs.c.id, jobs.c.state, seconds_until(jobs.c.inserted_at), seconds_until(jobs.c.expires_at)
    )
    .where(condition, jobs.c[f"{while_}_key"] == _KEY)
    .with_for_update()
    for while_, condition in UNIQUE.items()
}
_RELEASE = {
    while_: update(jobs).where(jobs.c.seq == bindparam("of_seq")).values({f"{while_}_key": null()}) for while_ in UNIQUE
}
_IS_KNOWN = select(jobs.c.seq).where(jobs.c.id == bindparam("of_id", type_=jobs.c.id.type))
_GIVEN_UP = transitions.ended(
    State.DISCARDED,
    and_(jobs.c.id == bindparam("of_id", type_=jobs.c.id.type), jobs.c.node_id.is_(None)),
    **dict.fromkeys(transitions.WRITTEN, null()),
    reason=bindparam("why"),
    cause=bindparam("because"),
).of()


class _Holder(NamedTuple):
    """The job that has the key; seconds until it is published, so a negative number, and until it expires."""

    seq: int
    id: str
    state: str
    left: float
    expires: float | None


@lru_cache(maxsize=8)
def _new(published: Upsert) -> Upsert:
    keys = {f"{while_}_key": bindparam(f"new_{while_}_key", type_=jobs.c.active_key.type) for while_ in UNIQUE}
    return Upsert(jobs, (), {**published.values, **keys})


def publish(database: Database, connection: Connection, job: Job, values: Mapping[str, Any], published: Upsert) -> bool:
    """Write *job*, as a part of a transaction; return whether it waits then.

    If another job has the key, and the publisher can be told, ``job.duplicate_of`` is the other one's id; otherwise the
    job is written as discarded. Raises `NotUnique` if the key says so, and `Unavailable` if others are always quicker.

    Arguments:
        values, published: the parameters and the INSERT without the key.
    """
    job.duplicate_of = None
    one = job.unique
    assert one is not None
    keys = {f"new_{while_}_key": one.key if while_ == one.while_ else None for while_ in UNIQUE}
    holder = None
    for _ in range(TRIES):
        if database.dialect.upsert(connection, _new(published), {**values, **keys}):
            return True
        rows = prepared.rows(connection, _HOLDERS[one.while_], {"of_key": one.key})
        holder = _Holder(*rows[0]) if rows else None
        if holder is None:
            if prepared.rows(connection, _IS_KNOWN, {"of_id": values["new_id"]}):
                break  # the same job is published again
        elif holder.id == values["new_id"]:
            holder = None
            break
        elif one.within is not None and -holder.left > one.within:
            connection.execute(_RELEASE[one.while_], {"of_seq": holder.seq})
        elif (holder.expires or 0.0) < 0 and State(holder.state) in _WAITS:  # it will not run
            connection.execute(_RELEASE[one.while_], {"of_seq": holder.seq})
            _give_up(database, connection, holder.id, transitions.EXPIRED, Cause.EXPIRED)
        elif one.on_conflict == "replace" and State(holder.state) in _WAITS:
            connection.execute(_RELEASE[one.while_], {"of_seq": holder.seq})
            _give_up(database, connection, holder.id, REPLACED.format(job.id), Cause.REPLACED)
        else:
            break
    else:  # to write the job without the key would make two of it
        raise Unavailable(f"the unique key of job {job.id} was given away {TRIES} times while it was tried")
    if holder is not None:
        return _conflict(database, connection, job, one, holder.id, values, published)
    database.dialect.upsert(connection, published, values)
    return True


def _conflict(
    database: Database,
    connection: Connection,
    job: Job,
    one: UniqueKey,
    holder: str,
    values: Mapping[str, Any],
    published: Upsert,
) -> bool:
    if one.answers and one.on_conflict == "raise":
        raise NotUnique(job.task, holder)
    if one.answers and one.on_conflict != "drop":
        job.duplicate_of = holder
        return False
    database.dialect.upsert(connection, published, values)
    _give_up(database, connection, values["new_id"], DUPLICATE.format(holder), Cause.DUPLICATE)
    return False


def _give_up(database: Database, connection: Connection, job: str, why: str, cause: Cause) -> None:
    connection.execute(_GIVEN_UP, {"of_id": job, "why": why, "because": cause.value})
    database.events.changed(connection, ids=[job])
