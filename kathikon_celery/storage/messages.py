"""Messages that are no jobs: remote control, replies, events, and what a plain kombu program sends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Connection,
    Integer,
    Select,
    bindparam,
    delete,
    desc,
    func,
    insert,
    null,
    select,
    true,
)

from kathikon_celery.job import Hold
from kathikon_celery.storage.clock import now, seconds
from kathikon_celery.storage.column_types import rows_of
from kathikon_celery.storage.dialects.parameters import Change, Pick
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key
from kathikon_celery.storage.tables import FREE, jobs, messages, next_fence, queues, ready_in


@dataclass(slots=True, kw_only=True)
class Message:
    """A message in a queue. *redelivered*: a consumer held it before and gave it back."""

    seq: int
    queue: str
    priority: int
    fence: int
    envelope: str
    body: str
    node_id: int | None = None

    @property
    def hold(self) -> Hold:
        """The claim of its node."""
        return Hold(self.seq, self.fence, self.node_id)

    @property
    def redelivered(self) -> bool:
        return self.fence > 1


_PUT = insert(messages).values(
    queue=bindparam("queue"),
    priority=bindparam("priority"),
    envelope=bindparam("envelope"),
    body=bindparam("body"),
    fence=0,
    available_at=now(),
)
_PUT_EXPIRING = _PUT.values(expires_at=now(seconds("ttl")))
_HAVE_TTL = select(queues.c.name, queues.c.message_ttl).where(
    queues.c.name.in_(bindparam("names", expanding=True)), queues.c.message_ttl.is_not(None)
)


def put(
    database: Database,
    names: Sequence[str],
    envelope: str,
    body: str,
    *,
    priority: int = 0,
    ttl: float | None = None,
    durable: bool = True,
) -> None:
    """Put a message into each of the queues *names*. *ttl*: seconds that it may wait; a queue's own may be shorter."""

    def publish(again: bool) -> None:
        keys = [key(name) for name in names]
        with database.write(durable) as connection:
            ttls: dict[str, float] = {name: ttl for name, ttl in connection.execute(_HAVE_TTL, {"names": keys})}  # noqa: C416  (mypy knows no pairs there)
            for name in keys:
                values: dict[str, Any] = {"queue": name, "priority": priority, "envelope": envelope, "body": body}
                limits = [limit for limit in (ttl, ttls.get(name)) if limit is not None]
                if limits:
                    connection.execute(_PUT_EXPIRING, {**values, "ttl": min(limits)})
                else:
                    connection.execute(_PUT, values)
            database.dialect.ring(connection)

    database.patiently(publish, patient=durable)


# One expression for both conditions: with two, a planner may use the index of expiry instead of the queue's.
_FRESH = func.coalesce(messages.c.expires_at > now(), true())
_TAKEN = (messages.c.seq, messages.c.queue, messages.c.priority, messages.c.fence, messages.c.envelope, messages.c.body)


def first(queue: Any) -> Select[Any]:
    """Return the SELECT of the free messages of *queue*, in the order in which they are taken."""
    # That is the order of an index: otherwise a planner that expects many messages scans the table for the first one.
    return (
        select(messages.c.seq)
        .where(messages.c.queue == queue, FREE)
        .order_by(desc(messages.c.priority), messages.c.seq)
    )


_QUEUES = rows_of("queues")
_THERE = select(_QUEUES.c.value).where(
    first(_QUEUES.c.value).limit(1).correlate(_QUEUES).scalar_subquery().is_not(None)
)


def there(connection: Connection, queues: Sequence[str]) -> list[str]:
    """Return those of *queues* (keys) in which a message waits."""
    if not queues:
        return []
    return [queue for (queue,) in prepared.rows(connection, _THERE, {"queues": list(queues)})]


_READY = first(bindparam("from_queue")).where(_FRESH).limit(bindparam("at_most", type_=Integer()))
_PICK = Pick(messages, (_READY,), "kathikon_messages_ready")
_KEPT = Change(messages, {"node_id": bindparam("by_node"), "fence": next_fence(messages)})
_RETURNED = Change(messages, {"node_id": null(), "fence": next_fence(messages)})


def take(
    database: Database, connection: Connection, queue: str, limit: int, node_id: int | None, keep: bool
) -> list[Message]:
    """Take up to *limit* messages of *queue* (a key). *keep*: hold them until acknowledged; otherwise delete them."""
    dialect, values = database.dialect, {"from_queue": queue, "at_most": limit}
    if keep:
        rows = dialect.pick_and_change(connection, _KEPT, _PICK, _TAKEN, {**values, "by_node": node_id}).rows
    else:
        rows = dialect.pick_and_delete(connection, _PICK, _TAKEN, values).rows
    names = [column.name for column in _TAKEN]
    taken = [Message(**dict(zip(names, row, strict=True)), node_id=node_id) for row in rows]
    with suppress(TypeError):  # a row is corrupt: the others are delivered all the same
        taken.sort(key=lambda message: (-message.priority, message.seq))
    return taken


def acknowledge(database: Database, connection: Connection, holds: Sequence[Hold]) -> int:
    """Delete the messages held under *holds*; return their number."""
    return database.dialect.delete_held(connection, messages, holds)


def give_back(database: Database, connection: Connection, holds: Sequence[Hold]) -> int:
    """Free the messages held under *holds*; return their number."""
    changed = database.dialect.change_held(connection, _RETURNED, holds, {})
    database.dialect.ring(connection)
    return changed


_COUNT = select(func.count()).where(messages.c.queue == bindparam("from_queue"), FREE, _FRESH)
_COUNT_JOBS = select(func.count()).where(ready_in(bindparam("from_queue", type_=jobs.c.queue.type)))
_PURGE = delete(messages).where(messages.c.queue == bindparam("from_queue"), FREE)


def size(connection: Connection, queue: str) -> int:
    """Return the number of messages and jobs that are ready in *queue* (a key)."""
    values = {"from_queue": queue}
    return sum(int(connection.execute(count, values).scalar_one()) for count in (_COUNT, _COUNT_JOBS))


def purge(connection: Connection, queue: str) -> int:
    """Delete the free messages of *queue* (a key); return their number."""
    return connection.execute(_PURGE, {"from_queue": queue}).rowcount
