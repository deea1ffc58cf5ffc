"""The state of this context, in one context variable: it decides where publications, a task's end and result go.

The jobs that a task sends as it ends are collected here, to publish them in the transaction that stores the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from kathikon_celery.job import Job
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.settle import TaskEnd

if TYPE_CHECKING:
    from kathikon_celery.publish.bulk import Chunks
    from kathikon_celery.publish.callers import Caller
    from kathikon_celery.publish.enqueue_in import enqueue_in
    from kathikon_celery.results.carrier import Carrier
    from kathikon_celery.results.completion import Completion


class Scope:
    """What is open in a context. Contexts that are copies of each other share a scope, so no scope ever changes."""

    #: The task's end that is being collected, and its database.
    collected: tuple[Database, TaskEnd] | None = None
    #: The caller's open transaction; `False`: none, even if a finder would find one.
    caller: Caller | Literal[False] | None = None
    #: The block of `enqueue_in` that named the caller. A task of asyncio may have this scope after the block has ended.
    block: enqueue_in | None = None
    #: The transaction that the running task's end will commit.
    completion: Completion | None = None
    #: The block of `bulk` that collects publications.
    chunks: Chunks | None = None
    #: Chord id -> body, for the end that is being collected; `None`: none is being collected.
    bodies: dict[str, Any] | None = None
    #: What takes a result to the worker's main process.
    carrier: Carrier | None = None
    #: Task id -> job, as read in one query for code that reads them one by one.
    known: Mapping[str, Job | None] = MappingProxyType({})
    #: The id of the job whose publication by its own task was refused: the job is another worker's now, or cancelled.
    refused: str | None = None
    #: The id of a job that had ended without a run, and whose end is being reported now.
    unreported: str | None = None
    #: Whether the worker has reported the task's end already: no warning then that this end changed nothing.
    is_reported: bool = False


_scope: ContextVar[Scope] = ContextVar("kathikon_scope", default=Scope())  # noqa: B039 (no scope ever changes)

#: Returns the `Scope` of this context.
scope = _scope.get


def change(**changes: Any) -> None:
    """Change fields of this context's `Scope`."""
    # Each task does so some times: the copy of a dataclass or of a named tuple would cost more than all else here.
    scope = Scope()
    scope.__dict__ = {**_scope.get().__dict__, **changes}
    _scope.set(scope)


class within:  # noqa: N801 (a context manager; as a generator it would cost twice as much)
    """Change fields of this context's `Scope` for a block."""

    __slots__ = ("_before", "_changes")

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def __enter__(self) -> None:
        self._before = _scope.get()
        change(**self._changes)

    def __exit__(self, *error: object) -> None:
        # Only these fields: the block may have changed others for good.
        change(**{name: getattr(self._before, name) for name in self._changes})


def begin(database: Database) -> None:
    """Collect what is sent to *database* in this context, until `take` is called."""
    change(collected=(database, TaskEnd()))


def take(database: Database) -> TaskEnd:
    """Stop collecting, and return what was collected since `begin`."""
    found = current(database)
    if _scope.get().collected is not None:
        change(collected=None)
    return found or TaskEnd()


def current(database: Database) -> TaskEnd | None:
    """Return what collects the jobs sent to *database*; `None`: publish them at once."""
    collected = _scope.get().collected
    return collected[1] if collected is not None and collected[0] is database else None


@contextmanager
def into(database: Database, ending: TaskEnd) -> Iterator[TaskEnd]:
    """Collect into *ending* within the block."""
    with within(collected=(database, ending)):
        yield ending
