"""Connections, transactions, and what goes wrong with them."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage, Unavailable
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.engine.forks import Gate
from tests.storage.actors import new_job, the_job

SETTINGS = Settings()


def started(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


class TestGate:
    def test_it_shuts_when_the_last_one_has_left(self) -> None:
        gate, inside, leave, order = Gate(), threading.Event(), threading.Event(), []

        def use() -> None:
            with gate, gate:
                inside.set()
                leave.wait(60)
                with gate:  # who is inside already may go on
                    order.append("left")

        thread = started(use)
        assert inside.wait(60)
        shutter = started(lambda: (gate.shut(), order.append("shut")))
        leave.set()
        shutter.join(60)
        thread.join(60)
        assert order == ["left", "shut"]

    def test_nobody_passes_until_all_who_shut_it_have_opened_it(self) -> None:
        gate, passed = Gate(), threading.Event()

        def use() -> None:
            with gate:
                passed.set()

        gate.shut()
        gate.shut()
        thread = started(use)
        gate.open()
        assert not passed.wait(0.05)
        gate.open()
        thread.join(60)
        assert passed.is_set()
        gate.open()  # of a database that was made between the two sides of a fork
        gate.shut()
        assert gate._shut == 1

    def test_a_fork_inside_does_not_wait_for_itself(self) -> None:
        gate = Gate()
        with gate:
            gate.shut()
            gate.open()


def delete_all_and(storage: Storage, *words: str) -> None:
    with storage.database.write() as connection:
        connection.execute(text("DELETE FROM kathikon_jobs"))
        for statement in words:
            connection.exec_driver_sql(statement)
        raise ZeroDivisionError


def test_a_transaction_that_fails_leaves_nothing(storage: Storage) -> None:
    storage.insert(new_job())
    with pytest.raises(ZeroDivisionError):
        delete_all_and(storage)
    with pytest.raises(Exception, match="no_such_table"):
        delete_all_and(storage, "DELETE FROM no_such_table")
    assert storage.fetch("job")


def test_a_transaction_that_was_ended_inside_raises_what_happened(storage: Storage) -> None:
    """After some errors SQLite rolls back by itself; the error is to be seen, not that there was nothing left."""
    storage.insert(new_job())
    with pytest.raises(ZeroDivisionError):
        delete_all_and(storage, "ROLLBACK")
    assert storage.fetch("job")


def test_a_commit_that_fails_leaves_no_transaction_to_the_next(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.insert(new_job())
    real = prepared.plain

    def fail(connection: Connection, words: str) -> None:
        real(connection, words.replace("COMMIT", "COMMITT").replace("ROLLBACK", "ROLLBACKK"))

    monkeypatch.setattr(prepared, "plain", fail)
    with pytest.raises(Exception, match="COMMITT"):
        storage.clear_jobs()
    monkeypatch.undo()
    assert storage.fetch("job")
    with storage.database.write() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1


def test_nothing_of_the_parameters_in_an_error(storage: Storage) -> None:
    with pytest.raises(Exception, match="no_such_table") as raised, storage.database.read() as connection:
        connection.execute(text("SELECT 1 FROM no_such_table WHERE :payload = ''"), {"payload": "s3cret"})
    assert "s3cret" not in str(raised.value)


@pytest.mark.postgresql
@pytest.mark.parametrize(
    "call", ["fetch", "insert", "update", "all", "counts", "next_due", "promote_scheduled", "prune", "delete", "reset"]
)
def test_a_connection_that_was_lost_while_idle_is_nobodys_error(postgresql_storage: Storage, call: str) -> None:
    storage = postgresql_storage
    storage.insert(new_job())
    job = storage.fetch("job")
    with storage.database.once() as connection, storage.database.read() as second:
        assert second.execute(text("SELECT 1")).scalar()
        terminate = text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid != pg_backend_pid() AND :pid != pid"
        )
        connection.execute(terminate, {"pid": 0}).all()
    arguments = {"fetch": ["job"], "insert": [new_job("2")], "update": [job], "delete": ["job"]}
    getattr(storage, call)(*arguments.get(call, []))


@pytest.mark.postgresql
def test_an_unreachable_server_is_named_without_its_password() -> None:
    url = "postgresql+psycopg://user:s3cret@127.0.0.1:1/none"
    with closing(Storage(url, SETTINGS)) as storage:
        for call in (storage.setup, storage.counts, lambda: storage.insert(new_job())):
            with pytest.raises(Unavailable) as raised:
                call()
            assert "127.0.0.1" in str(raised.value)
            assert "s3cret" not in str(raised.value) + repr(storage) + repr(storage.database)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_in_memory_is_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(ValueError, match="kathikon_copies = 'ram'"):
        Database(url)


def test_a_database_that_we_do_not_speak() -> None:
    with pytest.raises(ValueError, match="does not speak 'oracle'"):
        Database("oracle://host/name")


class TestSQLiteFile:
    """What can be wrong with the file is said in words."""

    def test_no_folder(self, tmp_path: Path) -> None:
        storage = Storage(f"sqlite:///{tmp_path / 'missing' / 'kathikon.db'}", SETTINGS)
        with pytest.raises(Unavailable, match=r"the folder '.*missing' of the SQLite file does not exist; create it"):
            storage.setup()
        with pytest.raises(Unavailable, match="does not exist; create it"):
            storage.insert(new_job())

    def test_no_database(self, tmp_path: Path) -> None:
        path = tmp_path / "kathikon.db"
        path.write_text("this is a text, and a long one " * 100)
        with closing(Storage(f"sqlite:///{path}", SETTINGS)) as storage:
            with pytest.raises(Unavailable) as caught:
                storage.setup()
            assert str(caught.value) == f"{str(path)!r} is no SQLite database, or a damaged one: file is not a database"
            with pytest.raises(Unavailable, match="is no SQLite database"):
                storage.counts()

    @pytest.mark.parametrize(
        ("pragma", "words"),
        [("query_only=ON", "is read-only; give its owner the right"), ("max_page_count=1", "is full or broken")],
    )
    def test_no_right_or_no_room(self, sqlite_url: str, pragma: str, words: str) -> None:
        with closing(Storage(sqlite_url, SETTINGS)) as storage:
            storage.setup()
            storage.insert(new_job("before"))
            large = the_job(storage, "before")
            large.body, large.publication = "x" * 100_000, 0
            storage.close()

            def limit(connection: Any, _record: object) -> None:
                connection.execute(f"PRAGMA {pragma}")

            for engine in (storage.database._durable, storage.database._relaxed):
                event.listen(engine, "connect", limit)
            for write in (storage.insert, storage.update):
                with pytest.raises(Unavailable, match=words):
                    write(large)
            storage.close()
            storage.insert(new_job("after"))
            assert {job.id for job in storage.all()} == {"before", "after"}

    def test_text_that_is_none_spoils_its_own_row_only(self, sqlite_url: str) -> None:
        with closing(Storage(sqlite_url, SETTINGS)) as storage:
            storage.setup()
            storage.insert_many([new_job("corrupt"), new_job("sound")])
            storage.close()
            with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection, connection:
                connection.execute("UPDATE kathikon_jobs SET body = CAST(x'ff00fe' AS TEXT) WHERE id = 'corrupt'")
            assert {job.id for job in storage.claim("default", 2)} == {"corrupt", "sound"}

    def test_the_lock_file_may_be_removed_under_way(self, sqlite_url: str) -> None:
        with closing(Storage(sqlite_url, SETTINGS)) as storage:
            storage.setup()
            Path(sqlite_url.removeprefix("sqlite:///") + "-lock").unlink()
            storage.insert(new_job())
            with closing(Storage(sqlite_url, SETTINGS)) as other:
                other.insert(new_job("2"))
            assert len(storage.all()) == 2


def test_a_file_that_another_process_makes_meanwhile_is_not_taken_for_a_read_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real = tmp_path / "kathikon.db", os.access

    def access(path: Any, mode: int) -> bool:
        could = real(path, mode)
        if path == file:
            file.touch()
        return could

    monkeypatch.setattr(os, "access", access)
    Database(f"sqlite:///{file}").dialect.check_usable()
    assert file.exists()


def test_that_a_file_was_replaced_is_told_once_though_two_see_it(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one would close the connections, and forget the node, of those who have begun anew."""
    with closing(Storage(sqlite_url, SETTINGS)) as storage:
        storage.setup()
        database, told = storage.database, []
        database.on_replaced.append(lambda: told.append("replaced"))
        path = Path(database.url.database or "")
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        look = database.dialect.is_replaced

        def look_and_be_late() -> bool:
            seen = look()
            monkeypatch.undo()
            with pytest.raises(Unavailable), database.read():  # another one sees it as well
                pass
            storage.setup()
            return seen

        monkeypatch.setattr(database.dialect, "is_replaced", look_and_be_late)
        with pytest.raises(Unavailable, match="was deleted or replaced"), database.read():
            pass
        assert told == ["replaced"]
        storage.insert(new_job())


@pytest.mark.parametrize("failing", ["INotify", "add_watch"])
def test_a_user_who_has_no_inotify_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    """The system gives each user 128 instances, and file synchronizers and editors take some."""
    inotify_simple = pytest.importorskip("inotify_simple")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    if failing == "INotify":
        monkeypatch.setattr(inotify_simple, "INotify", refuse)
    else:
        monkeypatch.setattr(inotify_simple.INotify, "add_watch", refuse)
    with closing(Storage(f"sqlite:///{tmp_path}/jobs.db", Settings())) as storage:
        storage.setup()
        wakeup = storage.database.wakeup(1)
        storage.insert(new_job())
        assert wakeup.wait(60)
        wakeup.notify()  # by another thread: ends the sleep, and is no call
        assert not wakeup.wait(3600)
        wakeup.close()
    assert "fs.inotify.max_user_instances" in caplog.text
