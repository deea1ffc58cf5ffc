"""PostgreSQL: rows claimed under SKIP LOCKED, nodes woken one by one through LISTEN and NOTIFY."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import chain
from time import monotonic
from typing import Any, ClassVar

from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Double,
    Executable,
    Integer,
    Table,
    and_,
    any_,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    table,
    text,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, TEXT
from sqlalchemy.sql.expression import BindParameter, ColumnElement, Select

from kathikon_celery.job import Hold
from kathikon_celery.settings import shown
from kathikon_celery.storage.clock import now
from kathikon_celery.storage.dialects.base import Dialect
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.wakeup import ENDED, NEWS, PUBLISHED, Wakeup
from kathikon_celery.storage.engine.wakeup import OUTCOME as OUTCOME_CALL
from kathikon_celery.storage.errors import Forbidden, TablesInUse, Unavailable, UnknownDatabase, in_words
from kathikon_celery.storage.tables import OUTCOME, jobs, nodes, waits

#: Every node listens to it: a message came, or a job is due soon.
CHANNEL = "kathikon"
#: Prefix of the channels for results, one for each process that waits: its listener's number follows.
RESULTS_CHANNEL = CHANNEL + "_r_"
#: First key of Kathikon's advisory locks; the second is a node's id modulo 2^31, or 0 for the schema.
LOCK_SPACE = 0x6B61
#: Milliseconds after which a connection whose data is not acknowledged is lost (keepalives are for idle connections).
UNANSWERED = 25_000
#: Longest payload of a NOTIFY, in bytes: PostgreSQL takes less than 8,000.
LONGEST_CALL = 7900
#: SQLSTATE: the role lacks a privilege.
FORBIDDEN = "42501"
#: SQLSTATE: no lock within ``lock_timeout``.
LOCKED = "55P03"
#: Arguments of psycopg's connect() that are not libpq's.
_OPTIONS_OF_PSYCOPG = ("autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory")
#: libpq's status of a connection outside of any transaction.
IDLE = 0
#: Seconds between two attempts to listen again after a lost connection.
RECONNECT = 0.5

_channel_of_node = literal(CHANNEL + "_").concat(cast(nodes.c.id, TEXT))


def _woken(queue: Any, count: Any, said: Any = "") -> Any:
    """UPDATE that wakes up to *count* of the nodes for which the condition *queue* holds: a NOTIFY *said* to each."""
    sleepers = select(nodes.c.id).where(queue).limit(count).with_for_update(skip_locked=True).scalar_subquery()
    return (
        update(nodes)
        .where(nodes.c.id.in_(sleepers))
        .values(waiting=None)
        .returning(func.pg_notify(_channel_of_node, said).label("called"))
    )


#: Makes a transaction that would wait for the disk not wait: the node that it has woken begins meanwhile.
_UNFLUSHED = case(
    (func.current_setting("synchronous_commit") != "off", func.set_config("synchronous_commit", "off", true()))
)
#: Writes a WAL record of no meaning: when it is committed, all earlier commits are on disk.
_FLUSH = select(func.pg_logical_emit_message(true(), CHANNEL, ""))

_WAKE = _woken(nodes.c.waiting.op("&&")(bindparam("queues", type_=ARRAY(TEXT))), bindparam("count", type_=Integer))
_RING = select(func.pg_notify(CHANNEL, ""))


def _outcome(rows: Any) -> ColumnElement[Any]:
    """The JSON that `result_listeners.told` reads."""
    # Without the cause: these jobs have a result. Clients of 0.1 take no other columns.
    values = {column.name: rows.c[column.name] for column in OUTCOME if column.name != "cause"}
    values["ended_at"] = cast(func.extract("epoch", rows.c.ended_at), Double)
    return func.json_build_object(*chain.from_iterable((literal_column(f"'{name}'"), values[name]) for name in values))


def _telling(statement: Any, ended: bool) -> Executable:
    changed = statement.returning(*(OUTCOME if ended else [jobs.c.id])).cte("changed")
    # An array is looked up in the index. The planner does not know how many rows of this table are dead.
    of_them = waits.c.job == any_(func.array(select(changed.c.id).scalar_subquery()))
    channel = literal(RESULTS_CHANNEL).concat(cast(waits.c.listener, TEXT))
    number = select(func.count()).select_from(changed)
    if ended:
        said = literal(OUTCOME_CALL).concat(cast(_outcome(changed), TEXT))
        fits = func.octet_length(said) <= LONGEST_CALL
        notify = func.pg_notify(channel, case((fits, said), else_=literal(ENDED).concat(waits.c.job)))
        left = delete(waits).where(of_them, waits.c.job == changed.c.id)
        return number.add_cte(left.returning(notify.label("told")).cte("told"))
    notify = func.pg_notify(channel, literal(NEWS).concat(waits.c.job))
    told = select(notify.label("told")).where(of_them).cte("told")
    return select(number.scalar_subquery(), select(func.count(told.c.told)).scalar_subquery())


_told = lru_cache(maxsize=64)(_telling)


class PostgreSQL(Dialect):
    """One PostgreSQL database."""

    name = "postgresql"
    wakes_by_name = True
    enters_waits = True
    changes_in_ctes = True
    keeps_old_rows = True
    # After a crash that lost a row, its seq is used again: a node may have claimed the row before it was on disk.
    first_fence: ColumnElement[int] = literal_column("floor(random() * 1073741824)::int")

    writable: ClassVar[Mapping[str, Any]] = {"target_session_attrs": "read-write"}

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        try:
            import psycopg
        except ImportError as error:
            raise UnknownDatabase(
                f"{shown(url)} needs the package psycopg, which cannot be imported"
                f" ({error}); say pip install 'kathikon-celery[postgresql]', or set another kathikon_database_url"
            ) from None
        _, options = url.get_dialect()().create_connect_args(url)
        try:
            psycopg.conninfo.make_conninfo(
                **{name: value for name, value in options.items() if name not in _OPTIONS_OF_PSYCOPG}
            )
        except psycopg.ProgrammingError as error:
            raise UnknownDatabase(f"{shown(url)}: {in_words(error)}; allowed are the parameters of libpq") from None

    def connect_args(self, timeout: float, on_disk: bool, publishes: bool) -> dict[str, Any]:
        options = {"synchronous_commit": "on" if on_disk else "off", "timezone": "UTC"}
        if publishes:  # else PostgreSQL plans each of the first five INSERTs, which takes as long as the INSERT
            options["plan_cache_mode"] = "force_generic_plan"
        return {
            "connect_timeout": max(2, round(timeout)),
            "application_name": "kathikon",
            "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
            # The loss of an idle connection is noticed within half a minute.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            # A connection whose data is not acknowledged is lost after `UNANSWERED`; TCP itself takes minutes.
            "tcp_user_timeout": UNANSWERED,
        }

    def _explained(self, error: Exception) -> Exception:
        cause = getattr(error, "orig", None)
        if getattr(cause, "sqlstate", None) == FORBIDDEN:
            return Forbidden(
                f"{shown(self.url)}: {cause.diag.message_primary}; have the owner of the database run what"  # type: ignore[union-attr]
                " 'celery -A proj kathikon schema --sql' prints, and grant its tables and sequences to this role"
            )
        if getattr(cause, "sqlstate", None) == LOCKED:
            return TablesInUse(
                f"{shown(self.url)}: another transaction keeps the tables from being upgraded; see pg_stat_activity"
            )
        return error

    def is_at_rest(self, connection: Any) -> bool:
        return connection.pgconn.transaction_status == IDLE  # type: ignore[no-any-return]

    def insert_or_update(self, table: Table) -> postgresql.Insert:
        return postgresql.insert(table)

    def picked(self, select: Select[Any], table: Table) -> ColumnElement[bool]:
        # An array is looked up in the index, whatever length the planner assumes; a join may become a scan.
        rows = select.with_for_update(skip_locked=True).scalar_subquery()
        return table.c.seq == any_(func.array(rows))

    def picked_in_turn(self, selects: Sequence[Select[Any]], table: Table) -> ColumnElement[bool]:
        # UNION ALL with LIMIT: selects after the last one that is needed read and lock nothing.
        parts = [one.with_for_update(skip_locked=True).subquery() for one in selects]
        every = union_all(*(select(part.c.seq) for part in parts)).subquery()
        rows = select(every.c.seq).limit(bindparam("at_most", type_=Integer())).scalar_subquery()
        return table.c.seq == any_(func.array(rows))

    def held(self, table: Table, owned: bool = True, texts: Sequence[str] = ()) -> ColumnElement[bool]:
        types: dict[str, Any] = {"seq": BigInteger, "fence": Integer, "node_id": BigInteger}
        columns = [bindparam(f"hold_{name}", type_=ARRAY(kind)) for name, kind in types.items()]
        columns += [bindparam(name, type_=ARRAY(TEXT())) for name in texts]
        holds = func.unnest(*columns).table_valued(*types, *texts).render_derived(name="holds")
        return and_(*(table.c[name] == holds.c[name] for name in types if owned or name != "node_id"))

    def brought(self, name: str) -> ColumnElement[str]:
        return literal_column(f"holds.{name}", TEXT)

    def of_holds(self, holds: Mapping[Hold, Mapping[str, str | None]], values: dict[str, Any]) -> Any:
        ordered = sorted(holds)  # all statements lock several rows in one order
        columns = zip(Hold._fields, zip(*ordered, strict=True), strict=True)
        arrays = {f"hold_{name}": list(column) for name, column in columns}
        arrays |= {name: [holds[hold][name] for hold in ordered] for name in holds[ordered[0]]}
        return arrays | values

    def publishing(self, insert: Any, queue: BindParameter[str] | None) -> Executable:
        inserted = insert.returning(insert.table.c.seq).cte("inserted")
        if queue is None:
            return select(func.pg_notify(CHANNEL, "")).select_from(inserted)
        job = literal(PUBLISHED).concat(cast(inserted.c.seq, TEXT)).concat(" ").concat(queue)
        woken = _woken(queue == any_(nodes.c.waiting), 1, select(job).scalar_subquery()).cte("woken")
        return select(func.max(_UNFLUSHED)).select_from(woken).add_cte(inserted)

    def publish(
        self, connection: Connection, statement: Executable, values: Mapping[str, Any], later: bool, again: bool
    ) -> None:
        rows = prepared.rows(connection, statement, values)
        if again or any(unflushed for (unflushed,) in rows):
            prepared.rows(connection, _FLUSH, {})

    def wake(self, connection: Connection, queues: Iterable[str], count: int) -> None:
        prepared.rows(connection, _WAKE, {"queues": list(queues), "count": count})

    def ring(self, connection: Connection) -> None:
        prepared.rows(connection, _RING, {})

    def wakeup(self, connect: Callable[[], Any], node_id: int | None) -> Wakeup:
        return Listener(connect, [CHANNEL] if node_id is None else [CHANNEL, f"{CHANNEL}_{node_id}"])

    def tell(self, connection: Connection, statement: Any, values: Any, ended: bool, fixed: bool) -> int:
        if not fixed:
            return int(connection.execute(_telling(statement, ended), values).scalar_one())
        return int(prepared.rows(connection, _told(statement, ended), values)[0][0])

    def entering(self, ready: Select[Any]) -> Executable:
        found = ready.cte("ready")
        name = func.unnest(bindparam("names", type_=ARRAY(TEXT))).table_valued("name", name="entering").c.name
        listener: Any = bindparam("listener", type_=BigInteger)
        is_there = exists().where(waits.c.job == name, waits.c.listener == listener)
        new = select(name, listener, now()).where(~is_there, name.not_in(select(found.c.id)))
        entered = insert(waits).from_select(["job", "listener", "entered_at"], new).returning(waits.c.seq)
        return select(found).add_cte(entered.cte("entered"))

    def hearing(self, connect: Callable[[], Any], listener: int) -> Wakeup:
        heard = Listener(connect, [f"{RESULTS_CHANNEL}{listener}"])
        heard.listen()
        return heard

    def incarnation(self, connection: Connection) -> object:
        return connection.execute(select(func.pg_postmaster_start_time())).scalar()

    def hold(self, connect: Callable[[], Any], node_id: int) -> Any:
        connection = connect()
        # Never waited for: until the server notices that our last connection is gone, the lease alone counts.
        lock = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", (LOCK_SPACE, node_id % 2**31))
        if lock.fetchone() == (True,):
            return connection
        connection.close()
        return None

    def check_held(self, lock: Any) -> None:
        try:
            # A server that ends a connection says so; the loss of a silent one is found by the keepalives.
            lock.pgconn.consume_input()  # the server's last message, if any
            lock.pgconn.consume_input()  # and the end of the connection
        except Exception as error:
            raise Unavailable(f"the connection that holds the lease is gone: {in_words(error)}") from error

    def has_free_lock(self, node_id: ColumnElement[int]) -> ColumnElement[bool]:
        locks = table("pg_locks", column("locktype"), column("classid"), column("objid"), column("database"))
        here: Select[Any] = select(literal_column("oid")).select_from(table("pg_database"))
        here = here.where(literal_column("datname") == func.current_database())
        # A list of the held locks, no EXISTS: the list is made once, whatever the number of nodes.
        held = select(cast(locks.c.objid, BigInteger)).where(
            locks.c.locktype == "advisory", locks.c.classid == LOCK_SPACE, locks.c.database == here.scalar_subquery()
        )
        return (node_id % 2**31).not_in(held)

    def is_lock_free(self, connection: Connection, node_id: int) -> bool | None:
        return connection.execute(select(self.has_free_lock(literal(node_id, BigInteger)))).scalar()

    @contextmanager
    def migrating(self, connection: Connection) -> Iterator[None]:
        # Every statement of the fleet waits behind an ALTER TABLE that waits for a lock.
        connection.execute(text("SET LOCAL lock_timeout = '2s'"))
        connection.execute(select(func.pg_advisory_xact_lock(LOCK_SPACE, 0)))
        yield


class Listener(Wakeup):
    """Hears NOTIFY on *channels*, and reconnects by itself after a loss."""

    def __init__(self, connect: Callable[[], Any], channels: list[str]) -> None:
        super().__init__()
        self._connect = connect
        self._channels = channels
        self._connection: Any = None
        self._next_attempt = 0.0

    def listen(self) -> bool:
        """Connect and LISTEN; return false while the database is away."""
        self._next_attempt = monotonic() + RECONNECT
        try:
            connection = self._connect()
            for channel in self._channels:
                connection.execute(f'LISTEN "{channel}"')
        except Exception:
            # The database is away. Other calls raise that error; here it is enough to try again.
            return False
        self._connection = connection
        self._selector.register(connection.fileno(), selectors.EVENT_READ)
        return True

    def wait(self, timeout: float) -> bool:
        if self._connection is None:
            if monotonic() >= self._next_attempt and self.listen():
                self.called_all = True
                return True  # calls before the LISTEN were not heard
            timeout = min(timeout, self._next_attempt - monotonic())
        return super().wait(timeout)

    def called(self) -> bool:
        heard = self.called_all = False
        try:
            self._connection.pgconn.consume_input()
            while (call := self._connection.pgconn.notifies()) is not None:
                heard = True
                self.called_all = self.called_all or call.relname == CHANNEL.encode()
                if call.extra:
                    self.named.append(call.extra.decode())
        except Exception:
            self._forget()
            heard = self.called_all = True
        return heard

    def _forget(self) -> None:
        # A closed connection does not know its descriptor: it is the one that is not the receiver.
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._receiver:
                self._selector.unregister(key.fileobj)
        with suppress(Exception):
            self._connection.close()
        self._connection = None

    def close(self) -> None:
        if self._connection is not None:
            self._forget()
        super().close()
