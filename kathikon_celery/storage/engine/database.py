"""Connections: two engines for each database (durable and relaxed), and transactions."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property, partial
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from kathikon_celery.settings import absolute, shown
from kathikon_celery.storage.dialects import ON_DISK, OPTION, Dialect, dialect_for
from kathikon_celery.storage.engine import forks
from kathikon_celery.storage.engine.forks import Gate
from kathikon_celery.storage.engine.idle import Idle, drop
from kathikon_celery.storage.engine.wakeup import Wakeup
from kathikon_celery.storage.errors import Unavailable, in_words, is_lost
from kathikon_celery.storage.events import Event, Events

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Most connections in use at one time, for each engine; a further thread waits for one of them.
MOST_IN_USE = 55

#: In a forked process the parent's connections, kept so that they are neither used nor closed here.
_inherited: list[Any] = []


class _Use:
    """One use of a connection. A class, since a generator would take as much time as some statements."""

    __slots__ = ("_connection", "_database", "_durable", "_gate", "_turn", "_writes")

    def __init__(self, database: Database, writes: bool, durable: bool) -> None:
        self._database, self._writes, self._durable = database, writes, durable
        self._connection: Connection | None = None
        self._turn: AbstractContextManager[None] | None = None

    def __enter__(self) -> Connection:
        database = self._database
        # The gate comes first: a thread that waits there holds no lock that a fork would copy.
        self._gate = database._gate
        self._gate.__enter__()
        try:
            if not self._writes:
                database.dialect.check_usable()
            # Before the turn: connecting takes the turn for a moment, and a pool has a lock for its first connection.
            self._connection = connection = database._connect(self._durable)
            # A statement that reads would not fail.
            if not self._writes and not database.dialect.is_writable(connection.connection.driver_connection):
                connection.invalidate()
                database.dialect.losses += 1
                raise Unavailable(f"{database!r} cannot be written to now")
            if self._writes:
                turn = database.dialect.writing()
                turn.__enter__()
                self._turn = turn
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        database, connection = self._database, self._connection
        happened: Sequence[Event] = ()
        try:
            if self._turn is not None:
                self._turn.__exit__(None, None, None)
            if database.events and connection is not None and not connection.invalidated:
                noted = database.events.take(connection)
                happened = noted if error is None else ()
            if connection is not None and error is None:
                kept = {} if connection.invalidated else connection.info
                database._keep(self._durable, connection)
            elif connection is not None:
                # Interrupted in a statement or a transaction, such as by a time limit: must not be used again.
                if not (connection.invalidated or database.dialect.is_at_rest(connection.connection.driver_connection)):
                    connection.invalidate(error)
                if connection.invalidated:  # perhaps all are lost
                    database._idle.drop_all()
                database._keep(self._durable, connection)
            if error is None and self._writes and database._on_disk[self._durable]:
                database.dialect.flush(kept)
        finally:
            self._gate.__exit__(None, None, None)
        if happened:
            database.events.tell(happened)
        if isinstance(error, DBAPIError) and (explained := database.dialect.explain(error)) is not error:
            raise explained from error


class Database:
    """One database, as this process sees it.

    Arguments:
        url: SQLAlchemy URL.
        publish_durability: ``disk`` when a commit of `write(durable=True)` must be on disk, ``server`` when not.
        worker_durability: as *publish_durability*, for all other commits.
        connect_timeout: seconds after which an attempt to connect is given up.
        silence: seconds without an answer after which it is asked whether a connection is lost.
        alternates: URLs of further servers that have the same data. The first one that can be written to is used.
        schema, wake: the settings ``kathikon_schema`` and ``kathikon_wake``.
        pool_size: connections kept for the next use, for each engine.
    """

    #: Whether this is a transaction of somebody else's, which may last: it must lock no row that workers wait for.
    is_guest = False

    def __init__(
        self,
        url: str | URL,
        *,
        publish_durability: str = "disk",
        worker_durability: str = "server",
        connect_timeout: float = 4.0,
        silence: float = 10.0,
        alternates: Sequence[str] = (),
        schema: str | None = None,
        wake: str = "auto",
        pool_size: int = 5,
    ) -> None:
        self.url = absolute(make_url(url))
        #: What the transactions of this process do to jobs.
        self.events = Events()
        self._servers = [self.url, *map(make_url, alternates)]
        self._new_dialect = partial(dialect_for, self.url, schema, wake)
        self.dialect: Dialect = self._new_dialect()
        self.connect_timeout, self.silence = connect_timeout, silence
        #: Seconds for which `patiently` tries again when the database is away: 0 for producers, more for workers.
        self.patience = 0.0
        #: Whether claims have to know what is paused. False in a worker that has read that nothing is: see `pauses`.
        self.knows_pauses = True
        #: Whether this process has claimed a job with limits, whose keys it locks: see `limits.admit`.
        self.knows_limits = False
        #: Set with it; cleared when nothing is left of limits: see `limit_numbers.prune`.
        self.has_limits_to_prune = False
        #: Set when this process has taken tokens of a rate: its promoter has to ask when the next one is there.
        self.has_taken_tokens = False
        #: Number of connections made so far; it grows after a loss.
        self.opened = 0
        #: Called before the connections are closed: by objects that have connections of their own.
        self.on_close: list[Callable[[], None]] = []
        #: Called when another database has taken the place of this one: no row of ours is there.
        self.on_replaced: list[Callable[[], None]] = []
        self._on_disk = {True: publish_durability == "disk", False: worker_durability == "disk"}
        self._identity: tuple[object, str | None] | None = None
        self._gate = self._new_gate()
        self._noticing = threading.Lock()
        self._pool_size = pool_size
        self._idle = Idle(pool_size, self._gate)
        forks.watch(self)

    def __repr__(self) -> str:
        return f"<Database {shown(self.url)}>"

    @property
    def identity(self) -> tuple[object, str | None]:
        """What the server says of which database this is: equal for each connection to it, whatever the URL.

        The second value is the schema of the tables; `None`: it has no name.
        """
        if self._identity is None:
            with self.read() as connection:
                self._identity = self.dialect.identity(connection), self.dialect.schema_of_tables(connection)
        return self._identity

    @cached_property
    def _durable(self) -> Engine:
        return self._make_engine(durable=True)

    @cached_property
    def _relaxed(self) -> Engine:
        return self._make_engine(durable=False)

    @cached_property
    def _own(self) -> Engine:
        """Opens a new connection each time: a pool's may be lost already, which a listener would not notice."""
        return self._make_engine(durable=False, poolclass=NullPool)

    def _make_engine(self, durable: bool, **options: Any) -> Engine:
        on_disk = self._on_disk[durable]
        # The pool only counts: `_keep` keeps the connections, since to take one of the pool costs more.
        options = options or {"pool_size": 1, "max_overflow": MOST_IN_USE - 1}
        engine = create_engine(
            self.url,
            isolation_level="AUTOCOMMIT",  # BEGIN and COMMIT are sent by `write`; a single statement needs neither
            hide_parameters=True,  # no payloads in error messages
            pool_reset_on_return=None,  # see `_Use`
            execution_options={OPTION: self.dialect, ON_DISK: on_disk},
            **options,
        )
        usual = engine.dialect.is_disconnect
        engine.dialect.is_disconnect = partial(self._is_disconnect, usual)  # type: ignore[method-assign]
        event.listen(engine, "do_connect", self._do_connect)
        event.listen(engine, "connect", lambda connection, _: self._on_connect(connection, on_disk, durable))
        return engine

    def _do_connect(self, dialect: Any, *_: Any) -> Any:
        """Return a connection of the driver for SQLAlchemy's event. All connections begin here."""
        self.dialect.check_usable()
        for url in self._servers:
            args, named = dialect.create_connect_args(url)
            named |= self.dialect.connect_args(url, self.connect_timeout)
            try:
                connection = self.dialect.connect(partial(dialect.connect, *args), named, self.silence)
            except dialect.loaded_dbapi.OperationalError as error:
                lost = error
            else:  # the next attempt, in any thread, begins with this server
                # Another list: one that is sorted in place is empty to other threads meanwhile.
                self._servers = sorted(self._servers, key=lambda one: one is not url)
                return connection
        raise lost

    def _is_disconnect(self, usual: Callable[..., bool], error: Exception, *of: Any) -> bool:
        """Whether a driver's *error* says that its connection is lost: the one place that decides this."""
        is_lost = self.dialect.is_lost(error) or usual(error, *of)
        self.dialect.losses += is_lost
        return is_lost

    def _on_connect(self, connection: Any, on_disk: bool, publishes: bool) -> None:
        self.opened += 1
        self.dialect.on_connect(connection, on_disk, publishes)

    def _connect(self, durable: bool) -> Connection:
        """Return a connection for one use: one kept at hand, or else, at a higher cost, one of the pool."""
        self._check_replaced()
        if (kept := self._idle.take(durable)) is not None:
            return kept
        connection = (self._durable if durable else self._relaxed).connect()
        if self.dialect.is_replaced():  # a new connection may be the first that sees it
            connection.invalidate()
            connection.close()
            self._check_replaced()
        return connection

    def check_tables(self) -> None:
        """Raise `Unavailable` if other tables have taken the place of those that were used.

        A connection that stays open goes on with tables of the same name, and has no error that tells.
        """
        with self.read() as connection:
            self.dialect.see_tables(connection)
        self._check_replaced()

    def _check_replaced(self) -> None:
        if self.dialect.is_replaced():
            self._notice()
            raise Unavailable(f"{self!r} was deleted or replaced while it was in use; what it held is gone")

    def _notice(self) -> None:
        """Call `on_replaced`, in one of the threads that notice the replacement; the others do not wait."""
        if not self._noticing.acquire(blocking=False):
            return
        try:
            if self.dialect.is_replaced():  # else another thread has done this meanwhile
                for callback in list(self.on_replaced):
                    callback()
                self._dispose()
        finally:
            self._noticing.release()

    def _keep(self, durable: bool, connection: Connection) -> None:
        """Keep *connection* for the next use, or close it."""
        if connection.in_transaction():  # in SQLAlchemy's view: here each statement commits itself
            with suppress(DBAPIError):  # its statements are committed
                connection.rollback()
        engine = self.__dict__.get("_durable" if durable else "_relaxed")
        if connection.invalidated or connection.engine is not engine:
            drop(connection)
        else:
            self._idle.keep(durable, connection)

    def read(self) -> AbstractContextManager[Connection]:
        """A connection for reading. Each statement stands alone."""
        return self._use(writes=False, durable=False)

    def once(self, durable: bool = False) -> AbstractContextManager[Connection]:
        """A connection for one verb of the dialect or one writing statement, committed by itself."""
        return self._use(writes=True, durable=durable)

    def _use(self, writes: bool, durable: bool) -> AbstractContextManager[Connection]:
        use = _Use(self, writes, durable)
        return use if self.dialect.shares_sessions is False else self._in_transaction(use)

    @contextmanager
    def _in_transaction(self, use: _Use) -> Iterator[Connection]:
        """*use*, as a transaction if sessions are shared, which the first connection shows."""
        with use as connection, self.dialect.transaction(connection) if self.dialect.shares_sessions else nullcontext():
            yield connection

    @contextmanager
    def write(self, durable: bool = False) -> Iterator[Connection]:
        """A transaction that writes; *durable*: committed with *publish_durability*, else *worker_durability*."""
        with self.once(durable) as connection, self.transaction(connection):
            yield connection

    def check_writers(self) -> None:
        """Raise `Unavailable` if a transaction of this process keeps the workers from writing, and does not end."""
        if self.dialect.is_locked_by_us():
            with self.write():
                pass

    def transaction(self, connection: Connection) -> AbstractContextManager[None]:
        """A transaction on a *connection* of `once`."""
        return nullcontext() if self.dialect.shares_sessions else self.dialect.transaction(connection)

    def patiently(self, call: Callable[[bool], T], patient: bool = True) -> T:
        """Return *call*(again). After a lost connection, call again: immediately, then for `patience` seconds.

        *again*: an earlier try may have been committed although its answer was lost. Raises `Unavailable`.
        """
        again = False
        try:
            return call(again)
        except Exception as error:
            if not is_lost(error):
                raise self.dialect.explain(error) from error
            lost = error
        again = True
        if patience := self.patience if patient else 0.0:
            logger.warning("Kathikon: %r is away, trying again for %g s: %s", self, patience, in_words(lost))
        retrying = Retrying(
            stop=stop_after_delay(patience),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            retry=retry_if_exception(is_lost),
            reraise=True,
        )
        try:
            return retrying(call, again)
        except Exception as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> Exception:
        """Return *error*, or a `StorageError` that says better what is wrong."""
        explained = self.dialect.explain(error)
        if explained is error and is_lost(error) and not isinstance(error, Unavailable):
            explained = Unavailable(f"{self!r} is away: {in_words(error)}")
        return explained

    def wakeup(self, node_id: int | None) -> Wakeup:
        """Return the `Wakeup` for calls to all nodes, and to the node *node_id*."""
        return self.dialect.wakeup(self.detached, node_id)

    def hearing(self, listener: int) -> Wakeup:
        """Return the `Wakeup` for results; *listener* is this process's own random number."""
        return self.dialect.hearing(self.detached, listener)

    def detached(self) -> Any:
        """Return a connection of the driver that belongs to the caller."""
        connection = self._own.connect()  # unlike raw_connection(), it fails with an error of SQLAlchemy's
        driver_connection = connection.connection.driver_connection
        connection.detach()
        return driver_connection

    def close(self) -> None:
        """Close the connections that are not in use."""
        for callback in list(self.on_close):
            callback()
        self._dispose()
        self._idle.close()

    def _dispose(self) -> None:
        self._identity = None
        self._idle.drop_all()
        for name in ("_durable", "_relaxed", "_own"):
            engine: Engine | None = self.__dict__.pop(name, None)
            if engine is not None:
                engine.dispose()
        self.dialect.close()

    def _new_gate(self) -> Gate | AbstractContextManager[None]:
        """SQLite's locks and memory belong to one process: no connection may be open during a fork."""
        return Gate() if self.dialect.closes_before_fork else nullcontext()

    def before_fork(self) -> None:
        """Close the connections that must not be open during a fork, and keep them closed."""
        self._idle.stop()
        if isinstance(self._gate, Gate):
            self._gate.shut()
            self._dispose()

    def after_fork_in_parent(self) -> None:
        """Undo `before_fork`."""
        if isinstance(self._gate, Gate):
            self._gate.open()

    def after_fork_in_child(self) -> None:
        """Leave the connections to the parent process."""
        _inherited.append(self._idle)
        for name in ("_durable", "_relaxed", "_own"):
            engine: Engine | None = self.__dict__.pop(name, None)
            if engine is not None:
                _inherited.append(engine.pool)
                engine.dispose(close=False)  # the sockets are the parent's
        self.dialect = self._new_dialect()
        self._gate = self._new_gate()
        self._idle = Idle(self._pool_size, self._gate)
        self._noticing = threading.Lock()
