"""Promotion: due jobs become ready, all in one transaction, so that priority decides among them."""

from __future__ import annotations

from sqlalchemy import Connection, Integer, bindparam, select

from kathikon_celery.job import Cause, State
from kathikon_celery.storage import limits, transitions
from kathikon_celery.storage.clock import now, seconds_until
from kathikon_celery.storage.dialects.parameters import Pick
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.tables import DUE, EXPIRING, EXPIRING_BLOCKED, due_at, jobs

#: Rows that one transaction promotes: enough for a burst, few enough to hold no lock for long.
CHUNK = 1000

NEXT_DUE = select(seconds_until(due_at())).where(DUE).order_by(due_at()).limit(1)


_DUE = select(jobs.c.seq).where(DUE, due_at() <= now()).order_by(due_at()).limit(bindparam("at_most", type_=Integer()))
_PICK_DUE = Pick(jobs, (_DUE,), "kathikon_jobs_due")
_PROMOTED = transitions.promoted()
_EXPIRED = select(jobs.c.seq).where(EXPIRING, jobs.c.expires_at <= now()).order_by(jobs.c.expires_at).limit(CHUNK)
_PICK_EXPIRED = Pick(jobs, (_EXPIRED,), "kathikon_jobs_expiring")
_EXPIRED_IN_LINE = (
    select(jobs.c.seq).where(EXPIRING_BLOCKED, jobs.c.expires_at <= now()).order_by(jobs.c.expires_at).limit(CHUNK)
)
_PICK_EXPIRED_IN_LINE = Pick(jobs, (_EXPIRED_IN_LINE,), "kathikon_jobs_expiring_blocked")
_GIVEN_UP = transitions.expired()


def next_due(connection: Connection) -> float | None:
    """Return the seconds until the next waiting job is due (negative: overdue), or `None` if no job waits."""
    for (value,) in prepared.rows(connection, NEXT_DUE, {}):
        return float(value)
    return None


def promote(database: Database, limit: int = CHUNK) -> int:
    """Make up to *limit* due jobs ready, and wake nodes for them; return their number."""
    with database.write() as connection:
        values = {"at_most": limit}
        which, columns = database.events.which(), (jobs.c.queue, jobs.c.line)
        taken = database.dialect.pick_and_change(connection, _PROMOTED, _PICK_DUE, columns, values, which=which)
        if all(line is None for _, line in taken.rows):
            database.events.entered(connection, which, State.AVAILABLE)
        else:
            database.events.changed(connection, ids=[job.id for job in which or ()])
        queues = [queue for queue, line in taken.rows if line is None]
        if queues:
            database.dialect.wake(connection, {queue for queue in queues if queue}, len(queues))
    limits.offer(database, {line for _, line in taken.rows if line is not None})
    return taken.number


def expire(database: Database) -> int:
    """Discard up to `CHUNK` jobs that expired while they waited; return their number."""
    number = 0
    with database.write() as connection:
        which = database.events.which()
        for pick in (_PICK_EXPIRED, _PICK_EXPIRED_IN_LINE):
            number += database.dialect.pick_and_change(connection, _GIVEN_UP, pick, (), {}, which=which).number
        database.events.entered(connection, which, State.DISCARDED, Cause.EXPIRED)
    return number
