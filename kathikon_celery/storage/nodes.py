"""Nodes: the processes that claim, their leases, and the return of what dead nodes held."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Text,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    true,
    union,
    update,
)
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.job import Hold, State
from kathikon_celery.storage import acts, limits, transitions
from kathikon_celery.storage.clock import now, seconds, seconds_until
from kathikon_celery.storage.dialects import Dialect, dialect_of
from kathikon_celery.storage.dialects.parameters import Change
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.finish import note_crashes
from kathikon_celery.storage.tables import HELD, jobs, messages, next_fence, nodes, queues, values_of
from kathikon_celery.storage.topology import delete_queue


@dataclass(frozen=True)
class Node:
    """Another process's row.

    Arguments:
        pid_started: see `kathikon_celery.nodes.machine.start_of`.
        lease: seconds left by the database's clock, negative when it has run out. That clock may have been set.
        renewal: the end of the lease as text; each renewal changes it.
    """

    id: int
    name: str
    machine: str
    pid: int
    pid_started: float
    lease: float
    renewal: str


@dataclass(frozen=True)
class Living:
    """A process that lives, as operators see it.

    >>> [(worker.name, worker.queues, worker.holds) for worker in kathikon.workers()]
    [('celery@web1', ['default', 'emails'], 4)]

    Arguments:
        id: the number of its row.
        name: Celery's name of the worker.
        machine: the machine's name.
        pid: its process id there.
        started_at: when it began, as an aware datetime.
        queues: whose jobs it runs; `None`: that is not known (yet).
        holds: how many jobs it has claimed or runs.
        lease: seconds left until others would rescue its jobs.
    """

    id: int
    name: str
    machine: str
    pid: int
    started_at: datetime
    lease: float
    queues: list[str] | None
    holds: int


class Registered(NamedTuple):
    """A process's own row. Tables that are made anew number their nodes anew, so the number alone does not tell."""

    id: int
    machine: str
    pid: int


def register(database: Database, name: str, machine: str, pid: int, pid_started: float, lease: float) -> Registered:
    """Insert this process as a `Node`, with a lease of *lease* seconds."""
    values = {"name": name, "machine": machine, "pid": pid, "pid_started": pid_started}
    with database.write() as connection:
        row = connection.execute(
            insert(nodes).values(**values, started_at=now(), lease_until=now(seconds("lease"))), {"lease": lease}
        )
        assert row.inserted_primary_key is not None
        return Registered(int(row.inserted_primary_key[0]), machine, pid)


#: The lease of a node ends ``lease`` seconds from now: see `of_renewal`.
RENEW = Change(
    nodes,
    {"lease_until": now(seconds("lease"))},
    (nodes.c.id == bindparam("node"), nodes.c.machine == bindparam("of_machine"), nodes.c.pid == bindparam("of_pid")),
)
_RENEW = RENEW.of()


def of_renewal(node: Registered, lease: float) -> dict[str, Any]:
    """Return the parameters of `RENEW`."""
    return {"node": node.id, "of_machine": node.machine, "of_pid": node.pid, "lease": lease}


def renew(database: Database, node: Registered, lease: float) -> bool:
    """Make the lease last *lease* seconds from now; return false when the node was taken for dead."""
    with database.once() as connection:
        return connection.execute(_RENEW, of_renewal(node, lease)).rowcount > 0


def consume(database: Database, node_id: int, queue_names: Sequence[str]) -> None:
    """Note the queues whose jobs the node runs."""
    with database.once() as connection:
        connection.execute(update(nodes).where(nodes.c.id == node_id).values(consumes=json.dumps(list(queue_names))))


def consumed(connection: Connection) -> list[set[str] | None]:
    """Return for each living node that runs jobs the queues of these jobs; `None`: that is not known (yet)."""
    found = connection.execute(select(nodes.c.consumes).where(nodes.c.lease_until > now())).scalars()
    return [None if text is None else set(json.loads(text)) for text in found if text != "[]"]


def living(connection: Connection) -> list[Living]:
    """Return the living processes that run jobs, by name."""
    holds = select(func.count()).where(HELD, jobs.c.node_id == nodes.c.id).scalar_subquery()
    columns = (nodes.c.id, nodes.c.name, nodes.c.machine, nodes.c.pid, nodes.c.started_at, nodes.c.consumes)
    query = select(*columns, seconds_until(nodes.c.lease_until).label("lease"), holds.label("holds"))
    rows = connection.execute(query.where(nodes.c.lease_until > now()).order_by(nodes.c.name, nodes.c.id)).mappings()
    found = []
    for row in rows:
        values = dict(row)
        consumes = values.pop("consumes")
        if consumes != "[]":
            found.append(Living(**values, queues=None if consumes is None else json.loads(consumes)))
    return found


def without_consumer(queue_names: Iterable[str], known: Sequence[set[str] | None]) -> list[str]:
    """Return those queues that none of the nodes consumes; *known*: the answer of `consumed`."""
    if None in known:
        return []
    everywhere = {name for names in known for name in names or ()}
    return [name for name in queue_names if name not in everywhere]


class Holder:
    """Holds a node's lock on a connection of its own. The node's death frees the lock."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock: Any = None
        self._locked_for: int | None = None

    def hold(self, node_id: int) -> None:
        """Take the node's lock if it is free. Raises the database's error when the lock that we had is lost."""
        dialect = self._database.dialect
        if self._lock is None or self._locked_for != node_id:
            self.drop()
            self._lock = dialect.hold(self._database.detached, node_id)
            self._locked_for = node_id
        else:
            dialect.check_held(self._lock)

    @property
    def is_held(self) -> bool:
        """Whether we have the lock."""
        return self._lock is not None

    def drop(self) -> None:
        """Release the lock; the next `hold` takes it again."""
        lock, self._lock, self._locked_for = self._lock, None, None
        if lock is not None:
            with suppress(Exception):
                lock.close()


def is_lock_free(database: Database, connection: Connection, node_id: int) -> bool | None:
    """Whether the node's lock is free, since its connection is gone. `None` if there are no such locks."""
    return database.dialect.is_lock_free(connection, node_id)


_UNKNOWN = union(*(values_of(table.c.node_id, HELD) for table in (jobs, messages))).subquery("holders")
_NODELESS = select(_UNKNOWN.c.value).where(_UNKNOWN.c.value.not_in(select(nodes.c.id)))


def orphans(connection: Connection) -> list[int]:
    """Return the ids under which rows are held although no such node exists."""
    return list(connection.execute(_NODELESS).scalars())


def is_any_suspect(dialect: Dialect) -> ColumnElement[bool]:
    """Return the condition that the lock of a node on another ``machine`` is free, or that there are `orphans`."""
    other = nodes.alias("other")
    is_elsewhere = other.c.machine != bindparam("machine")
    unlocked = select(other.c.id).where(is_elsewhere, dialect.has_free_lock(other.c.id))
    return or_(*(found.limit(1).scalar_subquery().is_not(None) for found in (unlocked, _NODELESS)))


_RENEWAL: Any = cast(nodes.c.lease_until, Text)
#: The `Node.renewal` of each node, as one text for `renewals_of`.
RENEWALS = select(func.aggregate_strings(cast(nodes.c.id, Text) + "=" + _RENEWAL, ",")).scalar_subquery()


def renewals_of(text: str | None) -> dict[int, str]:
    """Return node id -> `Node.renewal`, from the value of `RENEWALS`."""
    pairs = (one.partition("=") for one in (text or "").split(",") if one)
    return {int(node_id): renewal for node_id, _, renewal in pairs if node_id.isdecimal()}


def others(connection: Connection, node_id: int) -> list[Node]:
    """Return all nodes but this one."""
    columns = (nodes.c.id, nodes.c.name, nodes.c.machine, nodes.c.pid, nodes.c.pid_started)
    lease = func.coalesce(seconds_until(nodes.c.lease_until), 0.0)  # NULL: `lease_until` is no moment
    query = select(*columns, lease.label("lease"), _RENEWAL.label("renewal")).where(nodes.c.id != node_id)
    return [Node(*row) for row in connection.execute(query)]


def name_of(connection: Connection, node_id: int | None) -> str | None:
    """Return the name of a node; `None`: there is no such node."""
    name: str | None = connection.execute(select(nodes.c.name).where(nodes.c.id == node_id)).scalar()
    return name


def newest(connection: Connection) -> int:
    """Return the highest id of a node; it grows with each new node."""
    return int(connection.execute(select(func.coalesce(func.max(nodes.c.id), 0))).scalar_one())


def wait_for(connection: Connection, node_id: int, names: list[str] | None) -> None:
    """Note the queues (keys) that the idle node waits for, so that publications wake it; `None`: it is busy."""
    dialect_of(connection).wait_for(connection, node_id, names)


@lru_cache(maxsize=1)
def _rescued() -> Any:
    crashed = jobs.c.state == literal_column(f"'{State.RUNNING.value}'")
    return transitions.returned(HELD, jobs.c.node_id == bindparam("node"), crashed=crashed, begun=true()).of()


_FREED = (
    update(messages)
    .where(HELD, messages.c.node_id == bindparam("node"))
    .values(node_id=null(), fence=next_fence(messages))
)
_AUTO_DELETED = select(queues.c.name).where(queues.c.node_id == bindparam("node"), queues.c.auto_delete)
_DISOWNED = update(queues).where(queues.c.node_id == bindparam("node")).values(node_id=null(), used_at=now())
_ORPHANS = select(jobs.c.id, jobs.c.seq, jobs.c.fence, jobs.c.queue, jobs.c.state).where(
    HELD, jobs.c.node_id == bindparam("node")
)


def remove(database: Database, node_id: int, renewal: str | None = None) -> int | None:
    """Delete a node, and give back the jobs and messages that it held; return the number of its jobs.

    *renewal*: the `Node.renewal` last seen; if the lease was renewed since then, do nothing and return `None`.
    """
    removal = delete(nodes).where(nodes.c.id == node_id)
    if renewal is not None:
        removal = removal.where(renewal == _RENEWAL)
    with database.write() as connection:
        if not connection.execute(removal).rowcount and renewal is not None:
            return None
        held = connection.execute(_ORPHANS, {"node": node_id}).all()
        if held:
            connection.execute(_rescued(), {"node": node_id})
            database.events.changed(connection, seqs=[row.seq for row in held], is_rescue=True)
            running = [Hold(row.seq, row.fence, node_id) for row in held if row.state == State.RUNNING.value]
            note_crashes(connection, running)
            acts.note(connection, [row.id for row in held], "rescued", f"node {node_id}, which held it, was lost")
            database.dialect.wake(connection, {row.queue for row in held if row.queue}, len(held))
        connection.execute(_FREED, {"node": node_id})
        for name in connection.execute(_AUTO_DELETED, {"node": node_id}).scalars().all():
            delete_queue(connection, name)
        connection.execute(_DISOWNED, {"node": node_id})
        database.dialect.ring(connection)
    limits.sweep_all(database)
    return len(held)
