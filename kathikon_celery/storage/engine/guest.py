"""A transaction that somebody else has opened, as a database: storage's verbs run in it, and never commit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, make_url
from sqlalchemy.exc import PendingRollbackError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.errors import TransactionRefused, in_words
from kathikon_celery.storage.events import Events

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")

#: The server's version that SQLAlchemy is told; the statements need nothing newer.
OLDEST = (12, 0)


class Guest(Database):
    """The transaction of *connection*, on the same database as *host*.

    No verb is tried again, no event is told, and the wake-ups come with the caller's commit where the database can do
    that (`Dialect.guest`). Raises `TransactionRefused` when the database refuses a statement.

    >>> guest = Guest(storage.database, session.connection())
    >>> insert.insert_many(guest, jobs)      # there when the session commits
    """

    is_guest = True

    def __init__(self, host: Database, connection: Connection) -> None:
        self.host = host
        self.url = host.url
        self.dialect = host.dialect.guest()
        self.events = Events()  # without listeners: what a transaction has done is unknown until it is committed
        self.patience = 0.0
        self.on_close, self.on_replaced = [], []
        self._connection = connection
        _, self._schema = host.identity

    def __repr__(self) -> str:
        return f"<Guest of {self.host!r}>"

    @contextmanager
    def _enter(self) -> Iterator[Connection]:
        with refusals():
            connection = self._connection
            self.dialect.join(connection)
            if self._schema is None:
                yield connection
                return
            callers = connection.get_execution_options().get("schema_translate_map")
            # The caller's search path may lead elsewhere, to tables of a tenant for example.
            connection.execution_options(schema_translate_map={None: self._schema})
            try:
                yield connection
            finally:
                connection.execution_options(schema_translate_map=callers)

    def read(self) -> Any:
        """Return the caller's connection."""
        return self._enter()

    def once(self, durable: bool = False) -> Any:
        """Return the caller's connection; what a verb writes is committed with the caller's transaction."""
        return self._enter()

    @contextmanager
    def write(self, durable: bool = False) -> Iterator[Connection]:
        """Several verbs, in a savepoint: after an error the caller's transaction goes on without them."""
        with self._enter() as connection, connection.begin_nested():
            yield connection

    def transaction(self, connection: Connection) -> AbstractContextManager[None]:
        """Return nothing to begin: the transaction is the caller's."""
        return nullcontext()

    def patiently(self, call: Callable[[bool], T], patient: bool = True) -> T:
        """Return *call*(false). A transaction that has lost its connection cannot be tried again."""
        return call(False)

    def close(self) -> None:
        """Leave the connection to the caller."""


#: PostgreSQL's SQLSTATE of a transaction in which a statement has failed.
ABORTED = "25P02"


@contextmanager
def refusals() -> Iterator[None]:
    """Raise `TransactionRefused` instead of errors of the caller's transaction."""
    try:
        yield
    except SQLAlchemyError as error:  # of the database, or a closed connection, or a session that must be rolled back
        said = f"the open transaction cannot take a job: {in_words(error)}"
        if isinstance(error, PendingRollbackError) or getattr(error.__cause__, "sqlstate", None) == ABORTED:
            said += "; roll it back, or run the statement that failed in a savepoint (atomic(), begin_nested())"
        raise TransactionRefused(said) from error


def same_database(host: Database, connection: Connection) -> bool:
    """Whether *connection* writes to the database of *host*: the server says so, not the URL."""
    if connection.dialect.name != host.dialect.name:
        return False
    with refusals():
        return host.identity[0] == host.dialect.identity(connection)


def connected(driver: str, driver_connection: Any) -> Connection:
    """Return a `Connection` that runs statements on *driver_connection*, and neither commits nor closes it.

    Arguments:
        driver: SQLAlchemy's name of the driver, such as ``postgresql+psycopg``.
    """
    return _engine(driver, lambda: driver_connection).connect()


async def connected_async(driver: str, driver_connection: Any) -> AsyncConnection:
    """Do what `connected` does, for a *driver_connection* of asyncio."""
    from sqlalchemy.ext.asyncio import AsyncEngine

    async def given(*_: Any, **__: Any) -> Any:
        return driver_connection

    engine = _engine(driver, lambda: engine.dialect.loaded_dbapi.connect(async_creator_fn=given))
    return await AsyncEngine(engine).connect()


def _engine(driver: str, connection: Callable[[], Any]) -> Engine:
    """Return an engine for the only *connection*, made by hand: SQLAlchemy's own would roll back at the first use."""
    kind: Any = make_url(f"{driver}://").get_dialect()
    dialect = kind(dbapi=kind.import_dbapi())
    dialect.server_version_info = OLDEST
    for step in ("do_begin", "do_commit", "do_rollback", "do_close", "do_terminate"):
        setattr(dialect, step, _leave_alone)
    return Engine(StaticPool(connection, dialect=dialect, reset_on_return=None), dialect, make_url(f"{driver}://"))


def _leave_alone(*_: Any) -> None:
    """Do nothing: the transaction and the connection are the caller's."""
