"""Limits: which jobs may start, and which wait in the lines of limits that have no room.

A job with limits waits as ``blocked`` in the line of a limit, outside of the jobs that claims look at. `offer` lets as
many jobs out of a line as its limit has room for. They are candidates: a claim takes them as any job, and `admit`,
which follows, decides under the locks of their limits. A job that finds one of its limits full waits in the line of
that one.

What is in use is no counter. A slot names the row and the fence of a run: it is in use as long as a node holds the row
under that fence. So nothing has to be given back, whatever ends a run. After each change that may make room, `offer` is
called; to call it once more, or at the same time elsewhere, does no harm.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Double,
    Integer,
    Text,
    and_,
    bindparam,
    case,
    delete,
    desc,
    exists,
    false,
    func,
    insert,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.job import Hold, Job, State, Use
from kathikon_celery.storage import transitions
from kathikon_celery.storage.clock import Instant, now, seconds_until
from kathikon_celery.storage.column_types import rows_of
from kathikon_celery.storage.dialects.parameters import Pick, Upsert
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import label
from kathikon_celery.storage.rates import Rate
from kathikon_celery.storage.tables import BLOCKED, OFFERED, OFFERED_LATER, jobs, limit_keys, nodes, slots, values_of
from kathikon_celery.storage.tables import limits as numbers

logger = logging.getLogger(__name__)

#: The name of the limits by which the jobs of a unique key run one after the other.
TURNS = "unique"
#: How the names of the limits of queues begin.
OF_QUEUE = "queue:"
#: How many lines one sweep looks at.
SWEPT = 500
#: Seconds between two sweeps, which find what a process that was killed has left undone.
SWEEP_INTERVAL = 1.0
#: The latest moment for which anybody waits, in seconds since 1970: Python has no later years. A heavy job with
#: a slow rate may ask for one.
LATEST = 2.5e11
#: Slots of runs that are over are deleted when a key has more of them than this, and than slots in use.
RUBBISH = 20


# --- the column


def in_order(limits: Iterable[Use]) -> list[Use]:
    """Return the limits of a job in the order in which it waits for them, which is one order for all jobs.

    Jobs that wait in different orders could wait for each other for ever: each has left the line that the other one is
    in. A job waits for its turn first, then for keys of a few, then for what many share, and for its queue at last.
    """
    return sorted(
        limits, key=lambda use: (use.name != TURNS, use.key == use.name, use.key.startswith(OF_QUEUE), use.key)
    )


def written(limits: list[Use]) -> str:
    """Return the text of the column ``limits``."""
    return json.dumps([list(use) for use in limits], separators=(",", ":"))


@lru_cache(maxsize=4096)
def read(text: str | None) -> tuple[Use, ...]:
    """Return what `written` has written. Raises `ValueError` for another text."""
    if text is None:
        return ()
    try:
        found = tuple(Use(*one) for one in json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"no list of limits: {error}") from error
    if not all(map(_is_sound, found)) or len({use.key for use in found}) < len(found):
        raise ValueError(f"no list of limits: {text[:200]}")
    return found


def _is_sound(use: Use) -> bool:
    numbers = (use.weight, use.burst, *(one for one in (use.concurrency, use.rate) if one is not None))
    are_texts = isinstance(use.key, str) and isinstance(use.name, str)
    is_per = isinstance(use.per, int | float) and use.per > 0
    return are_texts and is_per and all(isinstance(one, int) and one >= 0 for one in numbers) and use.weight > 0


def keys_of(batch: Iterable[Job]) -> set[str]:
    """Return the keys of all limits of these jobs."""
    return {use.key for job in batch for use in job.limits}


# --- what there is room for

_KEYS = rows_of("keys", hides_length=True)
_KEY: ColumnElement[str] = _KEYS.c.value
_RUNS = exists().where(jobs.c.seq == slots.c.seq, jobs.c.fence == slots.c.fence, jobs.c.node_id.is_not(None))
_LIVES = and_(slots.c.node_id.is_not(None), exists().where(nodes.c.id == slots.c.node_id))
#: The condition that a slot counts.
IN_USE = or_(_RUNS, _LIVES)
_LINE = (
    select(jobs.c.limits, jobs.c.queue)
    .where(BLOCKED, jobs.c.gate == _KEY)
    .order_by(jobs.c.queue, desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq)
    .limit(1)
    .correlate(_KEYS)
)


def _set_or(name: str) -> ColumnElement[Any]:
    """Return the number of a limit that counts: the operator's, or else the code's."""
    column = numbers.c[name]
    return case((numbers.c.is_set, numbers.c[f"set_{name}"]), else_=column).label(name)


def _looking(with_lines: bool) -> Any:
    """SELECT what `Room` knows of each of ``keys``."""
    # Joins: PostgreSQL takes several times as long for the conditions of `IN_USE`.
    runs = and_(jobs.c.seq == slots.c.seq, jobs.c.fence == slots.c.fence, jobs.c.node_id.is_not(None))
    held = slots.outerjoin(jobs, runs).outerjoin(nodes, nodes.c.id == slots.c.node_id)
    is_in_use = or_(jobs.c.seq.is_not(None), nodes.c.id.is_not(None))
    in_use = select(func.coalesce(func.sum(case((is_in_use, slots.c.weight), else_=0)), 0))
    in_use = in_use.select_from(held).where(slots.c.key == _KEY)
    taken = select(func.coalesce(func.sum(slots.c.weight), 0)).where(slots.c.key == _KEY)
    columns: list[Any] = [
        _KEY,
        limit_keys.c.key.is_not(None),
        numbers.c.name.is_not(None),
        *(_set_or(name) for name in ("concurrency", "rate", "per", "burst")),
        limit_keys.c.next_token,
        limit_keys.c.closed_until,
        limit_keys.c.wake_at,
        now(),
        in_use.correlate(_KEYS).scalar_subquery(),
        taken.correlate(_KEYS).scalar_subquery(),
    ]
    if with_lines:
        last = select(func.max(jobs.c.queue)).where(BLOCKED, jobs.c.gate == _KEY).correlate(_KEYS)
        columns += [
            _LINE.with_only_columns(jobs.c.limits).scalar_subquery(),
            _LINE.with_only_columns(jobs.c.queue).scalar_subquery(),
            last.scalar_subquery(),
        ]
    known = _KEYS.outerjoin(limit_keys, limit_keys.c.key == _KEY)
    return select(*columns).select_from(known.outerjoin(numbers, numbers.c.name == limit_keys.c.name))


_LOOK, _LOOK_AT_LINES = _looking(False), _looking(True)
_LOCK = (
    select(limit_keys.c.key)
    .select_from(_KEYS.join(limit_keys, limit_keys.c.key == _KEY))
    .order_by(limit_keys.c.key)
    .with_for_update(of=limit_keys)
)
_NEW_KEY = Upsert(
    limit_keys,
    (limit_keys.c.key,),
    {
        "key": bindparam("new_key", type_=limit_keys.c.key.type),
        "name": bindparam("new_name", type_=limit_keys.c.name.type),
    },
)
_SLOT = {
    "key": bindparam("of_key", type_=slots.c.key.type),
    "seq": bindparam("of_seq", type_=BigInteger()),
    "fence": bindparam("of_fence", type_=Integer()),
    "node_id": bindparam("of_node", type_=BigInteger()),
    "weight": bindparam("of_weight", type_=Integer()),
}
#: So many slots are taken in one statement, at most.
TAKEN_AT_ONCE = 20


@lru_cache(maxsize=TAKEN_AT_ONCE)
def _take(number: int) -> Any:
    """INSERT of so many slots; the parameters of each end in its place."""
    types = {name: bind.type for name, bind in _SLOT.items()}
    rows = [{name: bindparam(f"{name}_{one}", type_=kind) for name, kind in types.items()} for one in range(number)]
    return insert(slots).values(rows)


def take_slots(connection: Connection, taken: list[dict[str, Any]]) -> None:
    """Write slots, whose keys are locked. *taken*: their values by column."""
    for start in range(0, len(taken), TAKEN_AT_ONCE):
        some = taken[start : start + TAKEN_AT_ONCE]
        values = {f"{name}_{place}": value for place, one in enumerate(some) for name, value in one.items()}
        prepared.count(connection, _take(len(some)), values)


_CHARGE = (
    update(limit_keys)
    .where(limit_keys.c.key == bindparam("of_key"))
    .values(next_token=bindparam("token", type_=Double()), wake_at=bindparam("wake", type_=Instant()))
)
_WAKE = (
    update(limit_keys).where(limit_keys.c.key == bindparam("of_key")).values(wake_at=bindparam("wake", type_=Instant()))
)
#: Unless it was set anew.
_STOP_ALARM = (
    update(limit_keys)
    .where(limit_keys.c.key == bindparam("of_key"), limit_keys.c.wake_at == bindparam("before", type_=Instant()))
    .values(wake_at=null())
)
_CLEAN = delete(slots).where(slots.c.key == bindparam("of_key"), ~IN_USE)


@dataclass
class Room:
    """The room of one key, as `_LOOK` has read it."""

    key: str
    is_known: bool
    has_numbers: bool
    concurrency: int | None
    rate: int | None
    per: float | None
    burst: int | None
    state: float | None
    closed_until: float | None
    wake_at: datetime | None
    now: datetime
    in_use: int
    taken: int
    head: str | None = None
    first_queue: str | None = None
    last_queue: str | None = None
    is_charged: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.at = self.now.timestamp()
        self._use(self.concurrency, self.rate, self.per, self.burst)

    def _use(self, concurrency: int | None, rate: int | None, per: float | None, burst: int | None) -> None:
        self.most = concurrency
        self.tokens = Rate(rate, per or 1.0, min(burst or 1, rate)) if rate else None
        self.is_shut = rate == 0 or (self.closed_until or 0.0) > self.at

    def as_code_says(self, use: Use) -> Room:
        """Take the numbers from *use*, unless the database has numbers."""
        if not self.has_numbers:
            self._use(use.concurrency, use.rate, use.per, use.burst)
        return self

    def room(self, weight: int) -> int:
        """Return how many runs of *weight* may start now."""
        if self.is_shut:
            return 0
        found = []
        if self.most is not None:
            # More weight than there is at all: such a job runs alone.
            found.append((self.most - self.in_use) // max(1, min(weight, self.most)))
        if self.tokens is not None:
            found.append(self.tokens.tokens(self.state, self.at) // min(weight, self.tokens.burst))
        return max(0, min(found, default=2**31 - 1))

    def take(self, weight: int) -> None:
        self.in_use += weight
        if self.tokens is not None:
            self.state = self.tokens.taken(self.state, self.at, weight)
            self.is_charged = True

    def next_room(self, weight: int) -> datetime | None:
        """Return when there is room for a run of *weight* by the clock alone; `None`: no clock makes room."""
        if self.most is not None and self.most - self.in_use < min(weight, self.most or 1):
            return None
        moments = []
        if (self.closed_until or 0.0) > self.at:
            moments.append(self.closed_until or 0.0)
        if self.tokens is not None:
            moments.append(self.tokens.next_at(self.state, self.at, weight))
        return datetime.fromtimestamp(min(max(moments), LATEST), timezone.utc) if moments else None


def locked(connection: Connection, uses: Mapping[str, Use]) -> dict[str, Room] | None:
    """Lock the keys, in order, and return what there is of each; `None`: one of them has no row to lock yet."""
    names = sorted(uses)
    if len(prepared.rows(connection, _LOCK, {"keys": names})) < len(names):
        return None
    # A statement of its own: what was committed before we had the locks is seen only by a later snapshot.
    rows = prepared.rows(connection, _LOOK, {"keys": names})
    return {row[0]: Room(*row).as_code_says(uses[row[0]]) for row in rows}


def look(connection: Connection, keys: Collection[str]) -> list[Room]:
    """Return the room of these keys, without locks: as it is now."""
    return [Room(*row) for row in prepared.rows(connection, _LOOK, {"keys": sorted(keys)})]


def enter(database: Database, connection: Connection, uses: Mapping[str, Use]) -> None:
    """Insert those keys that are not there. Not while others are locked: a process that inserts one may wait for us."""
    rows = [{"new_key": name, "new_name": uses[name].name} for name in sorted(uses)]
    database.dialect.upsert_many(connection, _NEW_KEY, rows)


def admit(database: Database, connection: Connection, found: list[Job]) -> list[Job]:
    """Return those of the jobs *found*, just claimed by this node, that may start; the others wait in lines."""
    limited = [job for job in found if job.limits]
    if not limited:
        return found
    database.knows_limits = database.has_limits_to_prune = True
    while (parked := _admit(database, connection, limited)) is None:
        enter(database, connection, {use.key: use for job in limited for use in job.limits})
    if not parked:
        return found
    # What was released before the jobs were seen in their lines; and what they were let out of another line for.
    offer_by(database, connection, keys_of(job for job in limited if job.hold in parked))
    return [job for job in found if job.hold not in parked]


def _admit(database: Database, connection: Connection, limited: list[Job]) -> set[Hold] | None:
    """Take slots for those that may start, and put the others into lines; return those, `None` if a key is missing."""
    uses = {use.key: use for job in limited for use in job.limits}
    parked: defaultdict[str, list[Hold]] = defaultdict(list)
    taken = []
    with database.dialect.atomic(connection, is_planned=True):
        known = locked(connection, uses)
        if known is None:
            return None
        for job in limited:
            full = next((use for use in job.limits if not known[use.key].room(use.weight)), None)
            if full is not None:
                parked[full.key].append(job.hold)
                continue
            for use in job.limits:
                known[use.key].take(use.weight)
                of_run = {"seq": job.seq, "fence": job.fence, "node_id": None}
                taken.append({"key": use.key, "weight": use.weight, **of_run})
        take_slots(connection, taken)
        for one in known.values():
            charge(database, connection, one)
            if one.taken - one.in_use > max(RUBBISH, one.in_use):
                prepared.count(connection, _CLEAN, {"of_key": one.key})
        for gate, holds in parked.items():
            which = database.events.which()
            database.dialect.change_held(connection, _PARKED, holds, {"at_gate": gate}, which=which)
            database.events.entered(connection, which, State.BLOCKED)
    return set(chain.from_iterable(parked.values()))


def charge(database: Database, connection: Connection, room: Room) -> None:
    """Write the tokens that were taken of a rate, if it has one."""
    if room.is_charged:
        values = {"of_key": room.key, "token": room.state, "wake": room.next_room(1)}
        prepared.count(connection, _CHARGE, values)
        database.has_taken_tokens = True


def give_tokens_back(database: Database, unbegun: Iterable[Job]) -> None:
    """Give back what jobs took of rates that were claimed, and given back before their tasks began."""
    weights, uses = Counter[str](), {}
    for job in unbegun:
        for use in job.limits:
            weights[use.key] += use.weight
            uses[use.key] = use

    def write(again: bool) -> None:
        with database.once() as connection, database.dialect.atomic(connection, is_planned=True):
            for key, room in (locked(connection, uses) or {}).items() if not again else ():
                if room.tokens is not None and room.state is not None:
                    room.state -= weights[key] * room.tokens.step
                    room.is_charged = True
                charge(database, connection, room)

    if uses:
        database.patiently(write)


_PARKED = transitions.parked()


def take_again(database: Database, connection: Connection, held: Iterable[Job]) -> None:
    """Take the slots of jobs that this node runs, if a crashed server has forgotten that they were taken."""
    for job in held:
        for use in job.limits:
            values = {"of_key": use.key, "of_seq": job.seq, "of_fence": job.fence, "of_node": None}
            database.dialect.upsert(connection, _TAKE_AGAIN, {**values, "of_weight": use.weight})


_TAKE_AGAIN = Upsert(slots, (slots.c.key, slots.c.seq, slots.c.fence), _SLOT)


# --- letting jobs out of lines


def _offered(condition: Any, column: Any) -> Any:
    # In the order of the index, so that no planner reads the table instead: nearly all rows may fit.
    found: Any = select(jobs.c.seq).where(condition, column == bindparam("of_gate"), _IN_QUEUE)
    found = found.order_by(jobs.c.available_at).limit(_ROOM)
    return select(func.count()).select_from(found.subquery()).scalar_subquery()


_IN_QUEUE = jobs.c.queue == bindparam("of_queue", type_=jobs.c.queue.type)
_ROOM = bindparam("room", type_=Integer())
_LEFT = select(
    (_ROOM - _offered(OFFERED, jobs.c.line) - _offered(OFFERED_LATER, jobs.c.gate)).label("number")
).subquery()
_NEXT = (
    select(jobs.c.seq)
    .where(BLOCKED, jobs.c.gate == bindparam("of_gate", type_=jobs.c.gate.type), _IN_QUEUE)
    .order_by(desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq)
    .limit(select(case((_LEFT.c.number > 0, _LEFT.c.number), else_=0)).scalar_subquery())
)
_PICK_NEXT = Pick(jobs, (_NEXT,), "kathikon_jobs_blocked")


def _heads() -> Any:
    """SELECT the first job of the line of each of ``keys`` from which none has been let out."""
    other = jobs.alias("other")
    first = select(other.c.seq).where(BLOCKED, other.c.gate == _KEY)
    first = first.order_by(other.c.queue, desc(other.c.priority), other.c.available_at, other.c.seq).limit(1)
    # Scalars: a planner would make a join of EXISTS, and read all that is out.
    out = [
        select(other.c.seq).where(OFFERED, other.c.line == _KEY).limit(1),
        select(other.c.seq).where(OFFERED_LATER, other.c.gate == _KEY).limit(1),
    ]
    is_none_out = and_(*(one.correlate(_KEYS).scalar_subquery().is_(None) for one in out))
    found = select(first.correlate(_KEYS).scalar_subquery()).select_from(_KEYS).where(is_none_out)
    return select(jobs.c.seq).where(BLOCKED, jobs.c.seq.in_(found))


_PICK_HEADS = Pick(jobs, (_heads(),), "kathikon_jobs_blocked")
_OFFERED = transitions.offered()
_NEXT_HEAD = (
    select(jobs.c.queue, jobs.c.limits)
    .where(
        BLOCKED,
        jobs.c.gate == bindparam("of_gate", type_=jobs.c.gate.type),
        jobs.c.queue > bindparam("of_queue", type_=jobs.c.queue.type),
    )
    .order_by(jobs.c.queue, desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq)
    .limit(1)
)


def offer(database: Database, keys: Collection[str]) -> int:
    """Let as many jobs out of the lines of *keys* as there is room for, and wake nodes for them; return their number.

    Call this after the commit of what may have made room, or has put jobs into these lines.
    """
    if not keys:
        return 0
    with database.once() as connection:
        return offer_by(database, connection, keys)


def offer_by(database: Database, connection: Connection, keys: Collection[str]) -> int:
    """`offer` by a connection of `Database.once`, or as a part of its transaction."""
    looked = _look_at_lines(connection, sorted(keys))
    new = {one.key: _use_of(one.head, one.key)[0] for one in looked if one.head is not None and not one.is_known}
    if new and not database.is_guest:  # whose numbers an operator may have set
        enter(database, connection, new)
        looked = _look_at_lines(connection, sorted(keys))
    lines = [_Line(connection, one) for one in looked if one.head is not None or one.wake_at is not None]
    if not lines:
        return 0
    with database.dialect.atomic(connection, is_planned=True):
        if not database.is_guest:
            for line in lines:  # this locks their keys, in order
                line.set_alarm(database, connection)
        # Jobs that have waited in another line already come before those of that line: so a key with many jobs does not
        # pass all others at the limit that they share.
        lines.sort(key=lambda line: -line.depth)
        let_out = Counter[str]()
        single = [line.key for line in lines if line.lets_out_one and line.depth == lines[0].depth]
        if len(single) > 1:
            let_out.update(_let_out_heads(database, connection, single))
            lines = [line for line in lines if line.key not in single]
        for line in lines:
            let_out.update(line.let_out(database, connection))
        for queue, number in let_out.items():
            if number:
                database.dialect.wake(connection, [queue], number)
        return let_out.total()


def _look_at_lines(connection: Connection, keys: list[str]) -> list[Room]:
    return sorted((Room(*row) for row in prepared.rows(connection, _LOOK_AT_LINES, {"keys": keys})), key=_BY_KEY)


_BY_KEY = attrgetter("key")


class _Line:
    """The jobs that wait for one limit, by queue: a queue that nobody consumes must not hold up another."""

    def __init__(self, connection: Connection, key: Room) -> None:
        self.key, self._of = key.key, key
        #: How many lines the first job has left behind it.
        self.depth = 0
        self._rooms: dict[str, int] = {}
        moments = []
        queue, head = key.first_queue, key.head
        while queue is not None:
            use, depth = _use_of(head, key.key)
            self.depth = max(self.depth, depth)
            self._rooms[queue] = key.as_code_says(use).room(use.weight)
            if not self._rooms[queue]:
                moments.append(key.next_room(use.weight))
            if queue == key.last_queue:
                break
            found = prepared.rows(connection, _NEXT_HEAD, {"of_gate": key.key, "of_queue": queue})
            queue, head = found[0] if found else (None, None)
        self._alarm = min((moment for moment in moments if moment is not None), default=None)

    def set_alarm(self, database: Database, connection: Connection) -> None:
        """Note when there will be room."""
        before = self._of.wake_at
        if self._alarm is None:
            # What has been let out meanwhile sets the next alarm when it starts, or finds that it cannot.
            if before is not None and (before <= self._of.now or not self._rooms):
                prepared.count(connection, _STOP_ALARM, {"of_key": self.key, "before": before})
        elif self._alarm != before:
            prepared.count(connection, _WAKE, {"of_key": self.key, "wake": self._alarm})
            database.dialect.ring(connection)

    @property
    def lets_out_one(self) -> bool:
        """Whether there is room for one job, and all jobs of the line are in one queue."""
        return list(self._rooms.values()) == [1]

    def let_out(self, database: Database, connection: Connection) -> dict[str, int]:
        """Let as many jobs of each queue out as there is room for; return their numbers."""
        numbers = {}
        for queue, room in self._rooms.items():
            if room:
                which = database.events.which()
                values = {"of_gate": self.key, "of_queue": queue, "room": room}
                taken = database.dialect.pick_and_change(connection, _OFFERED, _PICK_NEXT, (), values, which=which)
                database.events.entered(connection, which, State.AVAILABLE)
                numbers[queue] = taken.number
        return numbers


def _let_out_heads(database: Database, connection: Connection, keys: list[str]) -> Counter[str]:
    """Let the first job out of each of these lines, unless one is out; return the number of jobs of each queue."""
    which = database.events.which()
    taken = database.dialect.pick_and_change(
        connection, _OFFERED, _PICK_HEADS, (jobs.c.queue,), {"keys": sorted(keys)}, which=which
    )
    database.events.entered(connection, which, State.AVAILABLE)
    return Counter(queue for (queue,) in taken.rows)


def _use_of(text: str | None, key: str) -> tuple[Use, int]:
    """Return what a job with the limits *text* takes of *key*, and the place of that limit among its limits."""
    try:
        found = next(((use, place) for place, use in enumerate(read(text)) if use.key == key), None)
    except ValueError:
        found = None
    return found or (Use(key, key, concurrency=1), 0)  # a corrupt row: the worker will say so


_NEXT_WAKE = select(seconds_until(func.min(limit_keys.c.wake_at))).scalar_subquery()
_IS_ANY_BLOCKED = select(jobs.c.seq).where(BLOCKED).order_by(jobs.c.gate).limit(1).scalar_subquery().is_not(None)
#: Seconds until `offer_due` has something to do; NULL: no job waits for a limit.
NEXT_OFFER = select(
    case(
        (_IS_ANY_BLOCKED, case((_NEXT_WAKE < SWEEP_INTERVAL, _NEXT_WAKE), else_=SWEEP_INTERVAL)),
        else_=_NEXT_WAKE,
    )
)
_DUE = (
    select(limit_keys.c.key)
    .where(limit_keys.c.wake_at <= now())
    .order_by(limit_keys.c.wake_at)
    .limit(bindparam("at_most", type_=Integer()))
)
_GATES = values_of(jobs.c.gate, and_(BLOCKED, jobs.c.gate > bindparam("after", type_=jobs.c.gate.type))).limit(SWEPT)


def next_offer(connection: Connection) -> float | None:
    """Return the seconds until `offer_due` has something to do (negative: overdue), or `None`."""
    value = prepared.rows(connection, NEXT_OFFER, {})[0][0]
    return None if value is None else float(value)


def offer_due(database: Database) -> int:
    """`offer` for the keys whose rate has a token again."""
    with database.read() as connection:
        due = [key for (key,) in prepared.rows(connection, _DUE, {"at_most": SWEPT})]
    return offer(database, due)


def sweep(database: Database, after: str = "") -> str:
    """`offer` for the next `SWEPT` lines behind the key *after*; return the last one, empty if there are no more."""
    with database.read() as connection:
        gates = [key for (key,) in prepared.rows(connection, _GATES, {"after": after})]
    offer(database, gates)
    return gates[-1] if len(gates) == SWEPT else ""


def sweep_all(database: Database) -> None:
    """`offer` for all lines: a process was lost that may not have done so."""
    after = sweep(database)
    while after:
        after = sweep(database, after)


# --- numbers

_NUMBERS = ("concurrency", "rate", "per", "burst")
_NAMED = {
    "name": bindparam("of_name", type_=numbers.c.name.type),
    "label": bindparam("of_label", type_=Text()),
}
_OF_CODE = {name: bindparam(f"new_{name}", type_=numbers.c[name].type) for name in _NUMBERS}
_DEFINE = Upsert(
    numbers,
    (numbers.c.name,),
    {**_NAMED, **_OF_CODE, "is_set": false()},
    lambda new: {name: new[name] for name in _NUMBERS},
)


def define(database: Database, uses: Iterable[Use]) -> None:
    """Write the numbers that the code has for these limits. Those that an operator has set stay, and count."""
    rows = [
        {"of_name": use.name, "of_label": label(use.name), **{f"new_{name}": getattr(use, name) for name in _NUMBERS}}
        for use in sorted(uses, key=lambda use: use.name)
    ]

    def write(again: bool) -> None:
        with database.write() as connection:
            database.dialect.upsert_many(connection, _DEFINE, rows)

    if rows:
        database.knows_limits = True
        database.patiently(write, patient=False)


def close(database: Database, key: str, seconds: float) -> None:
    """Let no job with the limit *key* start for so many *seconds*."""

    def write(again: bool) -> None:
        with database.write() as connection:
            enter(database, connection, {key: Use(key, key)})
            known = (locked(connection, {key: Use(key, key)}) or {})[key]
            until = max(known.at + seconds, known.closed_until or 0.0)
            wake = datetime.fromtimestamp(until, timezone.utc)
            connection.execute(_CLOSE, {"of_key": key, "until": until, "wake": wake})
            database.dialect.ring(connection)

    database.patiently(write)


_CLOSE = (
    update(limit_keys)
    .where(limit_keys.c.key == bindparam("of_key"))
    .values(closed_until=bindparam("until", type_=Double()), wake_at=bindparam("wake", type_=Instant()))
)
