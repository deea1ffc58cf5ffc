"""The interface of a dialect: verbs, which run statements and return rows or facts.

A verb may take several statements, and is atomic: if its caller has no transaction (a connection of `Database.once`),
a dialect that needs several statements runs them in a transaction of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from math import inf
from typing import Any, ClassVar

from sqlalchemy import URL, Connection, Table, false
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.expression import ColumnElement, Select

from kathikon_celery.job import Hold
from kathikon_celery.storage.dialects.parameters import Change, Changed, Claim, Pick, Taken, Upsert
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.wakeup import Wakeup
from kathikon_celery.storage.errors import StorageError, TransactionRefused

#: The option of an engine that says whether its commits wait for the disk.
ON_DISK = "kathikon_on_disk"


class Dialect(ABC):
    """What one kind of database does differently from others.

    Several verbs take these arguments:

    - *values*: the parameters of the statements.
    - *which*: a list to which the verb adds the changed or deleted jobs, in any order. Without it they cost nothing.
    """

    name: str
    #: Whether a call reaches only nodes that wait (see `wait_for`); otherwise all nodes hear it.
    wakes_by_name = False
    #: Whether a process that waits for a result has a row for that (see `enter_waits`) and is called by name; otherwise
    #: it hears all calls.
    enters_waits = False
    #: Whether old versions of rows stay in the indexes, and slow down reading, while a transaction may see them: then
    #: a claim begins where earlier claims found the first jobs.
    keeps_old_rows = False
    #: Whether `complete_and_claim` alone takes less time than `change_held` and `claim` in one transaction.
    completes_and_claims = False
    #: Whether only one transaction at a time can write.
    has_one_writer = False
    #: Whether the verbs of `guest` wake the nodes when the caller commits.
    calls_with_commit = False
    #: Whether no connection may be open while the process forks.
    closes_before_fork = False
    #: Statements that this kind of database runs after a migration, by its number, such as for indexes of its own.
    after_migrations: ClassVar[Mapping[str, Sequence[str]]] = {}
    #: Whether each use of a connection is a transaction, since the next use may have another server process and session
    #: (a pooler in transaction mode). `None`: not known before the first connection.
    shares_sessions: bool | None = False
    #: Seconds after which a node renews its lease at the latest while it holds no lock (see `hold`).
    renewal_without_lock = inf
    #: What a worker needs for being woken, if it cannot be.
    advice: str | None = None

    def __init__(self, url: URL, schema: str | None = None, wake: str = "auto") -> None:
        self.url = url
        self.schema = schema
        #: How many connections were found to be lost so far. Perhaps others are lost as well that send nothing.
        self.losses = 0

    # --- connections

    @abstractmethod
    def connect_args(self, url: URL, timeout: float) -> dict[str, Any]:
        """Return what the driver's connect() takes besides the parameters of *url*. *timeout*: seconds."""

    def connect(self, connect: Callable[..., Any], arguments: Mapping[str, Any], silence: float) -> Any:
        """Return a connection by the driver's *connect*, called with *arguments*.

        Arguments:
            silence: seconds without an answer after which it is asked whether the connection is lost.
        """
        return connect(**arguments)

    def on_connect(self, connection: Any, on_disk: bool, publishes: bool) -> None:
        """Prepare a new connection of the driver. *on_disk*: its commits wait for the disk."""

    def is_lost(self, error: BaseException) -> bool:
        """Whether a driver's *error* says that its connection is of no more use, although it may be open."""
        return False

    def is_writable(self, connection: Any) -> bool:
        """Whether the server can be written to, as far as a connection of the driver has told. Sends no statement."""
        return True

    def see_tables(self, connection: Connection) -> None:
        """Note which tables there are: `is_replaced` then tells whether they are others than before."""

    @abstractmethod
    def is_at_rest(self, connection: Any) -> bool:
        """Whether a connection of the driver is outside of any transaction and statement."""

    def check_usable(self) -> None:
        """Raise `Unavailable` if connecting would fail with a less clear error."""

    def is_locked_by_us(self) -> bool:
        """Whether an open transaction of this process, such as the app's own, keeps all others from writing."""
        return False

    def is_replaced(self) -> bool:
        """Whether the URL now means another database, or other tables, than those that we have used."""
        return False

    def close(self) -> None:
        """Close what is open beside connections."""

    def explain(self, error: Exception) -> Exception:
        """Return *error*, or a `StorageError` that says better what is wrong."""
        return error if isinstance(error, StorageError) else self._explained(error)

    def _explained(self, error: Exception) -> Exception:
        return error

    def incarnation(self, connection: Connection) -> object:
        """Return a value that changes when the server restarts: it may have forgotten what was not on disk."""
        return None

    # --- transactions of others

    @abstractmethod
    def identity(self, connection: Connection) -> object:
        """Return what the server says of which database *connection* writes to."""

    def schema_of_tables(self, connection: Connection) -> str | None:
        """Return the schema in which *connection*, one of ours, finds the tables; `None`: it has no name."""
        return None

    @abstractmethod
    def guest(self) -> Dialect:
        """Return the dialect for a transaction of the caller's, whose calls lock no row of a node."""

    def join(self, connection: Connection) -> None:
        """Raise `TransactionRefused` when *connection*, the caller's, has no transaction and will not begin one."""
        driver: Any = connection.connection.dbapi_connection
        commits = getattr(driver, "autocommit", None)
        if commits is True or (commits is not False and getattr(driver, "isolation_level", "") is None):
            raise TransactionRefused(
                "the connection has no open transaction and commits each statement by itself (autocommit);"
                " begin a transaction, or send the task without this connection"
            )

    def call(self) -> None:
        """Wake every node now, after a commit of the caller's; needed unless the dialect ``calls_with_commit``."""

    # --- transactions

    def writing(self) -> AbstractContextManager[None]:
        """Return the context of a transaction that writes, or of one writing verb."""
        return nullcontext()

    def begin(self, connection: Connection) -> None:
        """Begin a transaction that writes."""
        prepared.plain(connection, "BEGIN")

    def begin_planned(self, connection: Connection) -> None:
        """`begin` a transaction whose statements keep their first plans: none of them depends on its parameters."""
        self.begin(connection)

    def commit(self, connection: Connection) -> None:
        """Commit the transaction. Its verbs' calls are made now, or when `writing` ends."""
        prepared.plain(connection, "COMMIT")

    def roll_back(self, connection: Connection) -> None:
        """Undo the transaction. Its verbs' calls are not made."""
        prepared.plain(connection, "ROLLBACK")

    @contextmanager
    def transaction(self, connection: Connection, is_planned: bool = False) -> Iterator[None]:
        """A transaction that writes; it is rolled back when an error is raised. *is_planned*: see `begin_planned`."""
        try:
            (self.begin_planned if is_planned else self.begin)(connection)
            yield
            self.commit(connection)
        except BaseException:
            if not connection.invalidated:
                with suppress(DBAPIError):  # after some errors SQLite has rolled back by itself
                    self.roll_back(connection)
            raise

    def atomic(self, connection: Connection, is_planned: bool = False) -> AbstractContextManager[None]:
        """Return the context of a verb that takes several statements: a transaction, unless its caller has one.

        *is_planned*: see `begin_planned`.
        """
        is_alone = self.is_at_rest(connection.connection.driver_connection)
        return self.transaction(connection, is_planned) if is_alone else nullcontext()

    def flush(self, kept: dict[Any, Any]) -> None:
        """Wait until the last commit is on disk, if the commit itself does not. Raises `Unavailable`.

        Arguments:
            kept: what is kept for the connection while that is open.
        """

    @abstractmethod
    def vitals(self, connection: Connection) -> Mapping[str, float]:
        """Return figures of the database's own: ``table_bytes``, and ``oldest_transaction_seconds`` if it is known."""

    # --- the schema

    @abstractmethod
    def migrating(self, connection: Connection) -> AbstractContextManager[None]:
        """Return the context in which a process changes the schema, one at a time."""

    def before_migrations(self) -> Sequence[str]:
        """Return the statements that a printed migration begins with."""
        return ()

    def take_turns(self, connection: Connection) -> None:
        """Wait for other transactions that have called this. Unneeded where only one transaction writes."""

    # --- publishing

    @abstractmethod
    def upsert(self, connection: Connection, upsert: Upsert, values: Mapping[str, Any]) -> bool:
        """Insert a row, or change the row with its key; return false when neither was done."""

    @abstractmethod
    def upsert_many(self, connection: Connection, upsert: Upsert, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run `upsert` for each of *rows*, which are values."""

    @abstractmethod
    def publish(
        self, connection: Connection, upsert: Upsert, values: Mapping[str, Any], later: bool, again: bool
    ) -> None:
        """Write a job, outside of a transaction, and wake one idle node for it. It is on disk when the connection is
        given back.

        Arguments:
            upsert: of a job; its ``queue`` is a parameter.
            later: the job has a due time, so that all nodes are called: each has to look when the next job is due.
            again: an earlier try may have been committed.
        """

    # --- claiming and reporting

    @abstractmethod
    def claim(
        self,
        connection: Connection,
        claim: Claim,
        values: Mapping[str, Any],
        waiting: tuple[list[str], int] | None = None,
    ) -> Sequence[Any]:
        """Claim jobs that no other transaction has; return rows that begin with *claim*'s columns, in any order.

        Arguments:
            waiting: queues (keys) and a number. If fewer jobs are found, and the dialect ``wakes_by_name``, the verb
                notes as well that the node waits for the queues.
        """

    @abstractmethod
    def complete_and_claim(
        self,
        connection: Connection,
        change: Change,
        holds: Sequence[Hold],
        claim: Claim,
        values: Mapping[str, Any],
        waiting: tuple[list[str], int] | None = None,
    ) -> tuple[int, Sequence[Any]]:
        """Run `change_held` and `claim`; return the results of both."""

    def preparations(self, change: Change, claims: Sequence[Claim]) -> Iterator[Callable[[Connection], None]]:
        """Yield steps that compile and prepare `change_held` first, then `claim` and `complete_and_claim`."""
        yield from ()

    @abstractmethod
    def change_held(
        self,
        connection: Connection,
        change: Change,
        holds: Sequence[Hold],
        values: Mapping[str, Any],
        *,
        owned: bool = True,
        which: list[Changed] | None = None,
    ) -> int:
        """Change the rows that are held under *holds*; return their number.

        Arguments:
            owned: compare the node as well, not only ``seq`` and fence.
        """

    @abstractmethod
    def end_held(
        self,
        connection: Connection,
        change: Change,
        ends: Mapping[Hold, Mapping[str, str | None]],
        *,
        which: list[Changed] | None = None,
    ) -> int:
        """Run `change_held` with texts for each job, and wake the processes that wait for the results.

        Arguments:
            ends: for each claim the texts by column, with the same columns for all.
        """

    @abstractmethod
    def delete_held(self, connection: Connection, table: Table, holds: Sequence[Hold]) -> int:
        """Delete the rows of *table* that are held under *holds*; return their number."""

    # --- changing or deleting rows that no other transaction has

    @abstractmethod
    def pick_and_change(
        self,
        connection: Connection,
        change: Change,
        pick: Pick,
        columns: tuple[ColumnElement[Any], ...],
        values: Mapping[str, Any],
        *,
        which: list[Changed] | None = None,
    ) -> Taken:
        """Change the rows of *pick*; return their number, and their *columns* after the change, in any order."""

    @abstractmethod
    def pick_and_delete(
        self,
        connection: Connection,
        pick: Pick,
        columns: tuple[ColumnElement[Any], ...],
        values: Mapping[str, Any],
        *,
        which: list[Changed] | None = None,
    ) -> Taken:
        """Delete the rows of *pick*; return their number, and their *columns*, in any order."""

    @abstractmethod
    def change_and_read(
        self, connection: Connection, change: Change, columns: tuple[ColumnElement[Any], ...], values: Mapping[str, Any]
    ) -> Sequence[Any] | None:
        """Change the only row that fits *change*; return *columns*, read after the change, or `None` without a row.

        Of two transactions that do this at once, the second one reads the change of the first.
        """

    # --- calls

    @abstractmethod
    def wait_for(self, connection: Connection, node_id: int, queues: list[str] | None) -> None:
        """Note the queues (keys) that the idle node waits for, if the dialect ``wakes_by_name``; `None`: it is busy."""

    @abstractmethod
    def wake(self, connection: Connection, queues: Iterable[str], count: int) -> None:
        """Wake up to *count* idle nodes that wait for one of *queues* (keys), when the transaction commits."""

    @abstractmethod
    def ring(self, connection: Connection) -> None:
        """Wake every node when the transaction commits: there is a message, or a job with a due time."""

    @abstractmethod
    def wakeup(self, connect: Callable[[], Any], node_id: int | None) -> Wakeup:
        """Return the `Wakeup` for calls to all nodes and to *node_id*; *connect* returns a driver's connection."""

    # --- results

    @abstractmethod
    def change_and_tell(
        self,
        connection: Connection,
        change: Change | Upsert,
        values: Mapping[str, Any],
        ended: bool,
        *,
        which: list[Changed] | None = None,
    ) -> int:
        """Change jobs, and wake the processes that wait for them when the transaction commits; return their number.

        Arguments:
            ended: the jobs have a result now; otherwise only progress.
        """

    def enter_waits(
        self, connection: Connection, ready: Select[Any], keys: Sequence[str], listener: int
    ) -> Sequence[Any]:
        """Return the ready jobs of *keys*; enter waits for the others, so that their ends are calls to *listener*.

        Arguments:
            ready: SELECT of the ready jobs, with a column ``id``; its parameter ``keys`` is a list, or the only key.
        """
        raise NotImplementedError(f"{self.name} has no table of waits")

    def leave_waits(self, connection: Connection, keys: Sequence[str], listener: int) -> None:
        """Undo `enter_waits`."""
        raise NotImplementedError(f"{self.name} has no table of waits")

    @abstractmethod
    def hearing(self, connect: Callable[[], Any], listener: int) -> Wakeup:
        """Return the `Wakeup`, which listens already, for results that the process *listener* waits for."""

    # --- locks that end with a process

    def hold(self, connect: Callable[[], Any], node_id: int) -> Any:
        """Take the node's lock, which ends with this process. Return its holder, with ``close()``, or `None`."""
        return None

    def check_held(self, lock: Any) -> None:
        """Raise `Unavailable` when the lock's connection is gone. Sends a statement only after new `losses`."""

    def has_free_lock(self, node_id: ColumnElement[int]) -> ColumnElement[bool]:
        """Return the condition that no process holds the lock of the node *node_id*, a column."""
        return false()

    def is_lock_free(self, connection: Connection, node_id: int) -> bool | None:
        """Whether no process holds the node's lock; `None` if the database has no such locks."""
        return None
