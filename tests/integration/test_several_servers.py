"""A list of brokers: servers that have the same data, of which one goes on when another one is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import create_engine, make_url, text

from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from tests.support import apps
from tests.support.proxy import Proxy
from tests.support.workers import WorkerProcess

pytestmark = pytest.mark.postgresql


@pytest.fixture
def proxies(postgresql_url: str) -> Iterator[list[Proxy]]:
    """Two ways to one server."""
    with Proxy(postgresql_url) as first, Proxy(postgresql_url) as second:
        yield [first, second]


def app_on(urls: list[str]) -> Celery:
    app = apps.create_app("several", broker_url=[f"kathikon+{url}" for url in urls], result_backend="kathikon")
    app.set_current()
    return app


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_when_a_server_is_gone_all_go_on_with_the_next_one(tmp_path: Path, proxies: list[Proxy], pool: str) -> None:
    urls = [one.url for one in proxies]
    brokers = ";".join(f"kathikon+{url}" for url in urls)
    env = {"CELERY_BROKER_URL": brokers}
    app = app_on(urls)
    with WorkerProcess(directory=tmp_path, pool=pool, env=env) as worker:
        assert [apps.add.delay(n, 1).get(timeout=60) for n in range(5)] == [1, 2, 3, 4, 5]
        proxies[0].cut()
        for n in range(5):
            sent = apps.add.apply_async((n, 1), retry=True)
            assert sent.get(timeout=60) == n + 1
        assert [reply["ok"] for one in app.control.ping(timeout=10, limit=1) for reply in one.values()] == ["pong"]
        assert worker.stop() == 0
    app.close()


def test_a_server_that_cannot_be_written_to_is_passed_over(postgresql_url: str) -> None:
    """As a standby is, and a primary that was demoted."""
    read_only = make_url(postgresql_url)
    role = "kathikon_reads_only"
    engine = create_engine(read_only, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN"))
        connection.execute(text(f"ALTER ROLE {role} SET default_transaction_read_only = on"))
    try:
        first = read_only.set(username=role).render_as_string(hide_password=False)
        storage = Storage.shared([first, postgresql_url], Settings())
        storage.setup()
        assert storage.counts() == {}
        storage.close()
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP ROLE {role}"))
        engine.dispose()
