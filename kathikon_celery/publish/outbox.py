"""What a task sends as it ends is collected, so that it is published in the transaction that stores the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.settle import TaskEnd

_collected: ContextVar[tuple[Database, TaskEnd] | None] = ContextVar("kathikon_ending", default=None)


def begin(database: Database) -> None:
    """Collect from now on, in this context, what is sent to *database*, until `take` is called."""
    _collected.set((database, TaskEnd()))


def take(database: Database) -> TaskEnd:
    """What was collected since `begin`; no more is."""
    found = current(database)
    _collected.set(None)
    return found or TaskEnd()


def current(database: Database) -> TaskEnd | None:
    """Where to put what is sent to *database*; `None`: it is to be published at once."""
    found = _collected.get()
    return found[1] if found is not None and found[0] is database else None


@contextmanager
def into(database: Database, ending: TaskEnd) -> Iterator[TaskEnd]:
    """Collect into *ending* within the block."""
    token = _collected.set((database, ending))
    try:
        yield ending
    finally:
        _collected.reset(token)
