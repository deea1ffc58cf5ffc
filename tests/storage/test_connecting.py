"""How PostgreSQL is connected to: parameters of libpq, schemas, encodings, isolation, the number of connections."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from kathikon_celery.job import State
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.results.waiting import Wait
from kathikon_celery.settings import SettingError, Settings
from kathikon_celery.storage import Storage, chords, nodes, schema
from kathikon_celery.storage.dialects import dialect_for, encodings
from kathikon_celery.storage.engine import idle
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.errors import Forbidden, Unavailable, UnknownDatabase
from kathikon_celery.storage.tables import nodes as nodes_table
from tests.storage.actors import Worker, new_job
from tests.support.postgresql import new_database
from tests.support.waiting import wait_until

pytestmark = pytest.mark.postgresql


def with_query(url: str, **parameters: str) -> str:
    return make_url(url).update_query_dict(parameters).render_as_string(hide_password=False)


def sql(url: str, *statements: str) -> list[Any]:
    """Run *statements* as the owner; return the first column of the last one's rows."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            result = connection.execute(text(statement))
        rows = [row[0] for row in result] if result.returns_rows else []
    engine.dispose()
    return rows


def schemas_with_tables(url: str) -> list[str]:
    return sql(url, "SELECT DISTINCT table_schema FROM information_schema.tables WHERE table_name = 'kathikon_jobs'")


@contextmanager
def all_connections(database: Database) -> Iterator[list[Any]]:
    """One connection of each kind: for publishing, for all else, and one that listens or holds a lock."""
    with database.once(durable=True) as durable, database.read() as relaxed, closing(database.detached()) as own:
        yield [durable.connection.driver_connection, relaxed.connection.driver_connection, own]


def shown(connection: Any, setting: str) -> str:
    return str(connection.execute(f"SHOW {setting}").fetchone()[0])


class TestParameters:
    def test_those_of_the_url_reach_every_connection(self, postgresql_url: str, tmp_path: Path) -> None:
        sql(postgresql_url, "CREATE SCHEMA jobs")
        given = {
            "options": "-csearch_path=jobs -c work_mem=5MB",
            "application_name": "billing",
            "keepalives_idle": "77",
            "tcp_user_timeout": "12345",
            "connect_timeout": "9",
            "target_session_attrs": "read-write",
            "passfile": str(tmp_path / "pgpass"),
            "client_encoding": "LATIN1",
        }
        with closing(Storage(with_query(postgresql_url, **given), Settings())) as storage:
            storage.setup()
            with all_connections(storage.database) as connections:
                for one in connections:
                    parameters = one.info.get_parameters()
                    assert {name: parameters[name] for name in given} == given | {"client_encoding": "UTF8"}
                    assert parameters["keepalives_interval"] == "5"  # ours, which the URL does not give
                    assert shown(one, "application_name") == "billing"
                    assert (shown(one, "search_path"), shown(one, "work_mem")) == ("jobs", "5MB")
                    assert shown(one, "client_encoding") == "UTF8"
        assert schemas_with_tables(postgresql_url) == ["jobs"]

    def test_those_of_the_environment_and_of_a_service_do_so_too(
        self, postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGOPTIONS", "--work-mem=6MB")
        monkeypatch.setenv("PGAPPNAME", "from the environment")
        monkeypatch.setenv("PGSSLMODE", "prefer")
        monkeypatch.setenv("PGCONNECT_TIMEOUT", "11")
        (tmp_path / "services").write_text("[jobs]\nkeepalives_count=8\noptions=-c work_mem=7MB\n")
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
        for url, memory, count in (
            (postgresql_url, "6MB", "3"),
            (with_query(postgresql_url, service="jobs"), "7MB", "8"),
        ):
            database = Database(url)
            with all_connections(database) as connections:
                for one in connections:
                    assert shown(one, "work_mem") == memory
                    assert shown(one, "application_name") == "from the environment"
                    parameters = one.info.get_parameters()
                    assert parameters["keepalives_count"] == count
                    assert parameters.get("connect_timeout") in (None, "11")
            database.close()

    def test_without_any_the_connection_has_ours(self, postgresql_url: str) -> None:
        database = Database(postgresql_url)
        with all_connections(database) as connections:
            for one in connections:
                assert shown(one, "application_name") == "kathikon"
                assert shown(one, "default_transaction_isolation") == "read committed"
            assert [shown(one, "synchronous_commit") for one in connections] == ["on", "off", "off"]
        database.close()

    @pytest.mark.parametrize(
        ("parameters", "words"),
        [
            ("colour=blue", 'invalid connection option "colour"; allowed are the parameters of libpq'),
            ("autocommit=1", 'invalid connection option "autocommit"'),
            ("sslmode=mostly", 'invalid sslmode value: "mostly"'),
            ("target_session_attrs=me", 'invalid target_session_attrs value: "me"'),
            ("connect_timeout=soon", "connect_timeout = 'soon': allowed is a whole number"),
            ("service=nowhere", 'definition of service "nowhere" not found'),
            ("application_name=a&application_name=b", "'application_name' is given 2 times; give it once"),
        ],
    )
    def test_an_unknown_one_is_an_error_that_names_it(self, parameters: str, words: str) -> None:
        url = f"postgresql+psycopg://app:s3cret@127.0.0.1:1/none?{parameters}"
        with pytest.raises(UnknownDatabase) as raised:
            Database(url)
        assert words in str(raised.value)
        assert "s3cret" not in str(raised.value)


class TestSchema:
    def test_two_schemas_of_one_database_share_nothing(self, postgresql_url: str) -> None:
        with ExitStack() as stack:
            storages = [
                stack.enter_context(closing(Storage(postgresql_url, Settings(schema=name))))
                for name in (None, "jobs", 'It\'s "mine"')
            ]
            for storage in storages:
                storage.setup()
                storage.setup()
            assert sorted(schemas_with_tables(postgresql_url)) == ['It\'s "mine"', "jobs", "public"]
            workers = [Worker(storage) for storage in storages]
            for storage, worker in zip(storages, workers, strict=True):  # give all of them one number
                with storage.database.write() as connection:
                    connection.execute(text("UPDATE kathikon_nodes SET id = 1"))
                worker.id = 1
            holders = [nodes.Holder(storage.database) for storage in storages]
            for holder in holders:
                holder.hold(1)
                assert holder.is_held
                stack.callback(holder.drop)
            heard = [stack.enter_context(closing(storage.database.wakeup(1))) for storage in storages]
            for wakeup in heard:
                assert wakeup.wait(0)  # listens from now on
            workers[1].wait_for("default")
            storages[1].insert(new_job("of jobs"))
            assert heard[1].wait(20)
            with storages[1].database.write() as connection:
                storages[1].database.dialect.ring(connection)
            assert heard[1].wait(20)
            assert [heard[n].wait(0) for n in (0, 2)] == [False, False]
            assert [[job.id for job in storage.all()] for storage in storages] == [[], ["of jobs"], []]
            holders[1].drop()
            with storages[1].database.read() as one, storages[2].database.read() as other:
                wait_until(lambda: nodes.is_lock_free(storages[1].database, one, 1), 20)
                assert nodes.is_lock_free(storages[2].database, other, 1) is False

    def test_a_search_path_counts_as_a_schema(self, postgresql_url: str) -> None:
        """Whether the setting or the search path leads there, the tables have one channel and one space of locks."""
        with (
            closing(Storage(postgresql_url, Settings(schema="jobs"))) as by_setting,
            closing(Storage(with_query(postgresql_url, options="-csearch_path=jobs"), Settings())) as by_path,
        ):
            by_setting.setup()
            by_path.setup()
            one, other = by_setting.database.dialect, by_path.database.dialect
            assert (one.channel, one.lock_space) == (other.channel, other.lock_space)  # type: ignore[attr-defined]
            assert one.channel != "kathikon"  # type: ignore[attr-defined]

    def test_its_tables_are_upgraded_there(self, postgresql_url: str) -> None:
        sql(postgresql_url, *filter(str.strip, schema.ddl(postgresql_url, schema="jobs").split(";\n")))
        assert schemas_with_tables(postgresql_url) == ["jobs"]
        sql(
            postgresql_url,
            "ALTER TABLE jobs.kathikon_jobs DROP COLUMN cause, DROP COLUMN rerun_of, DROP COLUMN revoked_at",
            "ALTER TABLE jobs.kathikon_chords DROP COLUMN failed",
            "DROP TABLE jobs.kathikon_pauses, jobs.kathikon_acts, jobs.kathikon_history",
            "DROP TABLE jobs.kathikon_schedules, jobs.kathikon_limits, jobs.kathikon_limit_keys, jobs.kathikon_slots",
            "ALTER TABLE jobs.kathikon_jobs DROP COLUMN limits, DROP COLUMN line, DROP COLUMN gate,"
            " DROP COLUMN waiting_key, DROP COLUMN active_key, DROP COLUMN kept_key",
            "DROP INDEX jobs.kathikon_jobs_expiring_blocked",
            "ALTER TABLE jobs.kathikon_nodes DROP COLUMN consumes",
            "UPDATE jobs.kathikon_version SET version_num = '0001'",
        )
        with closing(Storage(postgresql_url, Settings(schema="jobs"))) as storage:
            storage.setup()
            storage.insert(new_job())
            assert storage.counts() == {("default", "available"): 1}
        assert sql(postgresql_url, "SELECT version_num FROM jobs.kathikon_version") == [schema.HEAD]

    def test_sqlite_has_none(self, sqlite_url: str) -> None:
        with pytest.raises(
            UnknownDatabase, match=r"kathikon_schema = 'jobs' is for PostgreSQL, and sqlite:///.* is a file"
        ):
            Storage(sqlite_url, Settings(schema="jobs"))

    @pytest.mark.parametrize("name", ["", "pg_mine", "x" * 64, "a\0b", 5])
    def test_a_name_that_postgresql_refuses_is_a_wrong_setting(self, name: Any) -> None:
        with pytest.raises(SettingError, match=r"kathikon_schema = .*: allowed is the name of a schema of PostgreSQL"):
            Settings(schema=name)

    def test_a_search_path_that_leads_nowhere_is_named(self, postgresql_url: str) -> None:
        url = with_query(postgresql_url, options="-csearch_path=missing")
        with (
            closing(Storage(url, Settings())) as storage,
            pytest.raises(Forbidden, match="or name one in kathikon_schema"),
        ):
            storage.setup()


TEXTS = ["日本 \U0001f600", "é", "\\U{41} and \\U{", "plain", "Ÿ€"]


class TestEncodings:
    @pytest.fixture(params=["LATIN1", "SQL_ASCII", "WIN1252", "EUC_JP"])
    def url(self, request: pytest.FixtureRequest, postgresql_server_url: str) -> Iterator[str]:
        """A database in another encoding than UTF-8."""
        with new_database(postgresql_server_url, f"ENCODING '{request.param}' LOCALE 'C' TEMPLATE template0") as url:
            yield url

    def test_a_job_with_any_text_comes_back(self, url: str) -> None:
        with closing(Storage(url, Settings())) as storage:
            storage.setup()
            for n, word in enumerate(TEXTS):
                job = new_job(f"{n}{word}", task=word, queue=word, body=word)
                storage.insert(job)
                worker = Worker(storage)
                claimed = worker.claim_one(word)
                assert (claimed.id, claimed.task, claimed.queue, claimed.body) == (job.id, word, word, word)
                with storage.database.write() as connection:
                    storage.backend.completed_with(
                        connection, {claimed.hold: {"status": "SUCCESS", "result": word, "traceback": word}}
                    )
                ended = storage.fetch(job.id)
                assert ended is not None
                assert (ended.state, ended.result, ended.traceback) == (State.COMPLETED, word, word)

    def test_who_waits_is_told_the_text(self, url: str) -> None:
        with closing(Storage(url, Settings())) as storage:
            storage.setup()
            worker = Worker(storage)
            for word in TEXTS:
                storage.insert(new_job(word))
                claimed = worker.claim_one()
                with Wait(storage.database, [word], 60.0) as wait:
                    assert wait.take(0) == []
                    with storage.database.write() as connection:
                        storage.backend.completed_with(
                            connection, {claimed.hold: {"status": "SUCCESS", "result": word, "traceback": None}}
                        )
                    (told,) = wait.take(30)
                    assert (told.id, told.result) == (word, word)

    def test_escapes_are_undone(self) -> None:
        for word in ["", *TEXTS, "\\U{5c}U{", "\\\\U{e9}", "".join(TEXTS)]:
            for encoding in ("ascii", "latin-1", "cp1252"):
                escaped = encodings.escaped(word, encoding)
                escaped.encode(encoding)
                assert encodings.unescaped(escaped) == word
        assert encodings.escaped("é", "latin-1") == "é"


@pytest.mark.postgresql
@pytest.mark.parametrize("wake", ["listen", "poll"])
def test_the_databases_style_of_dates_changes_nothing(postgresql_url: str, wake: str) -> None:
    sql(postgresql_url, f"ALTER DATABASE {make_url(postgresql_url).database} SET datestyle = 'German'")
    with closing(Storage(postgresql_url, Settings(wake=wake))) as storage:
        storage.setup()
        due = datetime.now(timezone.utc) + timedelta(hours=1)
        storage.insert(new_job(scheduled_at=due))
        (job,) = storage.all()
        assert job.scheduled_at == due


class TestIsolation:
    @pytest.mark.parametrize("level", ["repeatable read", "serializable"])
    def test_the_default_of_the_database_changes_nothing(self, postgresql_url: str, level: str) -> None:
        name = make_url(postgresql_url).database
        sql(postgresql_url, f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
        with closing(Storage(postgresql_url, Settings())) as storage:
            storage.setup()
            chords.open(storage.database, "chord", [(f"part{n}", n) for n in range(40)], None)
            chords.set_size(storage.database, "chord", 40)
            last: list[bool] = []

            def count(numbers: range) -> None:
                for n in numbers:
                    part = chords.Part(chord="chord", task_id=f"part{n}", position=n, succeeded=True, result="1")
                    with storage.database.write() as connection:
                        last.append(chords.count(storage.database, connection, part))

            threads = [threading.Thread(target=count, args=(range(start, 40, 4),)) for start in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert sorted(last) == [False] * 39 + [True]


def test_a_chords_size_survives_a_lost_connection(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction was committed, and its answer lost: the second try changes nothing."""
    database = storage.database
    chords.open(database, "chord", [], None)
    real, tries = database.once, []

    @contextmanager
    def lossy(durable: bool = False) -> Iterator[Any]:
        with real(durable) as connection:
            yield connection
        tries.append(1)
        if len(tries) % 2:
            raise Unavailable("the answer is lost")

    monkeypatch.setattr(database, "once", lossy)
    chords.set_size(database, "chord", 2)
    chords.add_part(database, "chord", "added")
    monkeypatch.undo()
    assert len(tries) == 4
    with database.read() as connection:
        assert tuple(connection.execute(text("SELECT size, added FROM kathikon_chords")).one()) == (2, 1)


class TestNumberOfConnections:
    def used_at_once(self, database: Database, number: int) -> None:
        """Use *number* connections of each kind at the same time."""
        with ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(database.once(durable=True))
                stack.enter_context(database.read())

    def open_ones(self, url: str) -> int:
        count = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'kathikon'"
        )
        return int(sql(url, count)[0])

    @pytest.mark.parametrize(("size", "kept"), [(5, 10), (1, 2), (0, 0)])
    def test_only_some_are_kept(self, postgresql_url: str, size: int, kept: int) -> None:
        database = Database(postgresql_url, pool_size=size)
        self.used_at_once(database, 12)
        wait_until(lambda: self.open_ones(postgresql_url) == kept, 20)
        database.close()
        wait_until(lambda: self.open_ones(postgresql_url) == 0, 20)

    def test_they_are_closed_after_a_time(self, postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(idle, "LONGEST", 0.2)
        database = Database(postgresql_url)
        self.used_at_once(database, 3)
        wait_until(lambda: self.open_ones(postgresql_url) == 0, 20)
        wait_until(lambda: database._idle._closer is None, 20)  # nothing is kept, so the thread has ended
        self.used_at_once(database, 1)
        wait_until(lambda: self.open_ones(postgresql_url) == 0, 20)

    def test_no_thread_of_ours_runs_during_a_fork(self, storage: Storage) -> None:
        storage.counts()
        assert any(thread.name == "kathikon-idle" for thread in threading.enumerate())
        child = os.fork()
        if not child:
            os._exit(any(thread.name == "kathikon-idle" for thread in threading.enumerate()))
        assert os.waitpid(child, 0)[1] == 0
        storage.counts()


def test_a_node_without_a_lock_renews_its_lease_so_often_that_none_takes_it_for_dead(postgresql_url: str) -> None:
    """The lock of a node that polls is always free: others must see its lease grow within their three seconds."""
    assert dialect_for(make_url(postgresql_url)).renewal_without_lock <= 1.0
    with closing(Storage(postgresql_url, Settings(wake="poll", lease=3600))) as storage:
        storage.setup()
        node = OwnNode(storage, "polls")
        node.enter()
        leases = []
        for _ in range(2):
            with storage.database.read() as connection:
                leases.append(connection.execute(nodes_table.select()).one().lease_until)
            assert storage.database.dialect.is_lock_free(connection, node.id)
            wait_until(lambda: self_renewed(storage, leases[-1]), 20)
        node.leave()


def self_renewed(storage: Storage, last: Any) -> bool:
    with storage.database.read() as connection:
        return bool(connection.execute(nodes_table.select()).one().lease_until > last)
