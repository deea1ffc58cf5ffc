"""Claiming: a node takes ready jobs."""

from __future__ import annotations

import logging
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
    Select,
    bindparam,
    desc,
    exists,
    literal_column,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.types import NullType

from kathikon_celery.job import Hold, Job, State, Use
from kathikon_celery.storage import limits, messages
from kathikon_celery.storage.clock import Instant
from kathikon_celery.storage.column_types import rows_of
from kathikon_celery.storage.dialects.parameters import Claim, Pick
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.finish import COMPLETED, completed
from kathikon_celery.storage.pauses import MAY_START, NOTHING_PAUSED, is_open
from kathikon_celery.storage.scan_start import ScanStart
from kathikon_celery.storage.tables import READY, jobs, nodes, ready_in
from kathikon_celery.storage.transitions import claimed

logger = logging.getLogger(__name__)

#: The columns that a worker needs to run a job. None is converted, so that a corrupt row does not fail its batch.
_DELIVERY = [
    jobs.c[name]
    for name in (
        "seq", "id", "queue", "task", "priority", "fence", "attempts", "crashes", "envelope", "body", "limits",
    )
]  # fmt: skip
_NAMES = [column.name for column in _DELIVERY]
_SEQ, _PRIORITY, _LIMITS, _SINCE_WHEN = (*(_NAMES.index(name) for name in ("seq", "priority", "limits")), len(_NAMES))
#: How often a claim claims again because jobs that it has claimed found their limits full.
ROUNDS = 20
_SINCE = type_coerce(jobs.c.available_at, NullType()).label("since")
_FROM = bindparam("from_queue", type_=jobs.c.queue.type)
# A node that other nodes took for dead gets no jobs, even if it does not know that yet.
_IS_ALIVE = or_(
    bindparam("by_node", type_=BigInteger()).is_(None),
    exists().where(nodes.c.id == bindparam("by_node", type_=BigInteger())),
)


class Waiting(NamedTuple):
    """A claim that finds fewer than *room* jobs also notes that the node waits for *queues* (keys).

    See `nodes.wait_for`. Only if the dialect ``wakes_by_name``.
    """

    queues: list[str]
    room: int


def _parts(marks: int) -> list[list[ColumnElement[bool]]]:
    """Return the conditions of a queue's parts, in the order of claiming; *marks*: number of `ScanStart.marks`."""
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


@lru_cache(maxsize=32)
def _claim(marks: int, knows_pauses: bool) -> Claim:
    """Return the claim from a queue; *marks*: number of its `ScanStart.marks`; see `Database.knows_pauses`."""
    ready = (
        select(jobs.c.seq)
        .where(ready_in(_FROM), _IS_ALIVE, *_unless_paused(_FROM, knows_pauses))
        .order_by(desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq)
        .limit(bindparam("at_most", type_=Integer()))
    )
    rows = tuple(ready.where(*part) for part in _parts(marks)) if marks else (ready,)
    change = claimed() if knows_pauses else claimed(NOTHING_PAUSED)
    return Claim(change, (*_DELIVERY, _SINCE), Pick(jobs, rows, "kathikon_jobs_ready"))


def _unless_paused(queue: ColumnElement[Any], knows_pauses: bool) -> list[ColumnElement[bool]]:
    return [is_open(queue), MAY_START] if knows_pauses else []


def is_anything_there(with_messages: bool, knows_pauses: bool) -> ColumnElement[bool]:
    """Return the condition that a job or a message is ready in one of the ``queues``, a list of keys.

    *knows_pauses*: see `Database.knows_pauses`.
    """
    queues = rows_of("queues")
    found = [_first(queues.c.value, knows_pauses), *([messages.first(queues.c.value)] if with_messages else [])]
    is_there = or_(*(one.limit(1).correlate(queues).scalar_subquery().is_not(None) for one in found))
    return select(literal_column("1")).select_from(queues).where(is_there).limit(1).scalar_subquery().is_not(None)


def _first(queue: Any, knows_pauses: bool) -> Select[Any]:
    # In the order of the index: see `messages.first`.
    ready = select(jobs.c.seq).where(ready_in(queue), *(_unless_paused(queue, knows_pauses) or [NOTHING_PAUSED]))
    return ready.order_by(desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq)


_QUEUES = rows_of("queues")
_FILLED = select(_QUEUES.c.value).where(
    _first(_QUEUES.c.value, True).limit(1).correlate(_QUEUES).scalar_subquery().is_not(None)
)


def filled(connection: Connection, queues: Sequence[str]) -> set[str]:
    """Return those of *queues* (keys) in which a job is ready."""
    return {queue for (queue,) in prepared.rows(connection, _FILLED, {"queues": list(queues)})}


def claim(
    database: Database,
    connection: Connection,
    queue: str,
    limit: int,
    node_id: int | None,
    front: ScanStart | None = None,
    waiting: Waiting | None = None,
) -> list[Job]:
    """Claim up to *limit* ready jobs of *queue* (a key): those of higher priority first, then those ready for longer.

    Arguments:
        front: where to start in this queue, known from earlier claims.
        waiting: what to note if this claim finds few jobs.
    """
    number, started = _claim_once(database, connection, queue, limit, node_id, front, waiting)
    if len(started) < number:
        return _rest(database, connection, queue, limit, node_id, front, waiting, started)
    return started


def _claim_once(
    database: Database,
    connection: Connection,
    queue: str,
    limit: int,
    node_id: int | None,
    front: ScanStart | None,
    waiting: Waiting | None,
) -> tuple[int, list[Job]]:
    """Return how many jobs were found, and those of them that may start."""
    look = _Look(database, front)
    values = look.parameters(queue, limit, node_id)
    rows = database.dialect.claim(connection, _claim(len(look.marks), database.knows_pauses), values, waiting)
    found = look.found(rows, node_id)
    started = limits.admit(database, connection, found)
    database.events.entered(connection, started, State.CLAIMED)
    return len(found), started


def _rest(
    database: Database,
    connection: Connection,
    queue: str,
    limit: int,
    node_id: int | None,
    front: ScanStart | None,
    waiting: Waiting | None,
    started: list[Job],
) -> list[Job]:
    """Go on with a claim that has *started* fewer jobs than it has found: the others wait in lines now."""
    for _ in range(ROUNDS):
        left = limit - len(started)
        if waiting is not None:
            waiting = waiting._replace(room=min(waiting.room, left))
        if not left:
            break
        number, more = _claim_once(database, connection, queue, left, node_id, front, waiting)
        started = started + more
        if len(more) == number:
            return started
    if waiting is not None and node_id is not None and len(started) < limit:
        database.dialect.wait_for(connection, node_id, waiting.queues)
    return started


# The queue is an expression: otherwise PostgreSQL, while it has no statistics, reads all ready jobs of the queue.
_IS_TOLD = (jobs.c.seq == bindparam("told"), jobs.c.queue.concat("") == bindparam("from_queue"))
_CLAIM_TOLD = {
    True: Claim(claimed(*_IS_TOLD, READY, _IS_ALIVE, is_open(_FROM), MAY_START), tuple(_DELIVERY)),
    False: Claim(claimed(*_IS_TOLD, READY, _IS_ALIVE, NOTHING_PAUSED), tuple(_DELIVERY)),
}


def claim_told(
    database: Database,
    connection: Connection,
    queue: str,
    seq: int,
    node_id: int,
    waiting: Waiting,
) -> list[Job]:
    """Claim the job *seq*, for which the node was woken, if it is still ready. Takes half the time of `claim`."""
    values = {"from_queue": queue, "told": seq, "by_node": node_id}
    rows = database.dialect.claim(connection, _CLAIM_TOLD[database.knows_pauses], values, waiting)
    found = limits.admit(database, connection, [_job(row, node_id) for row in rows])
    database.events.entered(connection, found, State.CLAIMED)
    if rows and not found and waiting.room:
        database.dialect.wait_for(connection, node_id, waiting.queues)
    return found


def _rehearse(database: Database, connection: Connection) -> None:
    """Run `claim_told` without a job until PostgreSQL keeps the plan: it plans a statement's first five runs."""
    for _ in range(6):
        claim_told(database, connection, "", -1, -1, Waiting([], 0))


def _job(row: Sequence[Any], node_id: int | None) -> Job:
    values = dict(zip(_NAMES, row, strict=False))
    values["limits"] = _limits_of(row) if row[_LIMITS] is not None else ()
    return Job(**values, state=State.CLAIMED, node_id=node_id)


def _limits_of(row: Sequence[Any]) -> tuple[Use, ...]:
    try:
        return limits.read(row[_LIMITS])
    except ValueError as error:
        logger.error("Kathikon: job %s runs without limits: corrupt row: %s", row[_NAMES.index("id")], error)
        return ()


class _Look:
    """One claim: where it starts, and which jobs it finds."""

    def __init__(self, database: Database, front: ScanStart | None) -> None:
        self._front = front if database.dialect.keeps_old_rows else None
        self.marks = self._front.marks() if self._front is not None else []
        self.values: dict[str, Any] = {}
        for number, (priority, since) in enumerate(self.marks):
            self.values |= {f"priority_{number}": priority, f"since_{number}": since}
        self._started = monotonic()

    def parameters(self, queue: str, limit: int, node_id: int | None) -> dict[str, Any]:
        return {"from_queue": queue, "at_most": limit, "by_node": node_id, **self.values}

    def found(self, rows: Sequence[Any], node_id: int | None) -> list[Job]:
        """Return the jobs of *rows*, in order. A row: the columns of `_DELIVERY`, then the time of becoming ready."""
        took, rows = monotonic() - self._started, _in_order(rows)
        if self._front is not None:
            self._front.looked([(row[_PRIORITY], row[_SINCE_WHEN]) for row in rows], not self.marks, took)
        return [_job(row, node_id) for row in rows]


def _in_order(rows: Sequence[Any]) -> list[Any]:
    try:
        return sorted(rows, key=lambda row: (-row[_PRIORITY], row[_SINCE_WHEN], row[_SEQ]))
    except TypeError:  # a row is corrupt: the others are delivered all the same
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
    if database.events:  # the listeners need the completed jobs, not only their number
        with database.dialect.atomic(connection):
            number = completed(database, connection, holds)
            return number, claim(database, connection, queue, limit, node_id, front, waiting)
    look = _Look(database, front)
    values, claims = look.parameters(queue, limit, node_id), _claim(len(look.marks), database.knows_pauses)
    number, rows = database.dialect.complete_and_claim(connection, COMPLETED, holds, claims, values, waiting)
    found = look.found(rows, node_id)
    started = limits.admit(database, connection, found)
    if len(started) < len(found):
        return number, _rest(database, connection, queue, limit, node_id, front, waiting, started)
    return number, started


def preparations(database: Database) -> Iterator[Callable[[Connection], None]]:
    """Yield steps, called with a connection, that compile and prepare statements before the first jobs need them."""
    dialect = database.dialect
    claims = [_claim(marks, database.knows_pauses) for marks in range(1 + dialect.keeps_old_rows)]
    steps = dialect.preparations(COMPLETED, claims)
    yield from islice(steps, 1)
    if dialect.wakes_by_name:
        yield partial(_rehearse, database)
    yield from steps


_CLAIMED_AGAIN = claimed(READY)


def claim_again(database: Database, connection: Connection, holds: Sequence[Hold], node_id: int) -> int:
    """Repeat those claims of *holds* that a crashed server has forgotten; return their number."""
    before = [hold._replace(fence=hold.fence - 1) for hold in holds]
    values = {"by_node": node_id}
    return database.dialect.change_held(connection, _CLAIMED_AGAIN, before, values, owned=False)
