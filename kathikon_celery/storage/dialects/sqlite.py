"""SQLite: one file, WAL, one writer at a time, taken in turn through a lock file beside it."""

from __future__ import annotations

import errno
import json
import logging
import os
import selectors
import sqlite3
import stat
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from time import monotonic, sleep
from typing import Any, ClassVar

import psutil
from sqlalchemy import URL, Connection, ScalarSelect, Table, Text, and_, bindparam, func, literal_column, select, tuple_
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.job import Hold
from kathikon_celery.settings import shown
from kathikon_celery.storage.clock import FAR, now, seconds_until
from kathikon_celery.storage.dialects.parameters import Changed, Upsert
from kathikon_celery.storage.dialects.returning import BROUGHT, ReturningDialect, upserting, which_of
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.wakeup import Wakeup
from kathikon_celery.storage.errors import Refused, Unavailable, UnknownDatabase, in_words
from kathikon_celery.storage.tables import first_fence, fits, jobs

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows: SQLite's own waiting must do)
    fcntl = None  # type: ignore[assignment]

try:
    import inotify_simple
except ImportError:  # pragma: no cover (not Linux: a file is looked at every `LOOK` seconds)
    inotify_simple = None

logger = logging.getLogger(__name__)

#: Seconds for which a write waits for a transaction of another program, or of the app itself.
BUSY = 5.0
#: Seconds for which a write waits for its turn. Its holder may be stopped; SQLite's own lock decides then.
LONGEST_TURN = 1.0
#: How often, and after how many seconds each, a write tries again to take its turn before it waits in line. Most turns
#: take less than a millisecond: waiting in line for them, which needs a thread, costs a fifth of the throughput.
SHORT_TRIES, SHORT_PAUSE = 40, 0.00005
#: Where SQLite locks its ``-shm`` file to write.
WRITE_LOCK = 120
#: Flag of ``open`` that does not follow a symbolic link.
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
#: What SQLite says if trying again may help: errors of the system, or of other processes (such as a new file).
PASSING = (
    "locked", "disk", "unable to open", "readonly", "protocol", "schema has changed", "interrupted", "memory",
    "no such table",
)  # fmt: skip
#: Seconds between two looks at a file if there is no inotify.
LOOK = 0.01

#: Length in bytes of the lock file's head, which changes when all nodes are called, not only those that wait for a job.
MARK = 8
#: Whether we flush the log ourselves, after the commit: meanwhile other processes can write, and a worker can begin.
FLUSHES = hasattr(os, "fdatasync")

#: The parameter ``holds``, a JSON list of claims with their texts, as a table.
_HOLDS = func.json_each(bindparam("holds", type_=Text())).table_valued("value", name="holds")


@compiles(now, "sqlite")
def _(element: now, compiler: Any, **kw: Any) -> str:
    shift = ""
    if len(element.clauses):
        shift = f", printf('%+.3f seconds', {compiler.process(element.clauses, **kw)})"
    # Milliseconds, padded to the microseconds in which times are stored, so that text compares as time.
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now'{shift})"


@compiles(fits, "sqlite")
def _(element: fits, compiler: Any, **kw: Any) -> str:
    text, pattern = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"{text} GLOB replace({pattern}, '[', '[[]')"


@compiles(seconds_until, "sqlite")
def _(element: seconds_until, compiler: Any, **kw: Any) -> str:
    moment = compiler.process(element.clauses, **kw)
    # julianday() is NULL for a text that is no moment, and for Python's last one, which SQLite rounds up beyond its
    # range. If such a text sorts before now, it counts as past: its job is promoted, since others wait behind it.
    # Any other such text counts as far ahead.
    past = f"{moment} <= strftime('%Y-%m-%d %H:%M:%f000', 'now')"
    other = f"CASE WHEN {past} THEN -1.0 WHEN {moment} IS NOT NULL THEN {FAR} END"
    return f"coalesce((julianday({moment}) - julianday('now')) * 86400.0, {other})"


@compiles(first_fence, "sqlite")
def _(element: first_fence, compiler: Any, **options: Any) -> str:
    # SQLite uses the highest seq again when its row is deleted: AUTOINCREMENT writes one page more for each job.
    return "abs(random() % 1073741824)"


_NUMBER_NODES = (
    "INSERT INTO sqlite_sequence (name, seq) SELECT 'kathikon_nodes', 1 + abs(random()) % 1000000000"
    " WHERE NOT EXISTS (SELECT * FROM sqlite_sequence WHERE name = 'kathikon_nodes')"
)


class SQLite(ReturningDialect):
    """One SQLite file."""

    name = "sqlite"
    closes_before_fork = True
    has_one_writer = True
    after_migrations: ClassVar = {"0004": [_NUMBER_NODES]}

    def __init__(self, url: URL, schema: str | None = None, wake: str = "auto") -> None:
        super().__init__(url, schema, wake)
        if schema is not None:
            raise UnknownDatabase(
                f"kathikon_schema = {schema!r} is for PostgreSQL, and {shown(url)} is a file of SQLite, which has no"
                " schemas: give each application a file of its own"
            )
        if not url.database or url.database == ":memory:" or url.query.get("mode") == "memory":
            raise ValueError(
                f"{url}: a database in memory is seen by one connection only;"
                " for tables that live as long as the process set kathikon_copies = 'ram'"
            )
        self.path = Path(url.database).resolve()  # as SQLite does, to find the log
        #: Writers lock this file in turn. A write to it wakes all sleepers: there is a job or, if its first `MARK`
        #: bytes have changed, a message or a job that is due soon.
        self.lock_path = self.path.with_name(self.path.name + "-lock")
        #: SQLite's log (WAL). SQLite has no locks on it, so that we may open and close it.
        self.wal_path = self.path.with_name(self.path.name + "-wal")
        #: Device and inode of the open database file.
        self._file: tuple[int, int] | None = None
        self._turn = _Turn(self)
        self._has_turn = self._is_turn_stuck = self._is_locked = False
        self._lock = threading.RLock()
        self._depth = 0
        self._descriptor: int | None = None
        self._rings = self._rings_all = False
        #: A write to this file wakes all processes that wait for results.
        self.results_path = self.path.with_name(self.path.name + "-results")
        self._results: int | None = None
        self._tells = False

    def connect_args(self, url: URL, timeout: float) -> dict[str, Any]:
        return {"timeout": BUSY, "check_same_thread": False}

    def on_connect(self, connection: Any, on_disk: bool, publishes: bool) -> None:
        connection.isolation_level = None
        # Text that is not UTF-8 makes its own row corrupt, and does not fail the whole statement.
        connection.text_factory = lambda data: str(data, "utf-8", "surrogateescape")
        cursor = connection.cursor()
        if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            with self.writing():  # if several processes change it at once, all but one fail
                (mode,) = cursor.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                raise Unavailable(
                    f"the SQLite file {str(self.path)!r} cannot have a log (its journal_mode stays {mode!r}); keep it"
                    " on a local disk"
                )
        cursor.execute(f"PRAGMA synchronous={'FULL' if on_disk and not FLUSHES else 'NORMAL'}")
        cursor.execute("PRAGMA cache_size=-16000")
        cursor.execute("PRAGMA journal_size_limit=67108864")
        cursor.close()
        self._file = self._stat()

    def is_replaced(self) -> bool:
        try:
            return self._file is not None and self._stat() != self._file
        except OSError as error:
            return isinstance(error, FileNotFoundError)

    def _stat(self) -> tuple[int, int]:
        found = os.stat(self.path)
        return found.st_dev, found.st_ino

    def identity(self, connection: Connection) -> object:
        files = {name: path for _, name, path in connection.exec_driver_sql("PRAGMA database_list")}
        try:
            found = os.stat(files["main"])
        except OSError:  # a database in memory, or a deleted file
            return None
        return found.st_dev, found.st_ino

    def guest(self) -> SQLite:
        return _Guest(self)

    def call(self) -> None:
        with self.writing():
            self._rings = self._rings_all = True

    def is_at_rest(self, connection: Any) -> bool:
        return not connection.in_transaction

    def check_usable(self) -> None:
        folder = self.path.parent
        if not folder.is_dir():
            raise Unavailable(f"the folder {str(folder)!r} of the SQLite file does not exist; create it")
        if os.access(self.path, os.W_OK):
            return
        # Checked again: another process may have created the file meanwhile. SQLite would open a read-only file, but
        # that connection could never write.
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise self._read_only()
        if not os.access(folder, os.W_OK):
            raise Unavailable(f"the folder {str(folder)!r} of the SQLite file is read-only; it must be writable")
        # SQLite gives its other files the mode of this one.
        with suppress(FileExistsError):
            os.close(_create(self.path, _mode_in(folder)))

    def _read_only(self) -> Unavailable:
        return Unavailable(f"the SQLite file {str(self.path)!r} is read-only; give its owner the right to write")

    def writing(self) -> AbstractContextManager[None]:
        return self._turn

    def begin(self, connection: Connection) -> None:
        prepared.plain(connection, "BEGIN IMMEDIATE")

    def roll_back(self, connection: Connection) -> None:
        self._rings = self._rings_all = self._tells = False  # set by this transaction, whose thread has the turn
        super().roll_back(connection)

    def _take_turn(self) -> None:
        if not self._lock.acquire(timeout=BUSY):
            raise self._locked()
        self._depth += 1
        if self._depth == 1:
            try:
                if self._is_locked:
                    self._check_unlocked()
                if fcntl is not None:
                    self._has_turn = self._wait_for_turn(self._lock_file())
            except BaseException:
                self._end_turn()
                raise

    def _wait_for_turn(self, descriptor: int) -> bool:
        """Lock the lock file; return false if its holder seems to be stopped, also for the writes that follow."""
        if _locks(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, self.lock_path):
            self._is_turn_stuck = False
            return True
        if not self._is_turn_stuck:
            for _ in range(SHORT_TRIES):
                sleep(SHORT_PAUSE)
                if _locks(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, self.lock_path):
                    return True
            self._is_turn_stuck = not _Locking(descriptor, self.lock_path).wait(LONGEST_TURN)
        return not self._is_turn_stuck

    def _check_unlocked(self) -> None:
        """Raise at once if the file is still locked, for as long as it is: the next writes need not wait as well."""
        with closing(sqlite3.connect(self.path, timeout=0.05, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            except sqlite3.OperationalError as error:
                if "locked" in str(error):
                    raise self._locked() from None
        self._is_locked = False

    def _locked(self) -> Unavailable:
        self._is_locked = True
        holder = self._writer()
        remedy = "write to the file in short transactions"
        if holder in (None, os.getpid()):
            remedy = (
                "send tasks in your own transaction (docs/transactions.md) or after its end, wait for results after its"
                " end, or keep the jobs in a file of their own (kathikon_database_url)"
            )
        return Unavailable(
            f"the SQLite file {str(self.path)!r} is locked for more than {BUSY:g} s by an open transaction of"
            f" {_described(holder)}; {remedy}"
        )

    def _writer(self) -> int | None:
        """Return the id of the process that has a transaction which writes; `None` if the system does not tell."""
        with suppress(OSError, ValueError):
            inode = str(os.stat(f"{self.path}-shm").st_ino)
            for line in Path("/proc/locks").read_text().splitlines():
                _, kind, _, access, pid, file, first, last, *_ = [*line.split(), *[""] * 8]
                if (kind, access, file.rpartition(":")[2]) != ("POSIX", "WRITE", inode) or int(pid) <= 0:
                    continue
                if int(first) <= WRITE_LOCK and (last == "EOF" or int(last) >= WRITE_LOCK):
                    return int(pid)
        return None

    def is_locked_by_us(self) -> bool:
        return self._writer() == os.getpid()

    def _end_turn(self) -> None:
        try:
            self._depth -= 1
            if self._depth == 0:
                if self._has_turn and self._descriptor is not None:
                    self._has_turn = False
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                if self._rings and self._descriptor is not None:
                    call = (os.urandom(MARK), 0) if self._rings_all else (b"\0", MARK)
                    self._rings = self._rings_all = False
                    with suppress(OSError):  # the commit is done, and the sleepers also poll
                        os.pwrite(self._descriptor, *call)
                if self._tells:
                    self._tells = False
                    with suppress(OSError, Unavailable):
                        os.pwrite(self._results_file(), b"\0", 0)
        finally:
            self._lock.release()

    def flush(self, kept: dict[Any, Any]) -> None:
        if not FLUSHES:
            return
        try:
            log = kept.get(_Log)
            if log is None:
                log = kept[_Log] = _Log(self.wal_path)
            os.fdatasync(log.descriptor)
        except FileNotFoundError:  # a checkpoint has written the log to the database, and to disk
            return
        except OSError as error:
            raise Unavailable(f"the disk of the SQLite file {str(self.path)!r} is broken: {error.strerror}") from error

    def _lock_file(self) -> int:
        if self._descriptor is None:
            self._descriptor = self._open(self.lock_path)
        return self._descriptor

    def _results_file(self) -> int:
        if self._results is None:
            self._results = self._open(self.results_path)
        return self._results

    def _open(self, path: Path) -> int:
        """Open a file beside the database; create it with the database's mode."""
        self.check_usable()
        try:
            try:
                return _create(path, stat.S_IMODE(os.stat(self.path).st_mode) & 0o666)
            except FileExistsError:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | NO_LINK)
        except OSError as error:
            remedy = "the folder of the SQLite file must be writable, and this file too"
            if error.errno == errno.ELOOP:
                remedy = "it is a symbolic link, which is not followed; delete it"
            raise Unavailable(f"the file {str(path)!r} cannot be opened: {error.strerror}; {remedy}") from error
        return descriptor

    def _explained(self, error: Exception) -> Exception:
        if not isinstance(error, DBAPIError | sqlite3.Error):
            return error
        said = in_words(error)
        if "locked" in said:
            return self._locked()
        if "readonly database" in said:
            return self._read_only()
        if "disk is full" in said or "disk I/O error" in said:
            return Unavailable(f"the disk of the SQLite file {str(self.path)!r} is full or broken: {said}")
        if "file is not a database" in said or "malformed" in said:
            return Unavailable(f"{str(self.path)!r} is no SQLite database, or a damaged one: {said}")
        if "unable to open" in said:
            try:
                self.check_usable()
            except Unavailable as unusable:
                return unusable
            return Unavailable(f"the SQLite file {str(self.path)!r} cannot be opened: {said}")
        if isinstance(error, OperationalError) and not any(words in said for words in PASSING):
            return Refused(f"SQLite refuses a statement: {said}")
        return error

    def _insert(self, table: Table) -> sqlite.Insert:
        return sqlite.insert(table)

    def _is_among(self, table: Table, rows: ScalarSelect[int]) -> ColumnElement[bool]:
        return table.c.seq.in_(rows)

    def _held(self, table: Table, owned: bool, brought: Sequence[str]) -> ColumnElement[bool]:
        # One statement for all: after each statement, this thread may have to wait for another Python thread.
        of_row = [table.c.seq, table.c.fence, *([table.c.node_id + 0] if owned else ())]
        of_hold = [self._brought(name) for name in Hold._fields[: len(of_row)]]
        if brought:
            return and_(*(mine == theirs for mine, theirs in zip(of_row, of_hold, strict=True)))
        return tuple_(*of_row).in_(select(*of_hold))

    def _brought(self, name: str) -> ColumnElement[Any]:
        return func.json_extract(_HOLDS.c.value, literal_column(f"'$.{name}'"))

    def _of_holds(self, holds: Mapping[Hold, Mapping[str, str | None]], values: Mapping[str, Any]) -> dict[str, Any]:
        listed = [
            {**dict(zip(Hold._fields, hold, strict=True)), **{BROUGHT + name: text for name, text in texts.items()}}
            for hold, texts in holds.items()
        ]
        return {"holds": json.dumps(listed), **values}

    def wait_for(self, connection: Connection, node_id: int, queues: list[str] | None) -> None:
        return

    def wake(self, connection: Connection, queues: Iterable[str], count: int) -> None:
        self._rings = True

    def ring(self, connection: Connection) -> None:
        self._rings = self._rings_all = True

    def publish(
        self, connection: Connection, upsert: Upsert, values: Mapping[str, Any], later: bool, again: bool
    ) -> None:
        prepared.count(connection, upserting(self, upsert), values)
        self._rings = True
        self._rings_all = self._rings_all or later

    def wakeup(self, connect: Callable[[], Any], node_id: int | None) -> Wakeup:
        self._lock_file()
        return NodeBell(self.lock_path)

    def _told(
        self,
        connection: Connection,
        statement: Any,
        values: Mapping[str, Any],
        ended: bool,
        which: list[Changed] | None,
    ) -> int:
        if which is None:
            changed = prepared.count(connection, statement, values)
        else:
            found = [Changed(*row) for row in prepared.rows(connection, _saying_which(statement), values)]
            which += found
            changed = len(found)
        self._tells = self._tells or changed > 0
        return changed

    def hearing(self, connect: Callable[[], Any], listener: int) -> Wakeup:
        with self._lock:
            self._results_file()
        return Bell(self.results_path)

    def vitals(self, connection: Connection) -> Mapping[str, float]:
        pages, size = (
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size")
        )
        return {"table_bytes": float(pages * size)}

    def migrating(self, connection: Connection) -> AbstractContextManager[None]:
        return self.writing()

    def close(self) -> None:
        with self._lock:
            self._file = None
            if self._descriptor is not None and not self._depth:
                os.close(self._descriptor)
                self._descriptor = None
                if self._results is not None:
                    os.close(self._results)
                    self._results = None


class _Guest(SQLite):
    """SQLite in a transaction of the caller's, whose commit nobody hears: see `Dialect.call`."""

    def __init__(self, host: SQLite) -> None:
        self.url, self.path = host.url, host.path
        self._rings = self._rings_all = self._tells = False

    def join(self, connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            super().join(connection)
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # a savepoint alone would be a transaction of its own

    def writing(self) -> AbstractContextManager[None]:
        return nullcontext()


@lru_cache(maxsize=64)
def _saying_which(statement: Any) -> Any:
    return statement.returning(*which_of(jobs))


class _Log:
    """SQLite's log (WAL), opened once for each connection: while the log is open, no other file can take its place.

    No ``stat`` of the log: after one, a system with fine timestamps writes a new timestamp with each change.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with suppress(AttributeError):  # the log was not opened
            os.close(self.descriptor)


def _locks(descriptor: int, how: int, path: Path) -> bool:
    """Lock the file; return false if another process has locked it, and *how* says not to wait."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise Unavailable(
            f"the file {str(path)!r} cannot be locked: {error.strerror}; keep the SQLite file on a local disk"
        ) from error
    return True


class _Locking:
    """Locks a file in a thread of its own: ``flock`` has no timeout, and many who only try starve each other."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = os.dup(descriptor), path  # the original may be closed meanwhile
        self._mutex, self._is_awaited = allocate_lock(), True
        self._done = allocate_lock()
        self._done.acquire()
        start_new_thread(self._run, ())

    def _run(self) -> None:
        try:
            with suppress(Unavailable):
                _locks(self._descriptor, fcntl.LOCK_EX, self._path)
            with self._mutex:
                if not self._is_awaited:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        finally:
            os.close(self._descriptor)
            self._done.release()

    def wait(self, seconds: float) -> bool:
        """Wait for the lock; return false, and give it up, after so many *seconds*."""
        if self._done.acquire(timeout=seconds):
            return True
        with self._mutex:
            self._is_awaited = False
        return self._done.acquire(blocking=False)


def _create(path: Path, mode: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | NO_LINK, mode)
    with suppress(OSError, AttributeError):  # the process's umask takes rights away
        os.fchmod(descriptor, mode)
    return descriptor


def _mode_in(folder: Path) -> int:
    """Return the mode of a new file: for its owner alone, or for the group as well in a folder that a group shares."""
    mode = os.stat(folder).st_mode
    return 0o660 if mode & stat.S_ISGID and mode & stat.S_IWGRP else 0o600


def _described(pid: int | None) -> str:
    if pid is None:
        return "this process or another program"
    if pid == os.getpid():
        return "this process itself"
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        is_stopped = process.status() == psutil.STATUS_STOPPED
        return f"process {pid} ({process.name()}){', which is stopped' if is_stopped else ''}"
    return f"process {pid}"


class _Turn:
    """One writer's turn: a lock keeps out other threads of this process, and the lock file other processes."""

    __slots__ = ("_dialect",)

    def __init__(self, dialect: SQLite) -> None:
        self._dialect = dialect

    def __enter__(self) -> None:
        self._dialect._take_turn()

    def __exit__(self, *exc_info: object) -> None:
        self._dialect._end_turn()


def _inotify_on(path: Path) -> Any:
    """Return an inotify instance that watches *path*; `None` if the system has no inotify, or no more of it to give."""
    if inotify_simple is None:
        return None
    found = None
    try:
        found = inotify_simple.INotify(nonblocking=True)
        found.add_watch(path, inotify_simple.flags.MODIFY)
    except OSError as error:
        if found is not None:
            found.close()
        logger.warning(
            "Kathikon: there is no inotify for %s, so this process looks at the file every %g ms: %s; see the system's"
            " settings fs.inotify.max_user_instances and fs.inotify.max_user_watches", path, LOOK * 1000, error
        )  # fmt: skip
        return None
    return found


class Bell(Wakeup):
    """Hears writes to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._inotify = _inotify_on(path)
        if self._inotify is not None:
            self._selector.register(self._inotify.fileno(), selectors.EVENT_READ)
        self._last = self._stamp()

    def _stamp(self) -> int:
        return self._path.stat().st_mtime_ns

    def called(self) -> bool:
        return self._inotify is None or bool(self._inotify.read(timeout=0))

    def wait(self, timeout: float) -> bool:
        if self._inotify is not None:
            return super().wait(timeout)
        deadline = monotonic() + timeout
        while True:
            is_woken, _ = self._sleep(min(LOOK, deadline - monotonic()))
            last, self._last = self._last, self._stamp()
            if last != self._last:
                return self.called()
            if is_woken or monotonic() >= deadline:
                return False

    def close(self) -> None:
        super().close()
        if self._inotify is not None:
            self._inotify.close()


class NodeBell(Bell):
    """The bell of a node, which also reads whether a call is for all nodes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path.open("rb", buffering=0)
        self._mark = self._read_mark()

    def _read_mark(self) -> bytes:
        return os.pread(self._file.fileno(), MARK, 0).ljust(MARK, b"\0")  # of a new file: as its first call leaves it

    def called(self) -> bool:
        is_called = super().called()  # before the mark is read: a later write is another call
        last, self._mark = self._mark, self._read_mark()
        self.called_all = last != self._mark
        return is_called

    def close(self) -> None:
        super().close()
        self._file.close()
