"""Django's open transactions: a task that is sent within one is there exactly if the transaction is committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

from django.db import connections
from django.utils.connection import ConnectionDoesNotExist
from sqlalchemy import Connection

from kathikon_celery.django.in_tests import IN_TEST, call_on_commit, is_of_test, note
from kathikon_celery.publish import callers, enqueue_in
from kathikon_celery.publish.callers import Caller
from kathikon_celery.storage import Storage
from kathikon_celery.storage.engine import guest

#: First part of the module of Django's driver -> SQLAlchemy's name of that driver.
DRIVERS = {"psycopg": "postgresql+psycopg", "psycopg2": "postgresql+psycopg2", "sqlite3": "sqlite+pysqlite"}

#: Attribute of Django's connection: the driver's connection and whether the app commits by itself, and the `Caller`.
_KEPT = "kathikon_caller"


def install() -> None:
    """Send tasks in Django's open transactions. May be called twice."""
    if find not in callers.finders:
        callers.finders.append(find)
        enqueue_in.kinds.append(of_alias)


def find() -> Caller | None:
    """Return the open transaction of this thread. Of several, that of Kathikon's database is written to."""
    open_ones = [one for one in connections.all(initialized_only=True) if one.in_atomic_block or _is_manual(one)]
    if not open_ones:
        return None
    found = [
        _of_connection(one)
        for one in open_ones
        if _is_manual(one) or not all(map(is_of_test, getattr(one, "atomic_blocks", [None])))
    ]
    return Several(found) if len(found) > 1 else found[0] if found else IN_TEST


def _is_manual(connection: Any) -> bool:
    """Whether the app has switched autocommit off, and commits by itself."""
    return connection.connection is not None and not connection.in_atomic_block and not connection.autocommit


def of_alias(alias: Any) -> Caller | None:
    """Return the transaction of the database *alias*; `None`: that is no text. Raises `TypeError`."""
    if not isinstance(alias, str):
        return None
    try:
        connection = connections[alias]
    except ConnectionDoesNotExist as error:
        raise TypeError(f"{alias!r} is no alias in DATABASES; there are {', '.join(map(repr, connections))}") from error
    connection.ensure_connection()
    return _of_connection(connection)


def _of_connection(connection: Any) -> Caller:
    kind, caller = getattr(connection, _KEPT, (None, None))
    now = (connection.connection, _is_manual(connection))
    if caller is None or kind != now:
        connected = cache(partial(connected_to, connection))
        caller = InDjango(
            lambda storage: connected(),
            None if _is_manual(connection) else partial(call_on_commit, connection.alias),  # Django refuses on_commit
            lambda: tuple(connection.savepoint_ids),
        )
        setattr(connection, _KEPT, (now, caller))
    return caller


def connected_to(connection: Any) -> Connection | None:
    """Return the driver's connection of Django's *connection*, for SQLAlchemy; `None`: of no driver in `DRIVERS`."""
    driver = DRIVERS.get(connection.Database.__name__.partition(".")[0])
    return None if driver is None else guest.connected(driver, connection.connection)


class InDjango(Caller):
    """An open transaction of one database."""

    def write(self, storage: Storage, step: Callable[[Storage], Any], ids: Iterable[str] = ()) -> None:
        """See `Caller.write`."""
        sent = list(ids)

        def step_and_note(there: Storage) -> None:
            step(there)
            note(sent)

        super().write(storage, step_and_note, sent)


class Several(Caller):
    """Open transactions of several databases: in Kathikon's, or else after the commit of the first one."""

    def __init__(self, open_ones: Sequence[Caller]) -> None:
        self._open = open_ones

    def write(self, storage: Storage, step: Callable[[Storage], Any], ids: Iterable[str] = ()) -> None:
        """See `Caller.write`."""
        chosen = next((one for one in self._open if one.is_at_home(storage)), self._open[0])
        chosen.write(storage, step, ids)

    def guest(self, storage: Storage) -> Storage | None:
        """See `Caller.guest`."""
        return next(filter(None, (one.guest(storage) for one in self._open)), None)

    @property
    def place(self) -> object:
        """See `Caller.place`."""
        return tuple(one.place for one in self._open)
