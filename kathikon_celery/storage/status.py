"""The state of all queues, at a bounded cost: no count goes beyond `MOST`, and no query reads a whole table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, desc, func, literal_column, select

from kathikon_celery.job import TERMINAL, State
from kathikon_celery.storage import nodes, pauses
from kathikon_celery.storage.clock import now, seconds, seconds_until
from kathikon_celery.storage.names import key
from kathikon_celery.storage.pauses import Kind, Pause
from kathikon_celery.storage.reading import queue_of
from kathikon_celery.storage.tables import BLOCKED, DUE, ENDED, HELD, READY, jobs, ready_in, values_of

#: The highest number that is counted.
MOST = 10_000
#: The highest number of priorities of one queue among which the oldest job is searched.
PRIORITIES = 100


def capped(number: int) -> str:
    """Return in words a number that was counted to `MOST`."""
    return f"{number:,}" if number < MOST else f"{MOST:,}+"


@dataclass
class QueueStatus:
    """One queue, as it is now. Each number is at most `MOST` (10,000): then there may be more.

    >>> [queue.name for queue in kathikon.queue_status() if queue.ready and not queue.workers]
    ['emails']

    Arguments:
        name: the queue's name.
        ready: jobs that wait for a worker.
        oldest: seconds for which the oldest of them is ready; `None`: none is.
        blocked: jobs that wait in the lines of limits; they are not ready.
        scheduled: jobs that wait for their time, also for a retry.
        claimed: jobs that workers hold, and whose tasks have not begun.
        running: jobs whose tasks run.
        dead: of the `MOST` jobs that died last, those of this queue.
        workers: how many living workers consume the queue; `None`: that is not known (yet).
        paused: the pause of this queue, or of everything.
    """

    name: str
    ready: int = 0
    oldest: float | None = None
    blocked: int = 0
    scheduled: int = 0
    claimed: int = 0
    running: int = 0
    dead: int = 0
    workers: int | None = None
    paused: Pause | None = None


@dataclass
class Status:
    """Everything that `top` shows.

    >>> kathikon.status().ended[State.DEAD]
    3

    Arguments:
        queues: each queue that has jobs, workers or a pause.
        workers: living workers that consume queues.
        ended: how many jobs have ended in the last `WINDOW` (60) seconds, by state; each number is at most `MOST`.
        pauses: all pauses that hold.
    """

    queues: list[QueueStatus]
    workers: int
    ended: dict[State, int] = field(default_factory=dict)
    pauses: list[Pause] = field(default_factory=list)


#: Seconds for which `Status.ended` counts.
WINDOW = 60.0


#: The keys of the queues with ready jobs.
_READY_QUEUES = values_of(jobs.c.queue, READY)
_QUEUE = bindparam("of_queue", type_=jobs.c.queue.type)
_READY_IN = select(jobs.c.seq).where(ready_in(_QUEUE)).limit(MOST)
_READY_COUNT = select(func.count()).select_from(_READY_IN.subquery())
_FIRST = (
    select(jobs.c.priority, -seconds_until(jobs.c.available_at), jobs.c.envelope)
    .where(ready_in(_QUEUE))
    .order_by(desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq)
    .limit(1)
)
_FIRST_BELOW = _FIRST.where(jobs.c.priority < bindparam("below"))


def _by_queue(of: Any) -> Any:
    some = of.limit(MOST).subquery()
    return select(some.c.queue, some.c.state, func.count()).group_by(some.c.queue, some.c.state)


_OF = select(jobs.c.queue, jobs.c.state)
_SCHEDULED = _by_queue(_OF.where(DUE).order_by(jobs.c.available_at))
_HELD = _by_queue(_OF.where(HELD))
_BLOCKED = _by_queue(_OF.where(BLOCKED).order_by(jobs.c.gate))


def _ended(state: State) -> Any:
    return _OF.where(ENDED, jobs.c.state == literal_column(f"'{state.value}'")).order_by(jobs.c.ended_at.desc())


_DEAD = _by_queue(_ended(State.DEAD))
_LATELY = {
    state: select(func.count()).select_from(
        _ended(state).where(jobs.c.ended_at > now(seconds("minus_window"))).limit(MOST).subquery()
    )
    for state in sorted(TERMINAL)
}


#: State -> the attribute of `QueueStatus` that counts it.
_COLUMNS = {
    State.SCHEDULED: "scheduled",
    State.RETRYABLE: "scheduled",
    State.BLOCKED: "blocked",
    State.CLAIMED: "claimed",
    State.RUNNING: "running",
    State.DEAD: "dead",
}


def status(connection: Connection) -> Status:
    """Return the state of all queues that have jobs, workers or a pause."""
    found: dict[str, QueueStatus] = {}

    def of(name_key: str | None) -> QueueStatus:
        name = name_key or ""
        return found.setdefault(name, QueueStatus(name))

    for (name,) in connection.execute(_READY_QUEUES).all():
        one = of(name)
        one.ready = connection.execute(_READY_COUNT, {"of_queue": name}).scalar_one()
        ages = []
        for age, envelope in _oldest(connection, name):
            ages.append(age)
            one.name = queue_of(name, envelope) if name.startswith("#") else name
        one.oldest = max(ages, default=None)
    for query in (_SCHEDULED, _BLOCKED, _HELD, _DEAD):
        for name, state, number in connection.execute(query).all():
            if column := _COLUMNS.get(state):
                one = of(name)
                setattr(one, column, getattr(one, column) + number)
    known = nodes.consumed(connection)
    for name in sorted({name for names in known for name in names or ()}):
        of(key(name)).name = name
    holding = pauses.every(connection)
    everything = next((one for one in holding if one.kind is Kind.ALL), None)
    for pause in holding:
        if pause.kind is Kind.QUEUE:
            of(key(pause.name)).name = pause.name
            of(key(pause.name)).paused = pause
    for one in found.values():
        one.paused = one.paused or everything
        if None not in known:
            one.workers = sum(one.name in (names or ()) for names in known)
    lately = {
        state: connection.execute(query, {"minus_window": -WINDOW}).scalar_one() for state, query in _LATELY.items()
    }
    every = sorted((one for one in found.values() if one.name), key=lambda one: one.name)
    return Status(every, len(known), lately, holding)


def _oldest(connection: Connection, queue: str) -> Iterator[tuple[float, str]]:
    """Yield for each priority of a queue the seconds for which its oldest ready job waits, and that job's envelope."""
    row = connection.execute(_FIRST, {"of_queue": queue}).first()
    for _ in range(PRIORITIES):
        if row is None:
            return
        yield row[1], row[2]
        row = connection.execute(_FIRST_BELOW, {"of_queue": queue, "below": row[0]}).first()
