"""The interface of a dialect."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from sqlalchemy import URL, Connection, Executable, Table, false
from sqlalchemy.sql.expression import BindParameter, ColumnElement, Select

from kathikon_celery.job import Hold
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.wakeup import Wakeup
from kathikon_celery.storage.errors import StorageError


class Dialect(ABC):
    """What one kind of database does differently from others."""

    name: str
    #: The statement that opens a transaction that writes.
    begin = "BEGIN"
    #: Whether a call reaches only nodes whose row says that they wait; otherwise all nodes hear it.
    wakes_by_name = False
    #: Whether a process that waits for a result has a row for that and is called by name; otherwise it hears all calls.
    enters_waits = False
    #: Whether old versions of rows stay in the indexes, and slow down reading, while a transaction may see them.
    keeps_old_rows = False
    #: The fence of a new row: random, as its ``seq`` may be that of a deleted row, whose claims must not fit.
    first_fence: ColumnElement[int]
    #: Whether one statement can change several sets of rows, each in a common table expression.
    changes_in_ctes = False

    #: Arguments of the driver's connect() that refuse a server which cannot be written to.
    writable: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, url: URL) -> None:
        self.url = url

    @abstractmethod
    def connect_args(self, timeout: float, on_disk: bool, publishes: bool) -> dict[str, Any]:
        """Return arguments of connect(). *timeout*: seconds; *on_disk*: commits wait for disk; *publishes*: jobs."""

    def on_connect(self, connection: Any, on_disk: bool) -> None:
        """Prepare a new connection of the driver."""

    @abstractmethod
    def is_at_rest(self, connection: Any) -> bool:
        """Whether a connection of the driver is outside of any transaction and statement."""

    def check_usable(self) -> None:
        """Raise `Unavailable` if connecting would fail with a less clear error."""

    def is_replaced(self) -> bool:
        """Whether the URL now means another database than the one that we are connected to."""
        return False

    def writing(self) -> AbstractContextManager[None]:
        """Return the context of a transaction that writes."""
        return nullcontext()

    def flush(self, kept: dict[Any, Any]) -> None:
        """Wait until the last commit is on disk, if the commit itself does not. Raises `Unavailable`.

        Arguments:
            kept: what is kept for the connection while that is open.
        """

    def explain(self, error: Exception) -> Exception:
        """Return *error*, or a `StorageError` that says better what is wrong."""
        return error if isinstance(error, StorageError) else self._explained(error)

    def _explained(self, error: Exception) -> Exception:
        return error

    @abstractmethod
    def insert_or_update(self, table: Table) -> Any:
        """Return an INSERT with the methods ``on_conflict_do_update`` and ``on_conflict_do_nothing``."""

    @abstractmethod
    def picked(self, select: Select[Any], table: Table) -> ColumnElement[bool]:
        """Return the condition that *select* (of ``seq``) picks a row of *table* that no other transaction has."""

    def picked_in_turn(self, selects: Sequence[Select[Any]], table: Table) -> ColumnElement[bool]:
        """As `picked`, for the first ``at_most`` rows of several *selects*, if the dialect ``keeps_old_rows``."""
        raise NotImplementedError(f"{self.name} keeps no old rows")

    @abstractmethod
    def held(self, table: Table, owned: bool = True, texts: Sequence[str] = ()) -> ColumnElement[bool]:
        """Return the condition that a row of *table* is held under one of the claims given to `of_holds`.

        Arguments:
            owned: compare the node as well, not only ``seq`` and fence.
            texts: names of the texts that come with each claim: see `brought`.
        """

    @abstractmethod
    def brought(self, name: str) -> ColumnElement[str]:
        """Return, for a statement with `held`, the text called *name* that came with the row's claim."""

    @abstractmethod
    def of_holds(self, holds: Mapping[Hold, Mapping[str, str | None]], values: dict[str, Any]) -> Any:
        """Return the parameters of a statement with `held`: *holds*, each with its texts, and *values* for all."""

    def for_holds(
        self, connection: Connection, statement: Executable, holds: Sequence[Hold], values: dict[str, Any]
    ) -> int:
        """Run *statement*, which has `held`, for *holds*; return the number of changed rows."""
        return prepared.count(connection, statement, self.of_holds({hold: {} for hold in holds}, values))

    @abstractmethod
    def publishing(self, insert: Any, queue: BindParameter[str] | None) -> Executable:
        """Return *insert*, extended to wake one idle node that waits for *queue*, a parameter of the insert.

        With `None` it calls all nodes: each has to look when the next job is due.
        """

    @abstractmethod
    def wake(self, connection: Connection, queues: Iterable[str], count: int) -> None:
        """Wake up to *count* idle nodes that wait for one of *queues* (keys), when the transaction commits."""

    @abstractmethod
    def ring(self, connection: Connection) -> None:
        """Wake every node when the transaction commits: there is a message, or a job with a due time."""

    @abstractmethod
    def publish(
        self, connection: Connection, statement: Executable, values: Mapping[str, Any], later: bool, again: bool
    ) -> None:
        """Run *statement*, one of `publishing`, outside of a transaction. It is on disk after the connection's use.

        Arguments:
            later: the job has a due time, so that all nodes are called.
            again: an earlier try may have been committed.
        """

    @abstractmethod
    def wakeup(self, connect: Callable[[], Any], node_id: int | None) -> Wakeup:
        """Return what hears the calls to all nodes and to *node_id*; *connect* returns a connection of the driver."""

    @abstractmethod
    def tell(self, connection: Connection, statement: Any, values: Any, ended: bool, fixed: bool) -> int:
        """Run *statement*, which changes jobs, and wake the processes that wait for them when the transaction commits.

        Arguments:
            ended: the jobs have a result now; otherwise only progress.
            fixed: the statement is the same object each time.

        Returns the number of changed rows.
        """

    def entering(self, ready: Select[Any]) -> Executable:
        """Return *ready*, which reads the ready jobs of ``keys``, extended to enter waits for the other ``names``."""
        raise NotImplementedError(f"{self.name} has no table of waits")

    @abstractmethod
    def hearing(self, connect: Callable[[], Any], listener: int) -> Wakeup:
        """Return what hears, from now on, of the results that the process *listener* waits for."""

    def incarnation(self, connection: Connection) -> object:
        """Return a value that changes when the server restarts: it may have forgotten what was not on disk."""
        return None

    def hold(self, connect: Callable[[], Any], node_id: int) -> Any:
        """Take the node's lock, which ends with this process. Return its holder, with ``close()``, or `None`."""
        return None

    def check_held(self, lock: Any) -> None:
        """Raise `Unavailable` when the connection that holds the lock is gone. Sends no statement."""

    def has_free_lock(self, node_id: ColumnElement[int]) -> ColumnElement[bool]:
        """Return the condition that no process holds the lock of the node *node_id*, a column."""
        return false()

    def is_lock_free(self, connection: Connection, node_id: int) -> bool | None:
        """Whether no process holds the node's lock; `None` if the database has no such locks."""
        return None

    @abstractmethod
    def migrating(self, connection: Connection) -> AbstractContextManager[None]:
        """Return the context in which a process changes the schema, one at a time."""

    def close(self) -> None:
        """Close what is open beside connections."""
