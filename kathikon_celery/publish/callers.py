"""The caller's open transaction: what is sent within it is there exactly if the transaction is committed.

A caller names the transaction (`enqueue_in`), or a finder knows the open one of a framework, such as Django's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import get_ident
from typing import Any

from sqlalchemy import Connection

from kathikon_celery.publish import outbox
from kathikon_celery.storage import Storage
from kathikon_celery.storage.engine.guest import Guest, refusals, same_database
from kathikon_celery.storage.errors import TransactionRefused

#: Each returns the open transaction of a framework in this context, or `None`.
finders: list[Callable[[], Caller | None]] = []


class Caller:
    """A transaction of the caller's.

    Attributes:
        is_late: what is written is written later, when the sending call has returned.

    Arguments:
        connection: returns the connection of the transaction, as SQLAlchemy's.
        on_commit: calls a function after the commit; `None`: nobody knows of the commit.
        savepoint: returns a value that changes with the innermost open savepoint.
    """

    is_late = False

    def __init__(
        self,
        connection: Callable[[Storage], Connection | None],
        on_commit: Callable[[Callable[[], None]], Any] | None,
        savepoint: Callable[[], object] = lambda: None,
    ) -> None:
        self._connection, self._on_commit, self._savepoint = connection, on_commit, savepoint
        self._guests: dict[Storage, tuple[Connection, Storage | None]] = {}

    def write(self, storage: Storage, step: Callable[[Storage], Any], ids: Iterable[str] = ()) -> None:
        """Run *step* on the storage in the transaction; in another database: on *storage*, after the commit."""
        guest = self.guest(storage)
        if guest is not None:
            step(guest)
            if self._on_commit is not None and not storage.database.dialect.calls_with_commit:
                self._on_commit(storage.database.dialect.call)
        elif self._on_commit is not None:
            self._on_commit(lambda: step(storage))
        else:
            raise TransactionRefused(
                f"the connection is not to {storage.database!r}, and does not tell of its commit;"
                " use a connection to that database, or send the task after the commit"
            )
        _uncommitted.add(ids)

    def guest(self, storage: Storage) -> Storage | None:
        """Return the storage in the transaction; `None`: that is one of another database."""
        storage.setup()
        with refusals():
            connection = self._connection(storage)
        known, guest = self._guests.get(storage, (None, None))
        if connection is not known and connection is not None:
            is_same = same_database(storage.database, connection)
            guest = storage.on(Guest(storage.database, connection)) if is_same else None
            self._guests[storage] = connection, guest
        return guest if connection is not None else None

    def is_at_home(self, storage: Storage) -> bool:
        """Whether the transaction is one of the storage's database."""
        return self.guest(storage) is not None

    @property
    def place(self) -> object:
        """The transaction and its innermost savepoint: what is sent in another place may have another fate."""
        return self, self._savepoint()


class _Uncommitted:
    """The last jobs that were sent in transactions, and the threads that sent them."""

    MOST = 100_000

    def __init__(self) -> None:
        self._threads: dict[str, int] = {}

    def add(self, ids: Iterable[str]) -> None:
        for one in ids:
            self._threads[one] = get_ident()
        while len(self._threads) > self.MOST:
            with suppress(StopIteration, RuntimeError, KeyError):  # another thread does so too
                del self._threads[next(iter(self._threads))]

    def of_this_thread(self, ids: Iterable[str]) -> list[str]:
        """Return those of *ids* that this thread has sent. Another thread may wait for its commit."""
        known = self._threads
        return [one for one in ids if known.get(one) == get_ident()] if known else []

    def forget(self, one: str) -> None:
        self._threads.pop(one, None)


_uncommitted = _Uncommitted()


def current() -> Caller | None:
    """Return the open transaction of this context; `None`: there is none, or it is left out."""
    scope = outbox.scope()
    if scope.caller is None or (scope.block is not None and scope.block.is_over):
        return _found()
    return scope.caller or None


def _found() -> Caller | None:
    for find in finders:
        if (found := find()) is not None:
            return found
    return None


def write(storage: Storage, step: Callable[[Storage], Any], ids: Iterable[str] = ()) -> None:
    """Run *step* in the caller's open transaction; without one at once.

    Arguments:
        step: is called with the storage to write to.
        ids: of the jobs that *step* sends.
    """
    caller = current()
    if caller is None:
        check_alone(storage)
        step(storage)
    else:
        caller.write(storage, step, ids)


def check_alone(storage: Storage) -> None:
    """Raise `TransactionRefused` if ``transaction=False`` would make this thread wait for its own transaction."""
    scope = outbox.scope()
    if scope.caller is not False or not storage.database.dialect.has_one_writer:
        return
    own = scope.completion.caller if scope.completion is not None else _found()
    if own is not None and own.is_at_home(storage):
        raise TransactionRefused(
            f"transaction=False: {storage.database!r} is a file with one writer at a time, and this thread has a"
            " transaction open there; send the task in that transaction, or after its end"
        )


def here(storage: Storage) -> Storage:
    """Return *storage* as the caller's open transaction sees it, if that is one of the same database."""
    caller = current()
    return (caller.guest(storage) if caller is not None else None) or storage


def refuse_waiting(storage: Storage, ids: Iterable[str]) -> None:
    """Raise `TransactionRefused` if this thread would wait for one of the jobs *ids* that it has not committed."""
    for one in _uncommitted.of_this_thread(ids):
        if storage.fetch(one) is None:
            raise TransactionRefused(
                f"job {one} was sent in a transaction that is open or was rolled back: no worker can see the job, and"
                " waiting for its result would never end; commit first"
            )
        _uncommitted.forget(one)
