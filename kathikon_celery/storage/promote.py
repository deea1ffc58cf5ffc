"""Promotion: what is due becomes ready, all together, so that priority decides among it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Integer, bindparam, select

from kathikon_celery.storage import transitions
from kathikon_celery.storage.clock import now, seconds_until
from kathikon_celery.storage.dialects import Dialect
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.tables import DUE, EXPIRING, jobs

#: Rows a transaction promotes: enough for a burst, few enough to hold no lock for long.
CHUNK = 1000

NEXT_DUE = select(seconds_until(jobs.c.available_at)).where(DUE).order_by(jobs.c.available_at).limit(1)


@lru_cache(maxsize=8)
def _promote(dialect: Dialect) -> Any:
    due = (
        select(jobs.c.seq)
        .where(DUE, jobs.c.available_at <= now())
        .order_by(jobs.c.available_at)
        .limit(bindparam("at_most", type_=Integer()))
    )
    return transitions.promoted(dialect.picked(due, jobs)).returning(jobs.c.queue)


def next_due(connection: Connection) -> float | None:
    """Seconds until the next waiting job is due (negative when it is overdue), or `None` when none waits."""
    for (value,) in prepared.rows(connection, NEXT_DUE, {}):
        return float(value)
    return None


def promote(database: Database, limit: int = CHUNK) -> int:
    """Make up to *limit* due jobs ready, and wake nodes for them; the number of them."""
    with database.write() as connection:
        queues = [queue for (queue,) in prepared.rows(connection, _promote(database.dialect), {"at_most": limit})]
        if queues:
            database.dialect.wake(connection, {queue for queue in queues if queue}, len(queues))
    return len(queues)


@lru_cache(maxsize=8)
def _expire(dialect: Dialect) -> Any:
    expired = select(jobs.c.seq).where(EXPIRING, jobs.c.expires_at <= now()).order_by(jobs.c.expires_at).limit(CHUNK)
    return transitions.expired(dialect.picked(expired, jobs))


def expire(database: Database) -> int:
    """Discard the jobs that expired while they waited; the number of them."""
    with database.write() as connection:
        return connection.execute(_expire(database.dialect)).rowcount
