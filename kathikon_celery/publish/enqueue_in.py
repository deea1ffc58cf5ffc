"""`enqueue_in`: sends tasks in a transaction of SQLAlchemy, psycopg or sqlite3, or of a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal
from weakref import ref

from sqlalchemy import Connection, event

from kathikon_celery.publish import outbox
from kathikon_celery.publish.callers import Caller
from kathikon_celery.storage import Storage
from kathikon_celery.storage.engine import guest

#: Returns the caller of a transaction of another kind, such as the alias of a Django database; `None`: it is none.
kinds: list[Callable[[Any], Caller | None]] = []


class enqueue_in:  # noqa: N801 (used as a function)
    """Send the tasks of a block in *transaction*: they are there exactly if the transaction is committed.

    >>> with Session.begin() as session:
    ...     session.add(order)
    ...     with enqueue_in(session):
    ...         receipt.delay(order.id)

    The ids are known at once. For a transaction of asyncio say ``async with``: the tasks are written when the block is
    left without an error.

    Arguments:
        transaction: SQLAlchemy's `Session`, `scoped_session`, `Connection`, `AsyncSession` or `AsyncConnection`;
            a connection of psycopg (also its `AsyncConnection`), psycopg2 or sqlite3; the alias of a Django database;
            `False`: no transaction, even if one is open.

    Raises:
        TypeError: *transaction* is something else.
        TransactionRefused: the connection commits each statement by itself, its transaction was aborted, or it belongs
            to another database and does not tell of its commit.
    """

    def __init__(self, transaction: Any) -> None:
        self._caller: Caller | Literal[False] = False if transaction is False else caller_of(transaction)
        self._within = outbox.within(caller=self._caller, block=self)
        #: Whether the block has ended.
        self.is_over = False

    def __enter__(self) -> None:
        if isinstance(self._caller, AsyncCaller):
            raise TypeError("a transaction of asyncio is awaited: say 'async with enqueue_in(…)'")
        self._within.__enter__()

    def __exit__(self, *error: object) -> None:
        self._leave(*error)

    async def __aenter__(self) -> None:
        self._within.__enter__()

    async def __aexit__(self, kind: object, *error: object) -> None:
        self._leave(kind, *error)
        if kind is None and isinstance(self._caller, AsyncCaller):
            await self._caller.flush()

    def _leave(self, *error: object) -> None:
        self._within.__exit__(*error)
        self.is_over = True


class AsyncCaller(Caller):
    """A transaction of asyncio: what is sent is collected, and written when that is awaited.

    Arguments:
        run: awaits a function of the connection, which may block.
    """

    is_late = True

    def __init__(self, run: Callable[[Callable[[Caller], None]], Any]) -> None:
        super().__init__(_unknown, None)
        self._run = run
        self._steps: list[tuple[Storage, Callable[[Storage], Any], list[str]]] = []

    def write(self, storage: Storage, step: Callable[[Storage], Any], ids: Iterable[str] = ()) -> None:
        """Collect *step*."""
        self._steps.append((storage, step, list(ids)))

    async def flush(self) -> None:
        """Write what was collected."""
        steps, self._steps = self._steps, []

        def write(caller: Caller) -> None:
            for storage, step, ids in steps:
                caller.write(storage, step, ids)

        if steps:
            await self._run(write)


def caller_of(transaction: Any) -> Caller:
    """Return what writes in *transaction*. Raises `TypeError`."""
    for kind in (_of_sqlalchemy, _of_driver, *kinds):
        if (found := kind(transaction)) is not None:
            return found
    raise TypeError(
        f"{transaction!r} is no transaction; allowed are SQLAlchemy's sessions and connections, connections of psycopg,"
        " psycopg2 and sqlite3, the alias of a Django database, and False"
    )


def _unknown(storage: Storage) -> Connection | None:
    return None


def _of_sqlalchemy(transaction: Any) -> Caller | None:
    from sqlalchemy.orm import Session, scoped_session

    if isinstance(transaction, scoped_session):
        transaction = transaction()
    if isinstance(transaction, Session):
        return _of_session(transaction)
    if isinstance(transaction, Connection):
        return Caller(lambda storage: transaction, None)
    if not type(transaction).__module__.startswith("sqlalchemy.ext.asyncio"):
        return None
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

    if isinstance(transaction, async_scoped_session):
        transaction = transaction()
    if isinstance(transaction, AsyncSession):
        session = transaction
        return AsyncCaller(lambda write: session.run_sync(lambda sync: write(_of_session(sync))))
    if isinstance(transaction, AsyncConnection):
        connection = transaction
        return AsyncCaller(lambda write: connection.run_sync(lambda sync: write(Caller(lambda storage: sync, None))))
    return None


def _of_session(session: Any) -> Caller:
    commits = session.info.get(_Commits) or session.info.setdefault(_Commits, _Commits(session))
    return Caller(lambda storage: session.connection(), commits.add, session.get_nested_transaction)


class _Commits:
    """What is to be done when a `Session` has committed, unless the savepoint of the request was rolled back."""

    def __init__(self, session: Any) -> None:
        self._calls: list[tuple[Any, Callable[[], None]]] = []
        self._session = ref(session)
        event.listen(session, "after_commit", self._committed)
        event.listen(session, "after_soft_rollback", self._rolled_back)

    def add(self, call: Callable[[], None]) -> None:
        session = self._session()
        self._calls.append((session and (session.get_nested_transaction() or session.get_transaction()), call))

    def _committed(self, session: Any) -> None:
        if not session.in_nested_transaction():
            calls, self._calls = self._calls, []
            for _, call in calls:
                call()

    def _rolled_back(self, session: Any, transaction: Any) -> None:
        self._calls = [one for one in self._calls if transaction not in _ancestry(one[0])]


def _ancestry(transaction: Any) -> Iterable[Any]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent


def _of_driver(transaction: Any) -> Caller | None:
    kind = type(transaction)
    if not hasattr(transaction, "cursor"):  # a cursor, for example
        return None
    roots = {one.__module__.partition(".")[0] for one in kind.__mro__}
    if "sqlite3" in roots or "_sqlite3" in roots:
        return _of_connection(transaction, "sqlite", "sqlite+pysqlite")
    if "psycopg2" in roots:
        return _of_connection(transaction, "postgresql", "postgresql+psycopg2")
    if "psycopg" not in roots:
        return None
    if hasattr(transaction, "__aenter__"):
        return AsyncCaller(partial(_run_on_psycopg, transaction))
    return _of_connection(transaction, "postgresql", "postgresql+psycopg")


def _of_connection(driver_connection: Any, name: str, driver: str) -> Caller:
    @cache
    def connected() -> Connection:
        return guest.connected(driver, driver_connection)

    return Caller(lambda storage: connected() if storage.database.dialect.name == name else None, None)


async def _run_on_psycopg(driver_connection: Any, write: Callable[[Caller], None]) -> None:
    connection = await guest.connected_async("postgresql+psycopg_async", driver_connection)
    try:
        await connection.run_sync(lambda sync: write(Caller(lambda storage: sync, None)))
    finally:
        await connection.close()
