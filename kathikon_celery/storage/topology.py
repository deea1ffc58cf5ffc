"""Exchanges, queues and bindings, the same for every process."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, exists, select, update

from kathikon_celery.storage.clock import now
from kathikon_celery.storage.dialects.parameters import Upsert
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key, label, name_of
from kathikon_celery.storage.tables import bindings, exchanges, messages, queues


def _new(name: str, kind: Any) -> Any:
    return bindparam(f"new_{name}", type_=kind)


_EXCHANGE = Upsert(
    exchanges, (exchanges.c.name,), {name: _new(name, exchanges.c[name].type) for name in ("name", "label", "type")}
)


def declare_exchange(database: Database, name: str, kind: str) -> str:
    """Create the exchange unless it exists; return its type, *kind* or that of the existing one."""
    values = {"new_name": key(name), "new_label": label(name), "new_type": kind}
    with database.once() as connection:
        database.dialect.upsert(connection, _EXCHANGE, values)
        return str(connection.execute(select(exchanges.c.type).where(exchanges.c.name == key(name))).scalar_one())


def exchange_type(connection: Connection, name: str) -> str | None:
    """Return the type of the exchange, or `None` if there is none."""
    return connection.execute(select(exchanges.c.type).where(exchanges.c.name == key(name))).scalar()


def delete_exchange(database: Database, name: str) -> None:
    """Delete the exchange and its bindings; the queues stay."""
    with database.write() as connection:
        connection.execute(delete(bindings).where(bindings.c.exchange == key(name)))
        connection.execute(delete(exchanges).where(exchanges.c.name == key(name)))


_SETTINGS = ("durable", "auto_delete", "expires", "message_ttl")
_QUEUE = Upsert(
    queues,
    (queues.c.name,),
    {**{name: _new(name, queues.c[name].type) for name in ("name", "label", *_SETTINGS)}, "used_at": now()},
    lambda new: {"used_at": now()},
)


def declare_queue(
    database: Database,
    name: str,
    *,
    durable: bool = True,
    auto_delete: bool = False,
    expires: float | None = None,
    message_ttl: float | None = None,
) -> None:
    """Create the queue, or note that it is used. *expires* and *message_ttl* in seconds."""
    settings = (durable, auto_delete, expires, message_ttl)
    values = {f"new_{name}": value for name, value in zip(_SETTINGS, settings, strict=True)}
    with database.once() as connection:
        database.dialect.upsert(connection, _QUEUE, {"new_name": key(name), "new_label": label(name), **values})


def own_queue(database: Database, name: str, node_id: int | None) -> None:
    """Note that the node uses the queue (`None`: none does). An auto-delete queue is deleted with its node."""
    statement = update(queues).where(queues.c.name == key(name)).values(node_id=node_id, used_at=now())
    with database.once() as connection:
        connection.execute(statement)


def queue_exists(connection: Connection, name: str) -> bool:
    """Whether the queue was declared."""
    return bool(connection.execute(select(exists().where(queues.c.name == key(name)))).scalar())


_TTL = select(queues.c.message_ttl).where(queues.c.name == bindparam("queue"))


def message_ttl(connection: Connection, name: str) -> float | None:
    """Return the seconds that a message may wait in the queue; `None`: no limit."""
    return connection.execute(_TTL, {"queue": key(name)}).scalar()


def all_queues(connection: Connection) -> list[str]:
    """Return the names of the declared queues."""
    labels = connection.execute(select(queues.c.label).order_by(queues.c.name)).scalars()
    return [name_of(one) for one in labels]


def delete_queue(connection: Connection, name_key: str) -> None:
    """Delete a queue by its key, with its bindings and messages. Its jobs stay."""
    connection.execute(delete(bindings).where(bindings.c.queue == name_key))
    connection.execute(delete(messages).where(messages.c.queue == name_key))
    connection.execute(delete(queues).where(queues.c.name == name_key))


_BINDING = Upsert(
    bindings,
    (bindings.c.exchange, bindings.c.queue, bindings.c.routing_key),
    {column.name: _new(column.name, column.type) for column in bindings.c},
)


def bind(database: Database, queue: str, exchange: str, routing_key: str) -> None:
    """Bind the queue to the exchange, unless it is bound so."""
    values = {
        "new_exchange": key(exchange),
        "new_queue": key(queue),
        "new_routing_key": key(routing_key),
        "new_label": label(routing_key),
    }
    with database.once() as connection:
        database.dialect.upsert(connection, _BINDING, values)


def unbind(database: Database, queue: str, exchange: str, routing_key: str) -> None:
    """Undo `bind`."""
    with database.once() as connection:
        connection.execute(
            delete(bindings).where(
                bindings.c.exchange == key(exchange),
                bindings.c.queue == key(queue),
                bindings.c.routing_key == key(routing_key),
            )
        )


_BOUND = (
    select(queues.c.label, bindings.c.label.label("routing_key"))
    .join(queues, queues.c.name == bindings.c.queue)
    .where(bindings.c.exchange == bindparam("exchange"))
)


def bound(connection: Connection, exchange: str) -> list[tuple[str, str]]:
    """Return (queue, routing key) of every binding of the exchange."""
    return [(name_of(row[0]), name_of(row[1])) for row in connection.execute(_BOUND, {"exchange": key(exchange)})]


def all_bindings(connection: Connection) -> list[tuple[str, str, str]]:
    """Return (queue, exchange, routing key) of every binding."""
    query = (
        select(queues.c.label, exchanges.c.label, bindings.c.label)
        .join(queues, queues.c.name == bindings.c.queue)
        .join(exchanges, exchanges.c.name == bindings.c.exchange)
    )
    return [(name_of(row[0]), name_of(row[1]), name_of(row[2])) for row in connection.execute(query)]


_IDLE = and_(queues.c.expires.is_not(None), queues.c.node_id.is_(None))
_UNUSED = select(queues.c.name).where(_IDLE, queues.c.used_at < now(-queues.c.expires))
#: Whether there is a queue for `delete_unused`.
IS_ANY_UNUSED = _UNUSED.limit(1).scalar_subquery().is_not(None)


def delete_unused(database: Database) -> int:
    """Delete the queues that were unused for more than their ``expires`` seconds; return their number."""
    with database.read() as connection:  # mostly there is none, and no lock is needed
        if connection.execute(_UNUSED.limit(1)).first() is None:
            return 0
    stale = _UNUSED.with_for_update(skip_locked=True)  # a process that declares one just now waits, and creates it anew
    with database.write() as connection:
        names = list(connection.execute(stale).scalars())
        for name in names:
            delete_queue(connection, name)
    return len(names)
