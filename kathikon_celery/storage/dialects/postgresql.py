"""PostgreSQL: rows claimed under SKIP LOCKED, nodes woken one by one through LISTEN and NOTIFY."""

from __future__ import annotations

import json
import selectors
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import chain
from math import inf
from time import monotonic
from typing import Any, ClassVar

from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Double,
    Integer,
    ScalarSelect,
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
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, TEXT
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateSchema
from sqlalchemy.sql.expression import ColumnElement, Select

from kathikon_celery.job import Hold
from kathikon_celery.settings import shown
from kathikon_celery.storage.clock import now, seconds_until
from kathikon_celery.storage.dialects import encodings, moments, sessions
from kathikon_celery.storage.dialects.base import ON_DISK
from kathikon_celery.storage.dialects.parameters import Change, Changed, Claim, Upsert
from kathikon_celery.storage.dialects.returning import (
    BROUGHT,
    ReturningDialect,
    changing_held,
    claiming,
    upserting,
    which_of,
)
from kathikon_celery.storage.engine import answers, prepared
from kathikon_celery.storage.engine.wakeup import ENDED, NEWS, PUBLISHED, SINCE, Wakeup
from kathikon_celery.storage.engine.wakeup import OUTCOME as OUTCOME_CALL
from kathikon_celery.storage.errors import Forbidden, TablesInUse, Unavailable, in_words
from kathikon_celery.storage.tables import OUTCOME, first_fence, fits, jobs, nodes, waits

#: Channel of every node: a message was published, or a job is due soon.
CHANNEL = "kathikon"
#: Prefix of the channels for results, one for each process that waits: its listener's number follows.
RESULTS_CHANNEL = CHANNEL + "_r_"
#: First key of Kathikon's advisory locks; the second is a node's id modulo 2^31, or 0 for the schema.
LOCK_SPACE = 0x6B61
#: An old transaction keeps vacuum from the rows that have changed since it began.
_OLDEST_TRANSACTION = """
    SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)
    FROM pg_stat_activity WHERE datname = current_database()
"""
#: The lock of those that take turns: its key is one number, as of no other of our locks.
_TAKE_TURNS = select(func.pg_advisory_xact_lock(LOCK_SPACE))
#: Longest payload of a NOTIFY, in bytes: PostgreSQL takes less than 8,000.
LONGEST_CALL = 7900
#: SQLSTATE: the role lacks a privilege.
FORBIDDEN = "42501"
#: SQLSTATE: no lock within ``lock_timeout``.
LOCKED = "55P03"
#: SQLSTATE: the server cannot be written to any more, the database or our tables are not there any more, or a prepared
#: statement is of tables that have changed. Another connection may do better. (Other losses close the connection.)
_USELESS = {"25006", "0A000", "55000", "57P04", "3D000", "3F000"}
#: SQLSTATE: there is no such table.
NO_TABLE = "42P01"
#: SQLSTATE: the search path names no schema that can be used.
NO_SCHEMA = "3F000"
#: SQLSTATE: the session has no such prepared statement, or has it already.
OTHER_SESSION = ("26000", "42P05")
#: Whether the server reports that sessions cannot write (PostgreSQL 14 and newer).
_READ_ONLY = (b"in_hot_standby", b"default_transaction_read_only")
#: Which backend serves a connection, and the table that says whether the tables are still those that we know.
_IDENTITY = f"SELECT pg_backend_pid(), pg_postmaster_start_time(), to_regclass('{nodes.fullname}')::oid::bigint"
#: What a worker needs for being woken behind a pooler. The format's argument is a URL.
POOLED = (
    "a connection pooler such as pgbouncer answers at {}, so that this worker is not woken, but polls: connect the"
    ' worker to PostgreSQL itself, or say kathikon_wake = "listen" if the pooler is in session mode, or'
    ' kathikon_wake = "poll" if the worker shall poll'
)
#: libpq's status of a connection outside of any transaction.
IDLE = 0
#: Seconds between two attempts to listen again after a lost connection.
RECONNECT = 0.5


# Not clock_timestamp(): a value that changes within a statement is compared with each row, without an index.
@compiles(now, "postgresql")
def _(element: now, compiler: Any, **kw: Any) -> str:
    if not len(element.clauses):
        return "statement_timestamp()"
    return f"(statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)}))"


@compiles(fits, "postgresql")
def _(element: fits, compiler: Any, **kw: Any) -> str:
    text, pattern = (compiler.process(clause, **kw) for clause in element.clauses)
    for special in ("'!'", "chr(37)", "'_'"):  # 37 is the percent sign, which the driver would take for a parameter's
        pattern = f"replace({pattern}, {special}, '!' || {special})"
    return f"{text} LIKE translate({pattern}, '*?', chr(37) || '_') ESCAPE '!'"


@compiles(seconds_until, "postgresql")
def _(element: seconds_until, compiler: Any, **kw: Any) -> str:
    moment = compiler.process(element.clauses, **kw)
    return f"extract(epoch from {moment} - statement_timestamp())::double precision"


@compiles(first_fence, "postgresql")
def _(element: first_fence, compiler: Any, **options: Any) -> str:
    # After a crash that lost a row, its seq is used again: a node may have claimed the row before it was on disk.
    return "floor(random() * 1073741824)::int"


def _woken(channel: str, queue: Any, count: Any, said: Any = "") -> Any:
    """UPDATE that wakes up to *count* of the nodes for which the condition *queue* holds: a NOTIFY *said* to each."""
    channel_of_node = literal(channel + "_").concat(cast(nodes.c.id, TEXT))
    sleepers = select(nodes.c.id).where(queue).limit(count).with_for_update(skip_locked=True).scalar_subquery()
    return (
        update(nodes)
        .where(nodes.c.id.in_(sleepers))
        .values(waiting=None)
        .returning(func.pg_notify(channel_of_node, said).label("called"))
    )


#: Makes the commit not wait for the disk, so that the woken node begins at once; `_FLUSH` waits afterwards.
_UNFLUSHED = case(
    (func.current_setting("synchronous_commit") != "off", func.set_config("synchronous_commit", "off", true()))
)
#: Writes a WAL record of no meaning: when it is committed, all earlier commits are on disk.
_FLUSH = select(func.pg_logical_emit_message(true(), CHANNEL, ""))

#: What tells which database a connection writes to, whatever the URL.
_DATABASE = text("SELECT system_identifier, current_database(), pg_is_in_recovery() FROM pg_control_system()")
_SCHEMA = text(
    "SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
    " WHERE pg_class.oid = to_regclass('kathikon_jobs')"
)


@lru_cache(maxsize=8)
def _waking(channel: str) -> Any:
    is_wanted = nodes.c.waiting.op("&&")(bindparam("queues", type_=ARRAY(TEXT)))
    return _woken(channel, is_wanted, bindparam("count", type_=Integer))


@lru_cache(maxsize=8)
def _ringing(channel: str) -> Any:
    return select(func.pg_notify(channel, ""))


@lru_cache(maxsize=8)
def _ringing_late(channel: str) -> Any:
    """Calls all nodes when the transaction commits, perhaps long after this statement."""
    moment = cast(func.extract("epoch", func.statement_timestamp()), TEXT)
    return select(func.pg_notify(channel, literal(SINCE).concat(moment)))


_WAIT = (
    update(nodes).where(nodes.c.id == bindparam("node")).values(waiting=bindparam("queues", type_=nodes.c.waiting.type))
)


def _with_waiting(claimed: Any, rows: Any) -> Any:
    """Return *rows*, extended to note that the node waits, if fewer are *claimed* than it has room for."""
    number = select(func.count()).select_from(claimed).scalar_subquery()
    return rows.add_cte(_WAIT.where(number < bindparam("room", type_=Integer())).cte("waits"))


@lru_cache(maxsize=64)
def _claiming_and_waiting(dialect: PostgreSQL, claim: Claim) -> Any:
    rows = claiming(dialect, claim).cte("claimed")
    return _with_waiting(rows, select(rows))


@lru_cache(maxsize=64)
def _completing_and_claiming(dialect: PostgreSQL, change: Change, claim: Claim, waits: bool) -> Any:
    completed = changing_held(dialect, change, True, ()).returning(change.table.c.seq).cte("completed")
    found = claiming(dialect, claim).cte("claimed")
    number = select(func.count().label("completed")).select_from(completed).subquery()
    rows = select(found, number.c.completed).select_from(number.outerjoin(found, true()))
    return _with_waiting(found, rows) if waits else rows


def _saying(values: Mapping[str, Any], waiting: tuple[list[str], int] | None) -> Mapping[str, Any]:
    if waiting is None:
        return values
    queues, room = waiting
    return {**values, "node": values["by_node"], "queues": queues, "room": room}


@lru_cache(maxsize=64)
def _publishing(dialect: PostgreSQL, channel: str, upsert: Upsert, later: bool) -> Any:
    """Return the INSERT, extended to wake one idle node that waits for the job's queue; *later*: to call all nodes."""
    inserted = upserting(dialect, upsert).returning(upsert.table.c.seq).cte("inserted")
    if later:
        return select(func.pg_notify(channel, "")).select_from(inserted)
    queue = upsert.values["queue"]
    job = literal(PUBLISHED).concat(cast(inserted.c.seq, TEXT)).concat(" ").concat(queue)
    woken = _woken(channel, queue == any_(nodes.c.waiting), 1, select(job).scalar_subquery()).cte("woken")
    return select(func.max(_UNFLUSHED)).select_from(woken).add_cte(inserted)


@lru_cache(maxsize=16)
def _entering(ready: Select[Any]) -> Any:
    """Return *ready*, which reads the ready jobs of ``keys``, extended to enter waits for the other ``names``."""
    found = ready.cte("ready")
    name = func.unnest(bindparam("names", type_=ARRAY(TEXT))).table_valued("name", name="entering").c.name
    listener: Any = bindparam("listener", type_=BigInteger)
    is_there = exists().where(waits.c.job == name, waits.c.listener == listener)
    new = select(name, listener, now()).where(~is_there, name.not_in(select(found.c.id)))
    entered = insert(waits).from_select(["job", "listener", "entered_at"], new).returning(waits.c.seq)
    return select(found).add_cte(entered.cte("entered"))


def _leaving() -> Any:
    own: Any = waits.c.listener == bindparam("listener", type_=BigInteger())
    mine = select(waits.c.seq).where(waits.c.job.in_(bindparam("keys", expanding=True)), own)
    # Rows that another transaction deletes just now are skipped, without waiting for it.
    first = mine.limit(bindparam("at_most", type_=Integer())).with_for_update(skip_locked=True)
    return delete(waits).where(waits.c.seq == any_(func.array(first.scalar_subquery())))


_LEAVE = _leaving()


def _outcome(rows: Any) -> ColumnElement[Any]:
    """The JSON that `result_listeners.told` reads."""
    # Without the cause: these jobs have a result. Clients of 0.1 take no other columns.
    values = {column.name: rows.c[column.name] for column in OUTCOME if column.name != "cause"}
    values["ended_at"] = cast(func.extract("epoch", rows.c.ended_at), Double)
    return func.json_build_object(*chain.from_iterable((literal_column(f"'{name}'"), values[name]) for name in values))


@lru_cache(maxsize=64)
def _telling(statement: Any, ended: bool, says_which: bool) -> Any:
    """Return *statement*, extended to call the processes that wait for the changed jobs.

    Its rows: the number of the jobs, or their columns of `Changed`.
    """
    columns: list[ColumnElement[Any]] = list(OUTCOME) if ended else [jobs.c.id]
    if says_which:
        columns += [column for column in which_of(jobs) if column is not jobs.c.id]
    changed = statement.returning(*columns).cte("changed")
    # An array is looked up in the index. The planner does not know how many rows of this table are dead.
    of_them = waits.c.job == any_(func.array(select(changed.c.id).scalar_subquery()))
    channel = literal(RESULTS_CHANNEL).concat(cast(waits.c.listener, TEXT))
    number: Any = select(func.count()).select_from(changed)
    if says_which:
        number = select(*(changed.c[name] for name in Changed._fields))
    if ended:
        said = literal(OUTCOME_CALL).concat(cast(_outcome(changed), TEXT))
        fits = func.octet_length(said) <= LONGEST_CALL
        notify = func.pg_notify(channel, case((fits, said), else_=literal(ENDED).concat(waits.c.job)))
        left = delete(waits).where(of_them, waits.c.job == changed.c.id)
        return number.add_cte(left.returning(notify.label("told")).cte("told"))
    notify = func.pg_notify(channel, literal(NEWS).concat(waits.c.job))
    told = select(notify.label("told")).where(of_them).cte("told")
    calls = select(func.count(told.c.told)).scalar_subquery()
    return number.add_columns(calls) if says_which else select(number.scalar_subquery(), calls)


#: The lock of a node has a number of four bytes.
_NUMBER_NODES = (
    "SELECT setval(pg_get_serial_sequence('kathikon_nodes', 'id'),"
    " coalesce(max(id), 0) + 1 + floor(random() * 1000000000)::bigint) FROM kathikon_nodes"
)


class PostgreSQL(ReturningDialect):
    """One PostgreSQL database."""

    name = "postgresql"
    wakes_by_name = True
    enters_waits = True
    keeps_old_rows = True
    completes_and_claims = True
    calls_with_commit = True

    renewal_without_lock = 1.0
    after_migrations: ClassVar = {"0004": [_NUMBER_NODES]}

    def __init__(self, url: URL, schema: str | None = None, wake: str = "auto") -> None:
        super().__init__(url, schema, wake)
        #: What `sessions.given` has said of each server's URL.
        self._known: dict[URL, dict[str, str]] = {}
        self._must_be_writable = sessions.must_be_writable(self._given(url))
        self._wake = wake
        #: Undoes the escapes in a text that no column's type has read.
        self.unescaped: Callable[[str], str] = str
        self._belongs_to(schema)
        self.shares_sessions = None
        if wake != "auto":
            self._share_sessions(wake == "poll")
        #: Number of the table of nodes when we have last seen it; `None`: we have not.
        self._tables: int | None = None
        self._is_replaced = False
        self._life = 0  # how often we have begun anew

    def _share_sessions(self, shares: bool) -> None:
        self.shares_sessions = shares
        self.wakes_by_name = self.enters_waits = not shares

    def _belongs_to(self, schema: str | None) -> None:
        """Note the *schema* of the tables: two schemas of a database share neither calls nor locks."""
        if schema in (None, "public"):
            self.channel, self.lock_space = CHANNEL, LOCK_SPACE
        else:
            digest = blake2b(schema.encode(), digest_size=4)
            self.channel = f"{CHANNEL}_{digest.hexdigest()}"
            self.lock_space = int.from_bytes(digest.digest(), "big") % 2**31

    def connect_args(self, url: URL, timeout: float) -> dict[str, Any]:
        return sessions.connect_args(self._given(url), timeout)

    def _given(self, url: URL) -> dict[str, str]:
        if url not in self._known:
            self._known[url] = sessions.given(url)
        return self._known[url]

    def connect(self, connect: Callable[..., Any], arguments: Mapping[str, Any], silence: float) -> Any:
        life = self._life
        connection = answers.connect(arguments, silence)
        connection.life = life
        return connection

    def on_connect(self, connection: Any, on_disk: bool, publishes: bool) -> None:
        was, connection.autocommit = connection.autocommit, True
        moments.adapt(connection)
        self.unescaped = encodings.adapt(connection)
        settings = sessions.session(self._given(self.url), self.schema, on_disk, publishes)
        is_ours, schema = sessions.tell(connection, settings, trusted=self._wake == "listen")
        self._belongs_to(self.schema or schema)
        if self._wake == "auto" and (not is_ours or self.shares_sessions is None):
            self._share_sessions(not is_ours)
            self.advice = None if is_ours else POOLED.format(shown(self.url))
        if self.shares_sessions:
            connection.prepare_threshold = None  # the next transaction may have another session
            connection.silence *= answers.MOST_PERIODS  # nobody can tell which process works on a statement
        else:
            *connection.identity, tables = connection.execute(_IDENTITY).fetchone()
            if connection.life == self._life:  # else it may have seen the tables that are replaced
                self._see(tables)
        connection.autocommit = was

    def _see(self, tables: int | None) -> None:
        if self._tables is not None and tables != self._tables:
            self._is_replaced = True
        elif tables is not None:
            self._tables = tables

    def see_tables(self, connection: Connection) -> None:
        if not self.shares_sessions:
            self._see(connection.exec_driver_sql(_IDENTITY).one()[-1])

    def is_replaced(self) -> bool:
        return self._is_replaced

    def close(self) -> None:
        self._life += 1
        self._tables, self._is_replaced = None, False

    def is_lost(self, error: BaseException) -> bool:
        state = getattr(error, "sqlstate", None)
        return state in _USELESS or (state == NO_TABLE and CHANNEL in str(error))

    def is_writable(self, connection: Any) -> bool:
        status = connection.pgconn.parameter_status
        return not self._must_be_writable or (status(_READ_ONLY[0]) != b"on" and status(_READ_ONLY[1]) != b"on")

    def _explained(self, error: Exception) -> Exception:
        cause = getattr(error, "orig", None)
        if getattr(cause, "sqlstate", None) == FORBIDDEN:
            refusal: str = cause.diag.message_primary  # type: ignore[union-attr]
            remedy = (
                "have the owner of the database run what 'celery -A proj kathikon schema --sql' prints, and grant"
                " its tables and sequences to this role"
            )
            if " table " in refusal or " sequence " in refusal:  # they are there
                remedy = "grant it to this role"
            rights = "'Rights' in docs/postgresql.md lists what producers, workers and readers need"
            return Forbidden(f"{shown(self.url)}: {refusal}; {remedy} ({rights})")
        if getattr(cause, "sqlstate", None) == NO_SCHEMA:
            return Forbidden(
                f"{shown(self.url)}: {cause.diag.message_primary}; create one of the search path, and grant it"  # type: ignore[union-attr]
                " to this role, or name one in kathikon_schema"
            )
        if getattr(cause, "sqlstate", None) in OTHER_SESSION:
            return Unavailable(
                f"{shown(self.url)}: {cause.diag.message_primary}; a connection pooler in transaction mode answers"  # type: ignore[union-attr]
                ' there: say kathikon_wake = "auto" or "poll"'
            )
        if getattr(cause, "sqlstate", None) == LOCKED:
            return TablesInUse(
                f"{shown(self.url)}: another transaction keeps the tables from being upgraded; see pg_stat_activity"
            )
        return error

    def identity(self, connection: Connection) -> object:
        return tuple(connection.execute(_DATABASE).one())

    def schema_of_tables(self, connection: Connection) -> str | None:
        return connection.execute(_SCHEMA).scalar()

    def guest(self) -> PostgreSQL:
        return _Guest(self)

    def begin(self, connection: Connection) -> None:
        if self.shares_sessions:
            on_disk = connection.get_execution_options()[ON_DISK]
            prepared.plain(connection, *sessions.begin_pooled(on_disk, self.schema))
        else:
            prepared.plain(connection, sessions.BEGIN)

    def begin_planned(self, connection: Connection) -> None:
        if self.shares_sessions:  # then nothing is prepared
            self.begin(connection)
        else:
            prepared.plain(connection, sessions.BEGIN, "SET LOCAL plan_cache_mode = force_generic_plan")

    def is_at_rest(self, connection: Any) -> bool:
        return connection.pgconn.transaction_status == IDLE  # type: ignore[no-any-return]

    def _insert(self, table: Table) -> postgresql.Insert:
        return postgresql.insert(table)

    def _is_among(self, table: Table, rows: ScalarSelect[int]) -> ColumnElement[bool]:
        # An array is looked up in the index, whatever length the planner assumes; a join may become a scan.
        return table.c.seq == any_(func.array(rows))

    def _held(self, table: Table, owned: bool, brought: Sequence[str]) -> ColumnElement[bool]:
        types: dict[str, Any] = {"seq": BigInteger, "fence": Integer, "node_id": BigInteger}
        columns = [bindparam(f"hold_{name}", type_=ARRAY(kind)) for name, kind in types.items()]
        columns += [bindparam(name, type_=ARRAY(TEXT())) for name in brought]
        holds = func.unnest(*columns).table_valued(*types, *brought).render_derived(name="holds")
        return and_(*(table.c[name] == holds.c[name] for name in types if owned or name != "node_id"))

    def _brought(self, name: str) -> ColumnElement[str]:
        return literal_column(f"holds.{name}", TEXT)

    def _of_holds(self, holds: Mapping[Hold, Mapping[str, str | None]], values: Mapping[str, Any]) -> dict[str, Any]:
        ordered = sorted(holds)  # all statements lock several rows in one order
        columns = zip(Hold._fields, zip(*ordered, strict=True), strict=True)
        arrays: dict[str, Any] = {f"hold_{name}": list(column) for name, column in columns}
        arrays |= {BROUGHT + name: [holds[hold][name] for hold in ordered] for name in holds[ordered[0]]}
        return arrays | dict(values)

    def claim(
        self,
        connection: Connection,
        claim: Claim,
        values: Mapping[str, Any],
        waiting: tuple[list[str], int] | None = None,
    ) -> Sequence[Any]:
        if waiting is None:
            return super().claim(connection, claim, values)
        return prepared.rows(connection, _claiming_and_waiting(self, claim), _saying(values, waiting))

    def complete_and_claim(
        self,
        connection: Connection,
        change: Change,
        holds: Sequence[Hold],
        claim: Claim,
        values: Mapping[str, Any],
        waiting: tuple[list[str], int] | None = None,
    ) -> tuple[int, Sequence[Any]]:
        if not holds:
            return 0, self.claim(connection, claim, values, waiting)
        parameters = self._of_holds({hold: {} for hold in holds}, _saying(values, waiting))
        statement = _completing_and_claiming(self, change, claim, waiting is not None)
        rows = prepared.rows(connection, statement, parameters)
        return rows[0][-1], [row for row in rows if row[0] is not None]

    def preparations(self, change: Change, claims: Sequence[Claim]) -> Iterator[Callable[[Connection], None]]:
        yield partial(prepared.ready, statement=changing_held(self, change, True, ()))
        for claim in claims:
            yield partial(prepared.ready, statement=claiming(self, claim))
            yield partial(prepared.ready, statement=_completing_and_claiming(self, change, claim, False))
            yield partial(prepared.ready, statement=_claiming_and_waiting(self, claim))
            yield partial(prepared.ready, statement=_completing_and_claiming(self, change, claim, True))

    def publish(
        self, connection: Connection, upsert: Upsert, values: Mapping[str, Any], later: bool, again: bool
    ) -> None:
        rows = prepared.rows(connection, _publishing(self, self.channel, upsert, later), values)
        if self.shares_sessions:  # the caller's transaction is not over yet: its commit waits for the disk
            prepared.plain(connection, sessions.commit_on_disk(connection.get_execution_options()[ON_DISK]))
        elif again or any(unflushed for (unflushed,) in rows):
            prepared.rows(connection, _FLUSH, {})

    def wait_for(self, connection: Connection, node_id: int, queues: list[str] | None) -> None:
        prepared.count(connection, _WAIT, {"node": node_id, "queues": queues})

    def wake(self, connection: Connection, queues: Iterable[str], count: int) -> None:
        prepared.rows(connection, _waking(self.channel), {"queues": list(queues), "count": count})

    def ring(self, connection: Connection) -> None:
        prepared.rows(connection, _ringing(self.channel), {})

    def wakeup(self, connect: Callable[[], Any], node_id: int | None) -> Wakeup:
        of_node = [] if node_id is None else [f"_{node_id}"]
        return Listener(self, connect, lambda: [self.channel + suffix for suffix in ("", *of_node)])

    def _told(
        self,
        connection: Connection,
        statement: Any,
        values: Mapping[str, Any],
        ended: bool,
        which: list[Changed] | None,
    ) -> int:
        rows = prepared.rows(connection, _telling(statement, ended, which is not None), values)
        if which is None:
            return int(rows[0][0])
        which += [Changed(*row[: len(Changed._fields)]) for row in rows]
        return len(rows)

    def enter_waits(
        self, connection: Connection, ready: Select[Any], keys: Sequence[str], listener: int
    ) -> Sequence[Any]:
        values = {"names": keys, "listener": listener}
        if len(keys) == 1:
            return prepared.rows(connection, _entering(ready), {**values, "keys": keys[0]})
        return connection.execute(_entering(ready), {**values, "keys": keys}).all()  # compiled for each list

    def leave_waits(self, connection: Connection, keys: Sequence[str], listener: int) -> None:
        connection.execute(_LEAVE, {"keys": keys, "listener": listener, "at_most": 2 * len(keys)})

    def hearing(self, connect: Callable[[], Any], listener: int) -> Wakeup:
        heard = Listener(self, connect, lambda: [f"{RESULTS_CHANNEL}{listener}"])
        heard.listen()
        return heard

    def incarnation(self, connection: Connection) -> object:
        return connection.execute(select(func.pg_postmaster_start_time())).scalar()

    def hold(self, connect: Callable[[], Any], node_id: int) -> Any:
        if self.shares_sessions:
            return None
        losses, connection = self.losses, connect()
        try:
            # Do not wait: until the server notices that our last connection is gone, the lease alone counts.
            lock = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", (self.lock_space, node_id % 2**31))
            if lock.fetchone() == (True,):
                connection.losses = losses
                return connection
        except Exception as error:
            connection.close()
            raise Unavailable(f"the connection that holds the lease is gone: {in_words(error)}") from error
        connection.close()
        return None

    def check_held(self, lock: Any) -> None:
        try:
            if lock.losses != self.losses:
                losses = self.losses
                lock.execute("SELECT 1")
                lock.losses = losses
            # A server that ends a connection says so.
            lock.pgconn.consume_input()  # the server's last message, if any
            lock.pgconn.consume_input()  # and the end of the connection
        except Exception as error:
            raise Unavailable(f"the connection that holds the lease is gone: {in_words(error)}") from error
        if not self.is_writable(lock):
            raise Unavailable("the connection that holds the lease is to a server that cannot be written to now")

    def has_free_lock(self, node_id: ColumnElement[int]) -> ColumnElement[bool]:
        locks = table("pg_locks", column("locktype"), column("classid"), column("objid"), column("database"))
        here: Select[Any] = select(literal_column("oid")).select_from(table("pg_database"))
        here = here.where(literal_column("datname") == func.current_database())
        # A list of the held locks, no EXISTS: the list is made once, whatever the number of nodes.
        held = select(cast(locks.c.objid, BigInteger)).where(
            locks.c.locktype == "advisory",
            locks.c.classid == self.lock_space,
            locks.c.database == here.scalar_subquery(),
        )
        return (node_id % 2**31).not_in(held)

    def is_lock_free(self, connection: Connection, node_id: int) -> bool | None:
        return connection.execute(select(self.has_free_lock(literal(node_id, BigInteger)))).scalar()

    def vitals(self, connection: Connection) -> Mapping[str, float]:
        oldest = connection.execute(text(_OLDEST_TRANSACTION)).scalar_one()
        size = connection.execute(select(func.pg_total_relation_size(func.to_regclass(str(jobs))))).scalar_one()
        return {"table_bytes": float(size), "oldest_transaction_seconds": float(oldest)}

    def take_turns(self, connection: Connection) -> None:
        connection.execute(_TAKE_TURNS)

    @contextmanager
    def migrating(self, connection: Connection) -> Iterator[None]:
        driver: Any = connection.connection.driver_connection
        driver.longest = inf  # the tables may be large
        try:
            connection.execute(text("SET LOCAL lock_timeout = '20s'"))  # another process may create the tables just now
            connection.execute(select(func.pg_advisory_xact_lock(LOCK_SPACE, 0)))
            # Every statement of the fleet waits behind an ALTER TABLE that waits for a lock.
            connection.execute(text("SET LOCAL lock_timeout = '2s'"))
            if self.schema is not None:
                known = text("SELECT 1 FROM pg_namespace WHERE nspname = :schema")
                if connection.execute(known, {"schema": self.schema}).first() is None:
                    connection.execute(CreateSchema(self.schema))
            yield
            self._belongs_to(connection.execute(text(f"SELECT {sessions.SCHEMA}")).scalar())
        finally:
            driver.longest = None

    def before_migrations(self) -> Sequence[str]:
        if self.schema is None:
            return ()
        name = sessions.quoted(self.schema)
        return (f"CREATE SCHEMA IF NOT EXISTS {name}", f"SET search_path = {name}")


class _Guest(PostgreSQL):
    """PostgreSQL in a transaction of the caller's: its NOTIFY comes with the commit, and no row of a node is locked."""

    def __init__(self, host: PostgreSQL) -> None:
        vars(self).update(vars(host))

    def join(self, connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        status = getattr(getattr(driver, "pgconn", None), "transaction_status", IDLE)
        if status == IDLE:
            super().join(connection)

    def publish(
        self, connection: Connection, upsert: Upsert, values: Mapping[str, Any], later: bool, again: bool
    ) -> None:
        self.upsert(connection, upsert, values)
        self.ring(connection)

    def wake(self, connection: Connection, queues: Iterable[str], count: int) -> None:
        self.ring(connection)

    def ring(self, connection: Connection) -> None:
        connection.execute(_ringing_late(self.channel))


class Listener(Wakeup):
    """Hears NOTIFY on *channels*, and reconnects by itself after a loss, also of another connection.

    It hears nothing if sessions are shared.
    """

    def __init__(self, dialect: PostgreSQL, connect: Callable[[], Any], channels: Callable[[], list[str]]) -> None:
        super().__init__()
        self._dialect = dialect
        self._losses = 0
        self._connect = connect
        self._channels = channels
        self._connection: Any = None
        self._next_attempt = 0.0

    def listen(self) -> bool:
        """Connect and LISTEN; return false while the database is away."""
        self._next_attempt = monotonic() + RECONNECT
        self._losses = self._dialect.losses
        try:
            connection = None if self._dialect.shares_sessions else self._connect()
            if self._dialect.shares_sessions:  # the first connection may have shown that
                self._next_attempt = inf
                if connection is not None:
                    connection.close()
                return False
            assert connection is not None
            for channel in self._channels():
                connection.execute(f'LISTEN "{channel}"')
        except Exception:
            # The database is away. Other calls raise that error; here it is enough to try again.
            return False
        self._connection = connection
        self._selector.register(connection.fileno(), selectors.EVENT_READ)
        return True

    def wait(self, timeout: float) -> bool:
        if self._losses != self._dialect.losses and self._connection is not None:
            self._forget()  # it may be silent for ever
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
                self.called_all = self.called_all or call.relname == self._dialect.channel.encode()
                if call.extra:
                    self.named.append(self._read(call.extra.decode()))
        except Exception:
            self._forget()
            heard = self.called_all = True
        return heard

    def _read(self, call: str) -> str:
        unescaped = self._dialect.unescaped
        if unescaped is str or call[0] != OUTCOME_CALL:
            return unescaped(call)
        values = {name: unescaped(one) if isinstance(one, str) else one for name, one in json.loads(call[1:]).items()}
        return OUTCOME_CALL + json.dumps(values)

    def _forget(self) -> None:
        # A closed connection does not know its descriptor: take all descriptors but the receiver's.
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
