"""Pauses: queues, tasks or everything of which no worker starts a job. The jobs keep their places."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from sqlalchemy import Connection, Text, and_, bindparam, delete, exists, literal_column, or_, select
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.storage.acts import Act, begin, is_known
from kathikon_celery.storage.clock import now, seconds_until
from kathikon_celery.storage.dialects.parameters import Upsert
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key, label, name_of, printable
from kathikon_celery.storage.tables import fits, jobs, pauses


class Kind(str, Enum):
    """What a pause is for."""

    QUEUE = "queue"
    TASK = "task"
    ALL = "all"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Pause:
    """Something that is paused. Its `str` says so in a sentence.

    >>> [pause.name for pause in kathikon.pauses() if pause.kind is Kind.QUEUE]
    ['emails']

    Arguments:
        kind: ``Kind.QUEUE``, ``Kind.TASK`` or ``Kind.ALL``; as a text ``"queue"``, ``"task"`` or ``"all"``.
        name: the queue's name, the task's name or pattern, or ``""`` for everything.
        since: when it began, as an aware datetime.
        until: when the pause ends by itself; `None`: never.
        operator: who paused.
        reason: why.
    """

    kind: Kind
    name: str
    since: datetime
    until: datetime | None
    operator: str
    reason: str | None

    def __str__(self) -> str:
        what = "everything" if self.kind is Kind.ALL else f"{self.kind} {self.name!r}"
        until = f" until {self.until.isoformat(' ', 'seconds')}" if self.until else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{what} is paused since {self.since.isoformat(' ', 'seconds')}{until} by {self.operator}{why}"

    def holds(self, queue: str | None, task: str) -> bool:
        """Whether the pause is for a job of that *queue* and *task*."""
        if self.kind is Kind.TASK:
            return matches(task, self.name)
        return self.kind is Kind.ALL or queue == self.name


class Paused(NamedTuple):
    """What is paused: all, queues (keys), and tasks (patterns)."""

    everything: bool = False
    queues: frozenset[str] = frozenset()
    tasks: tuple[str, ...] = ()


def matches(name: str, pattern: str) -> bool:
    """Do in Python what `tables.fits` does in SQL."""
    return fnmatchcase(name, pattern.replace("[", "[[]"))


_UPSERT = Upsert(
    pauses,
    (pauses.c.kind, pauses.c.name),
    {
        "kind": bindparam("of_kind", type_=pauses.c.kind.type),
        "name": bindparam("of_name", type_=pauses.c.name.type),
        "label": bindparam("of_label", type_=Text()),
        "since": now(),
        "until": bindparam("to", type_=pauses.c.until.type),
        "operator": bindparam("who", type_=Text()),
        "reason": bindparam("why", type_=Text()),
    },
    lambda new: {name: new[name] for name in ("until", "operator", "reason")},
)


def pause(database: Database, kind: Kind, name: str, until: datetime | None, act: Act) -> None:
    """Pause a queue, a task or everything; a pause that is there gets the new end, operator and reason."""
    values = {"of_kind": kind.value, "of_name": key(name), "of_label": label(name), "to": until}
    values |= {"who": printable(act.operator), "why": printable(act.reason)}

    def write(again: bool) -> None:
        with database.write(durable=True) as connection:
            if again and is_known(connection, act):
                return
            database.dialect.upsert(connection, _UPSERT, values)
            begin(connection, act, is_whole=True)
            database.dialect.ring(connection)

    database.patiently(write)


def resume(database: Database, kind: Kind, name: str, act: Act) -> bool:
    """End a pause; return false if there is none."""

    def write(again: bool) -> bool:
        with database.write(durable=True) as connection:
            removal = delete(pauses).where(pauses.c.kind == kind.value, pauses.c.name == key(name))
            if not connection.execute(removal).rowcount:
                return again and is_known(connection, act)
            begin(connection, act, is_whole=True)
            database.dialect.ring(connection)
        return True

    return database.patiently(write)


_HOLD = or_(pauses.c.until.is_(None), pauses.c.until > now())
_ALL = select(pauses).where(_HOLD).order_by(pauses.c.kind, pauses.c.name)
_FOR_CLAIMS = select(pauses.c.kind, pauses.c.name, pauses.c.label, seconds_until(pauses.c.until)).where(_HOLD)


def every(connection: Connection) -> list[Pause]:
    """Return all pauses that hold."""
    found = connection.execute(_ALL)
    return [Pause(Kind(row.kind), name_of(row.label), row.since, row.until, row.operator, row.reason) for row in found]


def paused(connection: Connection) -> tuple[Paused, float | None]:
    """Return what is paused, and the seconds until the first of the pauses ends by itself."""
    rows = connection.execute(_FOR_CLAIMS).all()
    names = {kind: [(name, text) for one, name, text, _ in rows if one == kind.value] for kind in Kind}
    ends = [left for *_, left in rows if left is not None]
    queues = frozenset(name for name, _ in names[Kind.QUEUE])
    tasks = tuple(sorted(name_of(text) for _, text in names[Kind.TASK]))
    return Paused(bool(names[Kind.ALL]), queues, tasks), min(ends, default=None)


# Claims ask the table itself: a pause holds at once, also in a worker that has not heard of it yet.

#: The condition that nothing is paused at all. A worker that knows of no pause claims by that: it costs least. It finds
#: nothing then until it has heard of a new pause, and claims by the conditions below.
NOTHING_PAUSED = ~exists().where(_HOLD)


def is_open(queue: ColumnElement[Any]) -> ColumnElement[bool]:
    """Return the condition that neither *queue* (a key) nor everything is paused."""
    of_queue = and_(pauses.c.kind == _word(Kind.QUEUE), pauses.c.name == queue)
    return ~exists().where(or_(of_queue, pauses.c.kind == _word(Kind.ALL)), _HOLD)


def _word(kind: Kind) -> ColumnElement[str]:
    return literal_column(f"'{kind.value}'")


#: The condition that a job's task is not paused.
MAY_START = ~exists().where(pauses.c.kind == _word(Kind.TASK), fits(jobs.c.task, pauses.c.label), _HOLD)
