"""The limits in an operator's hands: reads them and their keys, and changes their numbers at run time.

What an operator has set counts until `reset`, whatever the code says. Lower numbers take nothing from jobs that run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Double, Integer, bindparam, case, delete, exists, func, or_, select, update

from kathikon_celery.job import Use
from kathikon_celery.settings.checks import WINDOWS, did_you_mean
from kathikon_celery.storage import limits as rooms
from kathikon_celery.storage.acts import Act, begin, is_known
from kathikon_celery.storage.clock import now, seconds, seconds_until
from kathikon_celery.storage.column_types import rows_of
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.errors import NotFound
from kathikon_celery.storage.names import key, name_of, printable
from kathikon_celery.storage.rates import Rate
from kathikon_celery.storage.tables import BLOCKED, jobs, limit_keys, limits, slots

#: The highest number of jobs, keys or slots that is counted.
MOST = 10_000
#: Keys that one statement changes, or one look reads.
CHUNK = 500
#: Seconds for which a key stays after its moments are past.
LATER = 60.0
#: The numbers of a limit, in code as in a table.
COLUMNS = ("concurrency", "rate", "per", "burst")
_WINDOWS = {per: word for word, per in WINDOWS.items()}


@dataclass(frozen=True)
class Numbers:
    """What a limit allows. Its `str` says it in words.

    >>> str(kathikon.limits.get("stripe").numbers)
    '60/m'

    Arguments:
        concurrency: how many of its jobs run at once; `None`: any number; 0: no job starts.
        rate: how many of its jobs start in *per* seconds; `None`: any number.
        per: the length of the rate's window, in seconds.
        burst: how many of the rate may start at once.
    """

    concurrency: int | None = None
    rate: int | None = None
    per: float = 1.0
    burst: int = 1

    def __str__(self) -> str:
        parts = [] if self.concurrency is None else [f"{self.concurrency} at once"]
        if self.rate is not None:
            parts.append(self.pace + (f", burst {self.burst}" if self.burst > 1 else ""))
        return ", ".join(parts) or "no limit"

    @property
    def pace(self) -> str:
        """The rate in words; empty: there is none."""
        if self.rate is None:
            return ""
        window = _WINDOWS.get(self.per)
        return f"{self.rate}/{window}" if window else f"{self.rate} in {self.per:g} s"


@dataclass(frozen=True)
class LimitStatus:
    """One limit, as it is now. Each number of jobs or keys is at most `MOST` (10,000): then there may be more.

    >>> limit = kathikon.limits.get("stripe")
    >>> limit.in_use, limit.blocked, limit.next_in
    (2, 17, 0.8)

    Arguments:
        name: as the code says it, with its fields.
        numbers: those that count.
        of_code: those of the code, as the worker that was started last knows it.
        of_operator: those that an operator has set; `None`: the code's count.
        operator: who has set or reset them last; `None`: nobody.
        reason: why.
        changed_at: when, as an aware datetime.
        keys: how many values of its fields have been used lately; 1 or 0 without fields.
        in_use: what its running jobs take, in all keys.
        blocked: jobs that wait in its lines.
        next_in: seconds until a rate lets a job start that waits; `None`: no job waits for a moment.
    """

    name: str
    numbers: Numbers
    of_code: Numbers
    of_operator: Numbers | None = None
    operator: str | None = None
    reason: str | None = None
    changed_at: datetime | None = None
    keys: int = 0
    in_use: int = 0
    blocked: int = 0
    next_in: float | None = None


@dataclass(frozen=True)
class KeyStatus:
    """One key of a limit, as it is now. Its `str` says what the key's jobs wait for.

    >>> key = kathikon.limits.keys("account:{account_id}")[0]
    >>> key.key, str(key)
    ('account:7', '1 of 1 in use')

    Arguments:
        key: the limit for one value of its fields, such as ``account:7``.
        numbers: those that count.
        in_use: what its running jobs take.
        blocked: jobs that wait in its line, at most `MOST`.
        has_room: whether a job of weight 1 may start now.
        next_in: seconds until one may by the clock alone; `None`: no clock makes room.
        closed_for: seconds for which a task has closed the key; `None`: it is open.
    """

    key: str
    numbers: Numbers
    in_use: int = 0
    blocked: int = 0
    has_room: bool = True
    next_in: float | None = None
    closed_for: float | None = None

    def __str__(self) -> str:
        """Say what the key's jobs wait for."""
        if self.closed_for is not None:
            return f"closed for {self.closed_for:,.1f} s by a task"
        most = self.numbers.concurrency
        if most is not None and (self.in_use >= most or self.has_room or self.numbers.rate is None):
            return f"{self.in_use} of {most} in use"
        if self.numbers.rate is not None and self.next_in is not None:
            of = f"the next of {self.numbers.rate} in {self.numbers.per:g} s"
            return f"{of} starts {f'in {self.next_in:,.1f} s' if self.next_in > 0 else 'now'}"
        return "there is room"


# --- what there is

_BY_NAME = select(limits).order_by(limits.c.name)
_NAME = bindparam("of_name", type_=limits.c.name.type)
_ONE = select(limits).where(limits.c.name == _NAME)


def _capped(of: Any) -> Any:
    return select(func.count()).select_from(of.limit(MOST).subquery())


_KEYS = _capped(select(limit_keys.c.key).where(limit_keys.c.name == _NAME))
_WAITING = _capped(
    select(jobs.c.seq).join_from(limit_keys, jobs, jobs.c.gate == limit_keys.c.key).where(
        limit_keys.c.name == _NAME, BLOCKED
    )
)  # fmt: skip
_NEXT = select(func.min(seconds_until(limit_keys.c.wake_at))).where(limit_keys.c.name == _NAME)
_IN_USE_BY_NAME = (
    select(limit_keys.c.name, func.sum(slots.c.weight))
    .join_from(slots, limit_keys, limit_keys.c.key == slots.c.key)
    .where(rooms.IN_USE)
    .group_by(limit_keys.c.name)
)


def every(connection: Connection) -> list[LimitStatus]:
    """Return all limits, by name."""
    return _read(connection, connection.execute(_BY_NAME).all())


def fetch(connection: Connection, name: str) -> LimitStatus:
    """Return the limit called *name*. Raises `NotFound`."""
    rows = connection.execute(_ONE, {"of_name": key(name)}).all()
    if not rows:
        raise _unknown(connection, name)
    return _read(connection, rows)[0]


def _read(connection: Connection, rows: Any) -> list[LimitStatus]:
    in_use = {name: int(number) for name, number in connection.execute(_IN_USE_BY_NAME)} if rows else {}
    found = []
    for row in rows:
        of = {"of_name": row.name}
        code, own = _numbers(row, ""), _numbers(row, "set_") if row.is_set else None
        found.append(
            LimitStatus(
                name_of(row.label), own or code, code, own, row.operator, row.reason, row.changed_at,
                connection.execute(_KEYS, of).scalar_one(), in_use.get(row.name, 0),
                connection.execute(_WAITING, of).scalar_one(), connection.execute(_NEXT, of).scalar_one(),
            )
        )  # fmt: skip
    return found


def _numbers(row: Any, prefix: str) -> Numbers:
    concurrency, rate, per, burst = (
        getattr(row, f"{prefix}{name}") for name in ("concurrency", "rate", "per", "burst")
    )
    return Numbers(concurrency, rate, 1.0 if per is None else per, 1 if burst is None else burst)


def _unknown(connection: Connection, name: str) -> NotFound:
    names = [name_of(one) for (one,) in connection.execute(select(limits.c.label).order_by(limits.c.name).limit(CHUNK))]
    of = connection.execute(select(limit_keys.c.name).where(limit_keys.c.key == key(name))).scalar()
    if of is not None:
        return NotFound(f"there is no limit {name!r}: that is a key of the limit {of!r}")
    there = f"there are: {', '.join(map(repr, names))}" if names else "no worker has told of any limit yet"
    return NotFound(f"there is no limit {name!r}; {there}{did_you_mean(name, names)}")


_RUN = (
    select(func.coalesce(func.sum(slots.c.weight), 0))
    .where(slots.c.key == limit_keys.c.key, rooms.IN_USE)
    .correlate(limit_keys)
    .scalar_subquery()
)
_IN_LINE = select(func.count()).where(BLOCKED, jobs.c.gate == limit_keys.c.key).correlate(limit_keys).scalar_subquery()
_FULLEST = (
    select(limit_keys.c.key, _IN_LINE.label("waiting"), _RUN.label("running"))
    .where(limit_keys.c.name == _NAME)
    .order_by(_IN_LINE.desc(), _RUN.desc(), limit_keys.c.key)
    .limit(bindparam("at_most", type_=Integer()))
)


def keys_of(connection: Connection, name: str, at_most: int) -> list[KeyStatus]:
    """Return up to *at_most* keys of a limit: those with the most waiting and running jobs first. Raises `NotFound`."""
    if connection.execute(_ONE, {"of_name": key(name)}).first() is None:
        raise _unknown(connection, name)
    rows = connection.execute(_FULLEST, {"of_name": key(name), "at_most": at_most}).all()
    waiting = {row.key: row.waiting for row in rows}
    found = {one.key: _status(one, waiting[one.key]) for one in rooms.look(connection, list(waiting))}
    return [found[one] for one in waiting if one in found]


def of_key(connection: Connection, use: Use) -> KeyStatus:
    """Return the key that a job waits for. *use*: the job's, whose numbers count if no worker has told of the limit."""
    (one,) = rooms.look(connection, [use.key])
    waiting = connection.execute(_IN_ONE_LINE, {"of_key": use.key}).scalar_one()
    return _status(one.as_code_says(use), waiting)


_IN_ONE_LINE = _capped(select(jobs.c.seq).where(BLOCKED, jobs.c.gate == bindparam("of_key", type_=jobs.c.gate.type)))


def _status(one: rooms.Room, blocked: int) -> KeyStatus:
    tokens = one.tokens
    numbers = Numbers(one.most, *((tokens.number, tokens.per, tokens.burst) if tokens else ()))
    moment, closed = one.next_room(1), (one.closed_until or 0.0) - one.at
    return KeyStatus(
        one.key, numbers, one.in_use, min(blocked, MOST), one.room(1) > 0,
        None if moment is None else moment.timestamp() - one.at, closed if closed > 0 else None,
    )  # fmt: skip


# --- changed


def set_numbers(database: Database, name: str, given: Mapping[str, Any], act: Act) -> bool:
    """Let these numbers count for the limit, and let jobs out of its lines; return whether that changed anything.

    Arguments:
        given: of ``concurrency``, ``rate``, ``per`` and ``burst``; `None`: not limited. Others stay as they count now.

    Raises `NotFound`, and `ValueError` for numbers that do not fit together.
    """

    def new(row: Any) -> dict[str, Any] | None:
        old = vars(_numbers(row, "set_" if row.is_set else ""))
        wanted = {**old, **given}
        burst, rate = wanted["burst"] or 1, wanted["rate"]
        if rate is not None and burst > rate:
            if "burst" in given:
                raise ValueError(f"a burst is at most the number of its rate, {rate}, not {burst}")
            burst = rate
        wanted["burst"], wanted["per"] = burst, wanted["per"] or 1.0
        if row.is_set and wanted == old:
            return None
        return {"is_set": True, **{f"set_{column}": value for column, value in wanted.items()}}

    return _change(database, name, act, new)


def reset(database: Database, name: str, act: Act) -> bool:
    """Let the code's numbers count again; return false if they count. Raises `NotFound`."""
    nothing = {f"set_{column}": None for column in COLUMNS}
    return _change(database, name, act, lambda row: {"is_set": False, **nothing} if row.is_set else None)


def _change(database: Database, name: str, act: Act, new: Any) -> bool:
    def write(again: bool) -> bool:
        with database.write(durable=True) as connection:
            if again and is_known(connection, act):
                return True
            row = connection.execute(_ONE.with_for_update(), {"of_name": key(name)}).first()
            if row is None:
                raise _unknown(connection, name)
            values = new(row)
            if values is None:
                return False
            who = {"operator": printable(act.operator), "reason": printable(act.reason), "changed_at": now()}
            connection.execute(update(limits).where(limits.c.name == row.name).values(**values, **who))
            begin(connection, act, is_whole=True)
        return True

    is_changed = database.patiently(write)
    if is_changed:
        _apply(database, key(name))
    return is_changed


_AT_MOST: Any = bindparam("at_most", type_=Integer())
_AFTER = bindparam("after", type_=limit_keys.c.key.type)
_AHEAD: Any = bindparam("latest", type_=Double())
_LATE_TOKENS = (
    select(limit_keys.c.key)
    .where(limit_keys.c.name == _NAME, limit_keys.c.next_token > _AHEAD)
    .order_by(limit_keys.c.key)
    .limit(_AT_MOST)
    .with_for_update()
)
_CHOSEN = rows_of("keys")
_EARLIER = (
    update(limit_keys)
    .where(limit_keys.c.key.in_(select(_CHOSEN.c.value)))
    .values(next_token=case((limit_keys.c.next_token > _AHEAD, _AHEAD), else_=limit_keys.c.next_token), wake_at=None)
)
_LINES = (
    select(limit_keys.c.key)
    .where(limit_keys.c.name == _NAME, limit_keys.c.key > _AFTER)
    .where(exists().where(BLOCKED, jobs.c.gate == limit_keys.c.key))
    .order_by(limit_keys.c.key)
    .limit(_AT_MOST)
)
_NOW = select(now())


def _apply(database: Database, name: str) -> None:
    """Let jobs out of the lines of a limit whose numbers were changed, and wake what waits for its moments."""
    _forget_slow_tokens(database, name)
    for keys in _chunks(database, _LINES, {"of_name": name}):
        rooms.offer(database, keys)
    with database.once() as connection:
        database.dialect.ring(connection)


def _forget_slow_tokens(database: Database, name: str) -> None:
    """Shorten the time until the next token where a slower rate has made it long."""
    with database.read() as connection:
        row = connection.execute(_ONE, {"of_name": name}).first()
        if row is None:
            return
        counting, at = _numbers(row, "set_" if row.is_set else ""), connection.execute(_NOW).scalar_one().timestamp()
    if not counting.rate:
        return
    rate = Rate(counting.rate, counting.per, min(counting.burst, counting.rate))
    values = {"of_name": name, "latest": at + rate.burst * rate.step, "at_most": CHUNK}
    number = CHUNK
    while number == CHUNK:
        with database.write() as connection:
            found = [one for (one,) in connection.execute(_LATE_TOKENS, values)]
            if found:
                connection.execute(_EARLIER, {"latest": values["latest"], "keys": found})
        number = len(found)


# --- rubbish

_HAS_RUBBISH = (
    select(slots.c.key)
    .where(slots.c.key > _AFTER, ~rooms.IN_USE)
    .group_by(slots.c.key)
    .order_by(slots.c.key)
    .limit(_AT_MOST)
)
_LOCKED_KEYS = (
    select(limit_keys.c.key)
    .where(limit_keys.c.key.in_(select(_CHOSEN.c.value)))
    .order_by(limit_keys.c.key)
    .with_for_update()
)
_UNUSED_SLOTS = delete(slots).where(slots.c.key.in_(select(_CHOSEN.c.value)), ~rooms.IN_USE)
_IDLE = (
    select(limit_keys.c.key)
    .where(limit_keys.c.key > _AFTER)
    .where(~exists().where(slots.c.key == limit_keys.c.key), ~exists().where(BLOCKED, jobs.c.gate == limit_keys.c.key))
    .where(or_(limit_keys.c.next_token.is_(None), limit_keys.c.next_token < bindparam("past", type_=Double())))
    .where(or_(limit_keys.c.closed_until.is_(None), limit_keys.c.closed_until < bindparam("past", type_=Double())))
    .where(or_(limit_keys.c.wake_at.is_(None), limit_keys.c.wake_at < now(seconds("minus_later"))))
    .order_by(limit_keys.c.key)
    .limit(_AT_MOST)
    .with_for_update(skip_locked=True)
)
_DELETE_KEYS = delete(limit_keys).where(limit_keys.c.key.in_(select(_CHOSEN.c.value)))
_IS_ANY_KEY = select(limit_keys.c.key).limit(1)


def prune(database: Database) -> bool:
    """Delete slots of runs that are over, and keys that nothing needs; return whether keys are left."""
    for keys in _chunks(database, _HAS_RUBBISH, {}):
        with database.write() as connection:
            connection.execute(_LOCKED_KEYS, {"keys": keys}).all()
            connection.execute(_UNUSED_SLOTS, {"keys": keys})
    with database.read() as connection:
        past = connection.execute(_NOW).scalar_one().timestamp() - LATER
    after: str | None = ""
    while after is not None:
        with database.write() as connection:
            values = {"after": after, "past": past, "minus_later": -LATER, "at_most": CHUNK}
            idle = [one for (one,) in connection.execute(_IDLE, values)]
            if idle:
                connection.execute(_DELETE_KEYS, {"keys": idle})
        after = idle[-1] if len(idle) == CHUNK else None
    with database.read() as connection:
        return connection.execute(_IS_ANY_KEY).first() is not None


def _chunks(database: Database, query: Any, values: dict[str, Any]) -> Iterator[list[str]]:
    after: str | None = ""
    while after is not None:
        with database.read() as connection:
            found = [one for (one,) in connection.execute(query, {**values, "after": after, "at_most": CHUNK})]
        if found:
            yield found
        after = found[-1] if len(found) == CHUNK else None
