"""Claiming: a node takes what is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from operator import itemgetter
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Connection,
    Integer,
    bindparam,
    desc,
    exists,
    false,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.types import NullType

from kathikon_celery.job import Hold, Job, State
from kathikon_celery.storage import messages
from kathikon_celery.storage.clock import Instant
from kathikon_celery.storage.dialects.parameters import Claim, Pick
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.finish import COMPLETED, completed
from kathikon_celery.storage.scan_start import ScanStart
from kathikon_celery.storage.tables import READY, jobs, nodes, ready_in
from kathikon_celery.storage.transitions import claimed

#: What a worker must know of a job in order to run it. Nothing of it is converted: a corrupt row spoils no batch.
_DELIVERY = [
    jobs.c[name]
    for name in ("seq", "id", "queue", "task", "priority", "fence", "attempts", "crashes", "envelope", "body")
]
_NAMES = [column.name for column in _DELIVERY]
_SEQ, _PRIORITY, _SINCE_WHEN = _NAMES.index("seq"), _NAMES.index("priority"), len(_NAMES)
_SINCE = type_coerce(jobs.c.available_at, NullType()).label("since")
# A node that was taken for dead, and does not know it yet, gets nothing.
_IS_ALIVE = or_(
    bindparam("by_node", type_=BigInteger()).is_(None),
    exists().where(nodes.c.id == bindparam("by_node", type_=BigInteger())),
)


class Waiting(NamedTuple):
    """With a claim it is said that the node waits for *queues*, if it finds fewer jobs than *room*.

    See `nodes.wait_for`. Only where the dialect ``wakes_by_name``.
    """

    queues: list[str]
    room: int


def _parts(marks: int) -> list[list[ColumnElement[bool]]]:
    """The conditions of the parts of a queue, in their order, where so many of its priorities have a mark."""
    parts: list[list[ColumnElement[bool]]] = []
    below: list[ColumnElement[bool]] = []
    for number in range(marks):
        priority = bindparam(f"priority_{number}", type_=BigInteger())
        parts.append([*below, jobs.c.priority > priority])
        parts.append(
            [jobs.c.priority == priority, jobs.c.available_at >= bindparam(f"since_{number}", type_=Instant())]
        )
        below = [jobs.c.priority < priority]
    return [*parts, below]


@lru_cache(maxsize=16)
def _claim(marks: int) -> Claim:
    """Return the claim from a queue with *marks* for so many of its priorities."""
    ready = (
        select(jobs.c.seq)
        .where(ready_in(bindparam("from_queue", type_=jobs.c.queue.type)), _IS_ALIVE)
        .order_by(desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq)
        .limit(bindparam("at_most", type_=Integer()))
    )
    rows = tuple(ready.where(*part) for part in _parts(marks)) if marks else (ready,)
    return Claim(claimed(), (*_DELIVERY, _SINCE), Pick(jobs, rows, "kathikon_jobs_ready"))


def is_anything_there(queues: int, with_messages: bool) -> ColumnElement[bool]:
    """Whether a job is ready in one of so many queues, the keys ``queue_0`` and so on; or a message."""
    # In the order of the index: see `messages.first`.
    first = []
    for number in range(queues):
        queue: Any = bindparam(f"queue_{number}", type_=jobs.c.queue.type)
        job = select(jobs.c.seq).where(ready_in(queue))
        first.append(job.order_by(desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq))
        if with_messages:
            first.append(messages.first(queue))
    return or_(false(), *(one.limit(1).scalar_subquery().is_not(None) for one in first))


def claim(
    database: Database,
    connection: Connection,
    queue: str,
    limit: int,
    node_id: int | None,
    front: ScanStart | None = None,
    waiting: Waiting | None = None,
) -> list[Job]:
    """Take up to *limit* ready jobs of the key *queue*: higher priority first, then longer ready.

    Arguments:
        front: of this queue, from the claims before.
        waiting: what is said with it.
    """
    look = _Look(database, front)
    values = look.parameters(queue, limit, node_id)
    rows = database.dialect.claim(connection, _claim(len(look.marks)), values, waiting)
    found = look.found(rows, node_id)
    database.events.entered(connection, found, State.CLAIMED)
    return found


# The queue as an expression: else PostgreSQL, before its first statistics, reads all that is ready in it.
_IS_TOLD = (jobs.c.seq == bindparam("told"), jobs.c.queue.concat("") == bindparam("from_queue"))
_CLAIM_TOLD = Claim(claimed(*_IS_TOLD, READY, _IS_ALIVE), tuple(_DELIVERY))


def claim_told(
    database: Database, connection: Connection, queue: str, seq: int, node_id: int, waiting: Waiting
) -> list[Job]:
    """`claim` of the one job that the node was called for, where it still waits: in half of the other's time."""
    values = {"from_queue": queue, "told": seq, "by_node": node_id}
    rows = database.dialect.claim(connection, _CLAIM_TOLD, values, waiting)
    found = [_job(row, node_id) for row in rows]
    database.events.entered(connection, found, State.CLAIMED)
    return found


def _rehearse(database: Database, connection: Connection) -> None:
    """Run `claim_told` for no job until PostgreSQL keeps its plan: the first five runs of a statement it plans anew."""
    for _ in range(6):
        claim_told(database, connection, "", -1, -1, Waiting([], 0))


def _job(row: Sequence[Any], node_id: int | None) -> Job:
    return Job(**dict(zip(_NAMES, row, strict=False)), state=State.CLAIMED, node_id=node_id)


class _Look:
    """Where a claim looks, and what it finds there."""

    def __init__(self, database: Database, front: ScanStart | None) -> None:
        self._front = front if database.dialect.keeps_old_rows else None
        self.marks = self._front.marks() if self._front is not None else []
        self.values: dict[str, Any] = {}
        for number, (priority, since) in enumerate(self.marks):
            self.values |= {f"priority_{number}": priority, f"since_{number}": since}
        self._started = monotonic()

    def parameters(self, queue: str, limit: int, node_id: int | None) -> dict[str, Any]:
        """The parameters of `_claim`."""
        return {"from_queue": queue, "at_most": limit, "by_node": node_id, **self.values}

    def found(self, rows: Sequence[Any], node_id: int | None) -> list[Job]:
        """The jobs of *rows*, which have the columns of `_DELIVERY`, and then the moment since which they are ready."""
        took, rows = monotonic() - self._started, _in_order(rows)
        if self._front is not None:
            self._front.looked([(row[_PRIORITY], row[_SINCE_WHEN]) for row in rows], not self.marks, took)
        return [_job(row, node_id) for row in rows]


def _in_order(rows: Sequence[Any]) -> list[Any]:
    try:
        return sorted(rows, key=lambda row: (-row[_PRIORITY], row[_SINCE_WHEN], row[_SEQ]))
    except TypeError:  # one of them is corrupt; the others are not to wait for that
        return sorted(rows, key=itemgetter(_SEQ))


def complete_and_claim(
    database: Database,
    connection: Connection,
    holds: Sequence[Hold],
    queue: str,
    limit: int,
    node_id: int,
    front: ScanStart | None = None,
    waiting: Waiting | None = None,
) -> tuple[int, list[Job]]:
    """Run `finish.completed` and `claim` at once, see `Dialect.completes_and_claims`; return the results of both."""
    if database.events:  # who listens wants to know which
        with database.dialect.atomic(connection):
            number = completed(database, connection, holds)
            return number, claim(database, connection, queue, limit, node_id, front, waiting)
    look = _Look(database, front)
    values, claims = look.parameters(queue, limit, node_id), _claim(len(look.marks))
    number, rows = database.dialect.complete_and_claim(connection, COMPLETED, holds, claims, values, waiting)
    return number, look.found(rows, node_id)


def preparations(database: Database) -> Iterator[Callable[[Connection], None]]:
    """What the first jobs would have to wait for, longer than they run, in steps; each takes a connection."""
    dialect = database.dialect
    claims = [_claim(marks) for marks in range(1 + dialect.keeps_old_rows)]
    steps = dialect.preparations(COMPLETED, claims)
    yield from islice(steps, 1)
    if dialect.wakes_by_name:
        yield partial(_rehearse, database)
    yield from steps


_CLAIMED_AGAIN = claimed(READY)


def claim_again(database: Database, connection: Connection, holds: Sequence[Hold], node_id: int) -> int:
    """Repeat claims that gave *holds* and that the server has forgotten; the number of them."""
    before = [hold._replace(fence=hold.fence - 1) for hold in holds]
    values = {"by_node": node_id}
    return database.dialect.change_held(connection, _CLAIMED_AGAIN, before, values, owned=False)
