"""Connection poolers between Kathikon and PostgreSQL: pgbouncer, and a stand-in where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import chord, group
from sqlalchemy import create_engine, text

from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage, Unavailable
from tests.integration.conftest import client_of
from tests.storage.actors import new_job
from tests.support import apps
from tests.support.pooler import PGBOUNCER, PgBouncer, StandIn
from tests.support.workers import WorkerProcess

pytestmark = pytest.mark.postgresql

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed; the stand-in is tested")
ADVICE = "a connection pooler such as pgbouncer answers at"


@pytest.fixture(params=[StandIn, pytest.param(PgBouncer, marks=needs_pgbouncer)])
def software(request: pytest.FixtureRequest) -> type[StandIn | PgBouncer]:
    """What pools the connections."""
    kind: type[StandIn | PgBouncer] = request.param
    return kind


@pytest.fixture(params=["transaction", "session"])
def pooler(
    request: pytest.FixtureRequest, postgresql_url: str, software: type[StandIn | PgBouncer]
) -> Iterator[StandIn | PgBouncer]:
    """A pooler in each mode."""
    with software(postgresql_url, request.param) as pooler:
        yield pooler


def sessions_are_untouched(url: str) -> None:
    """No later client of the pooler finds a setting, a prepared statement or a lock of ours."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"prepare_threshold": None})
    with engine.connect() as connection:
        for _ in range(6):
            for setting, value in {"synchronous_commit": "on", "plan_cache_mode": "auto"}.items():
                assert connection.execute(text(f"SHOW {setting}")).scalar() == value
            assert connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar() == 0
            assert connection.execute(text("SELECT count(*) FROM pg_listening_channels()")).scalar() == 0
    engine.dispose()


def test_producers_need_no_session(tmp_path: Path, postgresql_url: str, pooler: StandIn | PgBouncer) -> None:
    """The workers are connected to PostgreSQL itself, and are woken by jobs that come through the pooler."""
    with WorkerProcess(postgresql_url, directory=tmp_path, pool="threads").start() as worker:
        with client_of(pooler.url, kathikon_poll_interval=0.05) as app:
            for n in range(10):  # psycopg prepares what it runs for the sixth time
                assert apps.add.delay(n, 1).get(timeout=60) == n + 1
            assert group(apps.add.s(n, 1) for n in range(5))().get(timeout=60) == [1, 2, 3, 4, 5]
            assert chord((apps.add.s(n, 1) for n in range(5)), apps.total.s())().get(timeout=60) == 15
            assert app.control.ping(timeout=10, limit=1) == [{worker.hostname: {"ok": "pong"}}]
        assert ADVICE not in worker.log
    sessions_are_untouched(pooler.url)


def test_a_worker_says_what_it_needs_and_polls(
    tmp_path: Path, postgresql_url: str, software: type[StandIn | PgBouncer]
) -> None:
    conf = {"kathikon_poll_interval": 0.05}
    with (
        software(postgresql_url, "transaction") as pooler,
        WorkerProcess(pooler.url, directory=tmp_path, pool="threads", conf=conf).start() as worker,
    ):
        with client_of(pooler.url, **conf):
            assert [apps.add.delay(n, 1).get(timeout=60) for n in range(5)] == [1, 2, 3, 4, 5]
            assert chord((apps.add.s(n, 1) for n in range(5)), apps.total.s())().get(timeout=60) == 15
        assert worker.log.count(ADVICE) == 1
        assert "Traceback" not in worker.log
        assert worker.stop() == 0
        sessions_are_untouched(pooler.url)


def test_a_worker_that_is_to_poll_does_so_without_a_word(tmp_path: Path, postgresql_url: str) -> None:
    conf = {"kathikon_wake": "poll", "kathikon_poll_interval": 0.05}
    with (
        StandIn(postgresql_url, "transaction") as pooler,
        WorkerProcess(pooler.url, directory=tmp_path, conf=conf).start() as worker,
    ):
        with client_of(pooler.url, **conf):
            assert [apps.add.delay(n, 1).get(timeout=60) for n in range(5)] == [1, 2, 3, 4, 5]
        assert ADVICE not in worker.log
        assert worker.stop() == 0


def test_in_session_mode_a_worker_may_listen(
    tmp_path: Path, postgresql_url: str, software: type[StandIn | PgBouncer]
) -> None:
    conf = {"kathikon_wake": "listen", "kathikon_poll_interval": 60}
    with (
        software(postgresql_url, "session") as pooler,
        WorkerProcess(pooler.url, directory=tmp_path, pool="threads", conf=conf).start() as worker,
    ):
        with client_of(pooler.url, **conf):
            assert [apps.add.delay(n, 1).get(timeout=60) for n in range(5)] == [1, 2, 3, 4, 5]
        assert ADVICE not in worker.log
        assert worker.stop() == 0


def set_up_and_insert(storage: Storage) -> None:
    for n in range(20):
        storage.setup()
        storage.insert(new_job(str(n)))


def test_listening_in_transaction_mode_is_refused_with_the_remedy(postgresql_url: str) -> None:
    with StandIn(postgresql_url, "transaction") as pooler:
        storage = Storage(pooler.url, Settings(wake="listen"))
        with pytest.raises(
            Unavailable, match="a connection pooler in transaction mode answers there: say kathikon_wake"
        ):
            set_up_and_insert(storage)
        storage.close()


def test_a_job_is_on_disk_whatever_the_default_of_the_role_is(postgresql_url: str) -> None:
    """A session that is not ours is told nothing, so that each transaction says what its commit waits for."""
    engine = create_engine(postgresql_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        name = connection.execute(text("SELECT current_database()")).scalar()
        for setting in ("synchronous_commit = off", "default_transaction_isolation = 'serializable'"):
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET {setting}")
    engine.dispose()
    shown = "SELECT current_setting('synchronous_commit'), current_setting('transaction_isolation')"
    with StandIn(postgresql_url, "transaction") as pooler:
        storage = Storage(pooler.url, Settings())
        storage.setup()
        for durable, commit in ((True, "on"), (False, "off")):
            with storage.database.once(durable) as connection:
                assert connection.execute(text(shown)).one() == (commit, "read committed")
        storage.close()
