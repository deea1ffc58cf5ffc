"""SQLite as its users have it: many queues, the app's own file, stopped processes, several users, file systems."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from celery import chord, group
from kombu.exceptions import OperationalError
from sqlalchemy import text

from kathikon_celery import bulk
from kathikon_celery.job import Job
from kathikon_celery.results import backend
from kathikon_celery.storage import Storage, Unavailable
from kathikon_celery.storage.dialects import sqlite
from kathikon_celery.storage.errors import Refused, is_lost
from tests.integration.conftest import client_of
from tests.support import apps
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

QUEUES = 1500
#: Takes the lock file's lock, or begins a transaction that writes, and says so.
HOLDER = """
import fcntl, signal, sqlite3, sys
path, what = sys.argv[1:]
if what == "turn":
    file = open(path + "-lock", "r+b")
    fcntl.flock(file, fcntl.LOCK_EX)
else:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kathikon.db"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for locks end soon."""
    monkeypatch.setattr(sqlite, "BUSY", 0.5)
    monkeypatch.setattr(backend, "CHECK_WRITERS", 0.2)


def test_many_queues(database_url: str, start_worker: Callable[..., WorkerProcess]) -> None:
    """As many as a database would not take in one statement that names each."""
    names = [f"q{number}" for number in range(QUEUES)]
    worker = start_worker(pool="threads", args=["-Q", ",".join(names), "--without-mingle"])
    with client_of(database_url):
        for name in (names[0], names[-1]):
            assert apps.add.apply_async((1, 2), queue=name).get(timeout=60) == 3
        sent = [apps.add.apply_async((number, 1), queue=name) for number, name in enumerate(names[:: QUEUES // 10])]
        assert [one.get(timeout=60) for one in sent] == [number + 1 for number in range(len(sent))]
    assert "the database" not in worker.log


def test_what_is_no_outage_is_not_told_as_one(path: Path) -> None:
    with closing(Storage(f"sqlite:///{path}")) as storage, storage.database.read() as connection:
        for statement in ("SELECT " + "+".join("1" * 2000), "SELECT"):
            with pytest.raises(Refused, match="SQLite refuses a statement") as caught, storage.database.read():
                connection.execute(text(statement))
            assert not is_lost(caught.value)


# --- the app's own file


@pytest.fixture
def own(path: Path, impatient: None) -> Iterator[sqlite3.Connection]:
    """The app's own connection to the file that the jobs are in, outside of any transaction."""
    with client_of(f"sqlite:///{path}"):
        apps.add.delay(1, 1)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("CREATE TABLE own (value)")
            yield connection


def send_by_bulk() -> None:
    with bulk():
        apps.add.delay(1, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: apps.add.delay(1, 2),
        lambda: apps.add.apply_async((1, 2), countdown=1),
        lambda: group(apps.add.s(1, 2), apps.add.s(3, 4)).delay(),
        lambda: chord([apps.add.s(1, 2)], apps.total.s()).delay(),
        send_by_bulk,
    ],
    ids=["delay", "countdown", "group", "chord", "bulk"],
)
def test_a_task_sent_within_the_apps_own_transaction(own: sqlite3.Connection, call: Callable[[], Any]) -> None:
    own.execute("BEGIN")
    own.execute("INSERT INTO own VALUES (1)")
    with pytest.raises(
        (OperationalError, Unavailable), match="this process itself; send tasks in your own transaction"
    ):
        call()
    own.execute("COMMIT")
    call()


def test_a_result_awaited_within_the_apps_own_transaction(own: sqlite3.Connection) -> None:
    result = apps.add.delay(1, 2)
    own.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="this process itself; send tasks in your own transaction"):
        result.get(timeout=60)
    own.execute("ROLLBACK")


# --- processes that are stopped


@pytest.mark.parametrize("what", ["turn", "transaction"])
def test_a_process_that_is_stopped_while_it_writes(path: Path, what: str, impatient: None) -> None:
    with closing(Storage(f"sqlite:///{path}")) as storage:
        storage.setup()
        storage.insert(Job(id="first", task="none"))
        with subprocess.Popen([sys.executable, "-c", HOLDER, path, what], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            holder.send_signal(signal.SIGSTOP)
            stopped = Path(f"/proc/{holder.pid}/stat")
            wait_until(lambda: b") T" in stopped.read_bytes())
            try:
                if what == "turn":  # nothing is lost if others write out of turn
                    storage.insert(Job(id="second", task="none"))
                    storage.insert(Job(id="third", task="none"))
                else:
                    for _ in range(2):
                        with pytest.raises(Unavailable, match=rf"of process {holder.pid} \(.*\), which is stopped;"):
                            storage.insert(Job(id="second", task="none"))
            finally:
                holder.kill()
        storage.insert(Job(id="last", task="none"))
        assert {job.id for job in storage.all()} >= {"first", "last"}
        assert (storage.fetch("third") is not None) is (what == "turn")


# --- files


def modes(path: Path) -> set[int]:
    files = [*path.parent.glob(path.name + "*")]
    assert len(files) == 4
    return {stat.S_IMODE(file.stat().st_mode) for file in files}


@pytest.mark.parametrize(("of_folder", "of_files"), [(0o755, 0o600), (0o2770, 0o660)], ids=["own", "shared"])
def test_who_may_read_the_files(tmp_path: Path, of_folder: int, of_files: int) -> None:
    folder = tmp_path / "database"
    folder.mkdir()
    folder.chmod(of_folder)
    with closing(Storage(f"sqlite:///{folder}/kathikon.db")) as storage:
        storage.setup()
        storage.insert(Job(id="job", task="none"))
        assert modes(folder / "kathikon.db") == {of_files}


def test_the_other_files_are_as_the_database(path: Path) -> None:
    path.touch()
    path.chmod(0o664)
    with closing(Storage(f"sqlite:///{path}")) as storage:
        storage.setup()
        storage.insert(Job(id="job", task="none"))
        assert modes(path) == {0o664}


def test_a_lock_file_that_is_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    lock = Path(f"{path}-lock")
    lock.symlink_to(precious)
    with closing(Storage(f"sqlite:///{path}")) as storage:
        with pytest.raises(Unavailable, match="is a symbolic link, which is not followed; delete it"):
            storage.setup()
        assert precious.read_text() == "as it was"
        lock.unlink()
        storage.setup()
        storage.insert(Job(id="job", task="none"))


def test_a_database_by_a_link_has_one_lock_file(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    with closing(Storage(f"sqlite:///{link}")) as storage:
        storage.setup()
        storage.insert(Job(id="job", task="none"))
        assert not [*tmp_path.glob("link.db-*")]
        assert Path(f"{path}-lock").exists()


def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with closing(Storage(f"sqlite:///{path}")) as storage:
        storage.setup()
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", refuse)
            with pytest.raises(Unavailable, match="cannot be locked: No locks available; keep the SQLite file on a lo"):
                storage.insert(Job(id="job", task="none"))
        storage.insert(Job(id="job", task="none"))
