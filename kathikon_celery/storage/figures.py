"""Figures for monitoring: what has ended in a time, by task and queue, and the database's own health."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, bindparam, case, func, literal_column, select

from kathikon_celery.job import TERMINAL, State
from kathikon_celery.storage.clock import seconds_until
from kathikon_celery.storage.tables import ENDED, history, jobs


@dataclass(frozen=True)
class Ended:
    """The jobs of one task and queue that have ended so in a time.

    Arguments:
        number: of jobs.
        run, wait: seconds from their claim to their end, and from being ready to their claim, in all. The start itself
            is written with the worker's next transaction: up to `poll_interval` late, or never for a short task.
        runs, waits: how many of them took no longer than each of the bounds.
    """

    state: State
    task: str
    queue: str
    cause: str
    number: int
    run: float
    runs: Sequence[int]
    wait: float
    waits: Sequence[int]


def _length(begin: Any, end: Any) -> Any:
    """Seconds from *begin* to *end*; 0 if one is not known, or the clock was set back."""
    seconds = func.coalesce(seconds_until(end) - seconds_until(begin), 0.0)
    return case((seconds > 0, seconds), else_=0.0)


@lru_cache(maxsize=4)
def _query(state: State, bounds: tuple[float, ...]) -> Any:
    run = _length(jobs.c.claimed_at, jobs.c.ended_at)
    wait = _length(jobs.c.available_at, jobs.c.claimed_at)
    one = (
        select(jobs.c.task, jobs.c.queue, jobs.c.cause, run.label("run"), wait.label("wait"))
        .where(ENDED, jobs.c.state == literal_column(f"'{state.value}'"), jobs.c.queue.is_not(None))
        .where(jobs.c.ended_at >= bindparam("since", type_=jobs.c.ended_at.type))
        .where(jobs.c.ended_at < bindparam("until", type_=jobs.c.ended_at.type))
        .limit(2**31 - 1)  # else SQLite computes both lengths anew for each bound
        .subquery()
    )
    counted = [func.sum(case((column <= bound, 1), else_=0)) for column in (one.c.run, one.c.wait) for bound in bounds]
    labels = (one.c.task, one.c.queue, one.c.cause)
    return select(*labels, func.count(), func.sum(one.c.run), func.sum(one.c.wait), *counted).group_by(*labels)


def ended_between(
    connection: Connection, since: datetime, until: datetime, bounds: tuple[float, ...]
) -> Iterator[Ended]:
    """Yield what has ended from *since* on and before *until*; *bounds*: see `Ended`."""
    for state in sorted(TERMINAL):
        for row in connection.execute(_query(state, bounds), {"since": since, "until": until}):
            task, queue, cause, number, run, wait, *counted = row
            split = len(bounds)
            runs, waits = counted[:split], counted[split:]
            yield Ended(state, task, queue, cause or "", number, float(run), runs, float(wait), waits)


_RESCUED = select(func.count(), func.max(history.c.seq)).where(
    history.c.seq > bindparam("after"), history.c.event == "rescued"
)


def newest_event(connection: Connection) -> int:
    """Return the number of the newest event of the jobs' history."""
    return int(connection.execute(select(func.coalesce(func.max(history.c.seq), 0))).scalar_one())


def rescued_after(connection: Connection, seq: int) -> tuple[int, int]:
    """Return how many jobs were rescued after the event *seq*, and the number of the last such event."""
    number, newest = connection.execute(_RESCUED, {"after": seq}).one()
    return int(number), int(newest or seq)
