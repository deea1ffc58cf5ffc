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
    """What one kind of database does in its own way."""

    name: str
    #: Opens a transaction that writes.
    begin = "BEGIN"
    #: Whether a call reaches only nodes whose row says that they wait; otherwise everybody hears it.
    wakes_by_name = False
    #: Whether who waits for a result enters that in a table and is called by name; otherwise everybody hears of each.
    enters_waits = False
    #: Whether what was changed is kept, and met by whoever reads an index, until nobody can see it any more.
    keeps_old_rows = False
    #: The fence of a new row: a random one, as its number may be that of a row that is gone, whose fence must not fit.
    first_fence: ColumnElement[int]
    #: Whether one statement can change several sets of rows, each in a common table expression.
    changes_in_ctes = False

    #: Arguments of the driver's connect() that refuse a server which cannot be written to.
    writable: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, url: URL) -> None:
        self.url = url

    @abstractmethod
    def connect_args(self, timeout: float, on_disk: bool, publishes: bool) -> dict[str, Any]:
        """Arguments of the driver's connect(): whether commits are on disk, and whether jobs are published."""

    def on_connect(self, connection: Any, on_disk: bool) -> None:
        """Prepare a new connection of the driver."""

    @abstractmethod
    def is_at_rest(self, connection: Any) -> bool:
        """Whether a connection of the driver is within no transaction and no statement."""

    def check_usable(self) -> None:
        """Raise `Unavailable` where a connection would only fail in a way that is hard to read."""

    def is_replaced(self) -> bool:
        """Whether what we are connected to is no longer the database that has this URL."""
        return False

    def writing(self) -> AbstractContextManager[None]:
        """Held around a transaction that writes."""
        return nullcontext()

    def flush(self, kept: dict[Any, Any]) -> None:
        """Called after a commit that is to be on disk, where it is not the commit itself that waits for it.

        Arguments:
            kept: what is kept for the connection as long as that is open.
        """

    def explain(self, error: Exception) -> Exception:
        """*error*, or one that says better what is wrong."""
        return error if isinstance(error, StorageError) else self._explained(error)

    def _explained(self, error: Exception) -> Exception:
        return error

    @abstractmethod
    def insert_or_update(self, table: Table) -> Any:
        """An INSERT that offers ``on_conflict_do_update`` and ``on_conflict_do_nothing``."""

    @abstractmethod
    def picked(self, select: Select[Any], table: Table) -> ColumnElement[bool]:
        """The condition that a row of *table* is among those that *select* (of ``seq``) picks, and nobody else's."""

    def picked_in_turn(self, selects: Sequence[Select[Any]], table: Table) -> ColumnElement[bool]:
        """As `picked`, of the first ``at_most`` rows of several *selects*, where old rows are kept."""
        raise NotImplementedError(f"{self.name} keeps no old rows")

    @abstractmethod
    def held(self, table: Table, owned: bool = True, texts: Sequence[str] = ()) -> ColumnElement[bool]:
        """The condition that a row of *table* is held as one of the holds given to `of_holds` says.

        Arguments:
            owned: the node is compared as well, not only number and fence.
            texts: names of what comes with each hold: see `brought`.
        """

    @abstractmethod
    def brought(self, name: str) -> ColumnElement[str]:
        """The text of that name that came with the hold which a row fits, in a statement that says `held`."""

    @abstractmethod
    def of_holds(self, holds: Mapping[Hold, Mapping[str, str | None]], values: dict[str, Any]) -> Any:
        """The parameters of a statement that says `held`: *holds*, each with its texts, and *values* for all."""

    def for_holds(
        self, connection: Connection, statement: Executable, holds: Sequence[Hold], values: dict[str, Any]
    ) -> int:
        """Run *statement*, which says `held`, for *holds*; the number of rows it changed."""
        return prepared.count(connection, statement, self.of_holds({hold: {} for hold in holds}, values))

    @abstractmethod
    def publishing(self, insert: Any, queue: BindParameter[str] | None) -> Executable:
        """*insert*, extended so that it wakes one idle node that waits for *queue*, a parameter of the insert.

        With `None` it calls them all: each shall look when the next job is due.
        """

    @abstractmethod
    def wake(self, connection: Connection, queues: Iterable[str], count: int) -> None:
        """As the transaction commits, wake up to *count* idle nodes that wait for one of *queues*."""

    @abstractmethod
    def ring(self, connection: Connection) -> None:
        """As the transaction commits, wake every node: there is a message for somebody."""

    @abstractmethod
    def publish(
        self, connection: Connection, statement: Executable, values: Mapping[str, Any], later: bool, again: bool
    ) -> None:
        """Run *statement*, one of `publishing`, outside of a transaction. It is on disk after the connection's use.

        Arguments:
            later: the job has a due time, so that all nodes are called.
            again: it may have been committed before.
        """

    @abstractmethod
    def wakeup(self, connect: Callable[[], Any], node_id: int | None) -> Wakeup:
        """What this process waits on for other processes' calls; *connect* gives a connection of the driver."""

    @abstractmethod
    def tell(self, connection: Connection, statement: Any, values: Any, ended: bool, fixed: bool) -> int:
        """Run *statement*, a change of jobs, and as the transaction commits wake who waits for what it has changed.

        Arguments:
            ended: the jobs end by it; otherwise there is no more than news of them.
            fixed: the statement is the same object each time.

        Returns the number of rows it changed.
        """

    def entering(self, ready: Select[Any]) -> Executable:
        """*ready*, which reads jobs with the ids ``keys``, extended so that it enters waits for the other ``names``."""
        raise NotImplementedError(f"{self.name} has no table of waits")

    @abstractmethod
    def hearing(self, connect: Callable[[], Any], listener: int) -> Wakeup:
        """What a process that waits for results waits on; it hears all that comes from now on."""

    def incarnation(self, connection: Connection) -> object:
        """What changes when the server is started anew, and may have forgotten what was not yet on disk."""
        return None

    def hold(self, connect: Callable[[], Any], node_id: int) -> Any:
        """Take a lock that ends with this process; what holds it has ``close()``. `None`: it is not to be had."""
        return None

    def check_held(self, lock: Any) -> None:
        """Raise the database's error when the connection that holds the lock is gone. It asks the server nothing."""

    def has_free_lock(self, node_id: ColumnElement[int]) -> ColumnElement[bool]:
        """The condition that nobody holds the lock of the node that a statement's column names."""
        return false()

    def is_lock_free(self, connection: Connection, node_id: int) -> bool | None:
        """Whether nobody holds the lock of that node; `None` where there are no such locks."""
        return None

    @abstractmethod
    def migrating(self, connection: Connection) -> AbstractContextManager[None]:
        """Held while the schema is changed: only one process does."""

    def close(self) -> None:
        """Give up what is held beside connections."""
