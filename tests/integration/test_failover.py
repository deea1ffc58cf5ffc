"""A database that is lost although its connections stay open: read-only, silent, or replaced by another one."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from celery import chord
from kombu.exceptions import OperationalError
from sqlalchemy import Connection, NullPool, create_engine, make_url

from kathikon_celery.storage import Storage, Unavailable
from kathikon_celery.storage.engine import answers
from tests.integration.conftest import Journal, client_of
from tests.storage.actors import Worker
from tests.support import apps
from tests.support.postgresql import PostgreSQLServer
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

pytestmark = pytest.mark.postgresql
POOLS = ["prefork", "threads", "gevent", "solo"]
READ_ONLY = "default_transaction_read_only"
#: With this lease a connection that has been silent for a second is asked about.
SHORT = {"kathikon_lease": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQLServer]:
    """A server whose configuration the tests may change."""
    with PostgreSQLServer() as server:
        yield server


def run(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def configure(server: PostgreSQLServer, setting: str) -> None:
    """Change a setting of the server, also for the sessions that are open."""
    run(server.url, f"ALTER SYSTEM {setting}", "SELECT pg_reload_conf()")


def is_refused() -> bool:
    """Publish; return whether that was refused. Any error but kombu's is raised."""
    try:
        apps.add.delay(2, 2)
    except OperationalError:
        return True
    return False


def chord_of_two() -> object:
    return chord([apps.add.s(1, 1)] * 2, apps.total.s()).delay()


@pytest.mark.parametrize("pool", POOLS)
def test_a_server_that_is_read_only_for_a_while(
    server: PostgreSQLServer, tmp_path: Path, journal: Journal, pool: str
) -> None:
    """As a primary that is demoted. No connection is cut, and each one that was read-only is given up."""
    with WorkerProcess(server.url, directory=tmp_path, pool=pool) as worker, client_of(server.url):
        assert apps.add.delay(1, 1).get(timeout=60) == 2
        held = apps.wait_for_file.delay(str(tmp_path / "go"), journal.path, "started")
        journal.wait(1)
        configure(server, f"SET {READ_ONLY} = on")
        try:
            wait_until(is_refused, what="the refusal")
            with pytest.raises(OperationalError):
                chord_of_two()
            (tmp_path / "go").touch()
            worker.wait_for_log("away")
        finally:
            configure(server, f"RESET {READ_ONLY}")
        assert held.get(timeout=60) == "done"
        wait_until(lambda: not is_refused(), what="a publication")
        assert chord_of_two().get(timeout=60) == 4  # type: ignore[attr-defined]
        assert journal.lines == ["started"]
        assert "Traceback" not in worker.log
        assert worker.stop() == 0


@pytest.mark.parametrize("pool", POOLS)
def test_connections_whose_bytes_are_swallowed(
    postgresql_url: str, tmp_path: Path, journal: Journal, pool: str
) -> None:
    """All that is sent is acknowledged by TCP, and never answered."""
    with (
        Proxy(postgresql_url) as proxy,
        WorkerProcess(proxy.url, directory=tmp_path, pool=pool, conf=SHORT) as worker,
        client_of(proxy.url, **SHORT),
    ):
        assert apps.add.delay(1, 1).get(timeout=60) == 2
        held = apps.wait_for_file.delay(str(tmp_path / "go"), journal.path, "started")
        journal.wait(1)
        proxy.silence()
        (tmp_path / "go").touch()
        assert apps.add.delay(1, 2).get(timeout=60) == 3
        assert held.get(timeout=60) == "done"
        assert "the server has been silent for" in worker.log
        assert "Traceback" not in worker.log
        assert worker.stop() == 0


def dropped_database(url: str) -> None:
    name, others = make_url(url).database, make_url(url).set(database="postgres")
    shown = others.render_as_string(hide_password=False)
    run(shown, f"DROP DATABASE {name} WITH (FORCE)", f"CREATE DATABASE {name}")


def dropped_schema(url: str) -> None:
    run(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")


def dropped_tables(url: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT tablename FROM pg_tables WHERE tablename LIKE 'kathikon_%%'")
        connection.exec_driver_sql(f"DROP TABLE {', '.join(found.scalars())} CASCADE")


@pytest.mark.parametrize("pool", ["prefork"])  # tests/endurance/lost_databases.py runs the other ones
def test_a_database_that_is_replaced_by_an_empty_one(postgresql_url: str, tmp_path: Path, pool: str) -> None:
    with (
        WorkerProcess(postgresql_url, directory=tmp_path, pool=pool) as worker,
        WorkerProcess(postgresql_url, directory=tmp_path, pool="threads", name="other") as other,
        client_of(postgresql_url) as client,
    ):
        for drop in (dropped_database, dropped_schema, dropped_tables):
            assert apps.add.delay(1, 1).get(timeout=60) == 2
            drop(postgresql_url)
            wait_until(lambda: not is_refused(), what="a publication")
            assert [apps.add.delay(number, 1).get(timeout=60) for number in range(5)] == [1, 2, 3, 4, 5]
            assert chord_of_two().get(timeout=60) == 4  # type: ignore[attr-defined]
            # A worker whose connections are whole sees only at the next renewal of its lease that its tables are gone.
            wait_until(lambda: len(client.control.ping(timeout=1)) == 2, what="two answers")
        for one in (worker, other):
            assert "taken for dead" not in one.log
            # Celery restarts the greenlet that hears remote control, after its traceback.
            assert pool == "gevent" or "Traceback" not in one.log
            assert one.stop() == 0


def test_a_worker_that_hung_while_its_tables_were_made_anew(postgresql_url: str, tmp_path: Path) -> None:
    with (
        WorkerProcess(postgresql_url, directory=tmp_path, pool="threads") as worker,
        WorkerProcess(postgresql_url, directory=tmp_path, pool="threads", name="other") as other,
        client_of(postgresql_url) as client,
    ):
        worker.signal(signal.SIGSTOP)
        dropped_tables(postgresql_url)
        wait_until(lambda: not is_refused(), what="a publication")
        assert apps.add.delay(1, 1).get(timeout=60) == 2  # by the other one, the first to be registered anew
        worker.signal(signal.SIGCONT)
        wait_until(lambda: len(client.control.ping(timeout=1)) == 2, what="two answers")
        for one in (worker, other):
            assert "Traceback" not in one.log
            assert one.stop() == 0


def publish_until_refused() -> None:
    """Publish, also before the server's checkpointer has read its new setting."""
    for _ in range(1000):
        apps.add.apply_async((1, 1), retry_policy={"max_retries": 0}, task_id="waits")


def test_a_commit_that_waits_for_a_standby_is_told_and_has_an_end(
    server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(answers, "MOST_PERIODS", 2)
    with client_of(server.url, **SHORT) as client:
        apps.add.delay(1, 1)
        configure(server, "SET synchronous_standby_names = 'nobody'")
        try:
            with (
                caplog.at_level(logging.WARNING),
                pytest.raises(OperationalError, match="on a statement, which is ended"),
            ):
                publish_until_refused()
        finally:
            configure(server, "RESET synchronous_standby_names")
        assert "for a synchronous standby" in caplog.text
        apps.add.apply_async((1, 1), task_id="waits")
        with closing(Storage.for_app(client)) as storage:
            assert [job.id for job in storage.all()].count("waits") == 1


def test_a_publication_that_celery_repeats_after_lost_answers_runs_no_ended_job_again(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit arrived, its answer did not, and the job has ended when Celery tries again."""
    with client_of(postgresql_url) as client, closing(Storage.for_app(client)) as storage:
        assert is_refused() is False
        storage.reset()
        worker = Worker(storage)
        once, lost, ended = storage.database.once, [], []

        @contextmanager
        def lossy(durable: bool = False) -> Iterator[Connection]:
            with once(durable) as connection:
                yield connection
            if durable and len(lost) < 3:
                lost.append(None)
                ended.extend((job.id, worker.complete(job)) for job in worker.claim(10))
                raise Unavailable("the answer was lost")

        monkeypatch.setattr(storage.database, "once", lossy)
        apps.add.apply_async((1, 1), task_id="sent once", retry_policy={"interval_start": 0, "interval_step": 0})
        assert len(lost) == 3
        assert ended == [("sent once", 1)]


def test_a_channel_that_kombu_has_closed_publishes(postgresql_url: str) -> None:
    """Kombu closes it when it declares a queue in vain, and then publishes on it."""
    with client_of(postgresql_url) as client, client.connection_for_write() as connection:
        producer = connection.Producer(serializer="json")
        task = client.amqp.as_task_v2("sent", apps.add.name, (1, 1))
        assert producer.channel.storage.counts() == {}
        connection.collect()
        producer.publish(task.body, routing_key="default", headers=task.headers, **task.properties)
        with closing(Storage.for_app(client)) as storage:
            assert [job.id for job in storage.all()] == ["sent"]
