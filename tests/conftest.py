"""Databases, workers and client apps for every test.

``KATHIKON_TEST_POSTGRESQL_URL`` names a PostgreSQL server to use, with the right to create databases; without it, one
is started for the run. Under pytest-xdist the controlling process starts it and the workers inherit the variable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
from celery import Celery
from celery._state import _set_task_join_will_block, task_join_will_block
from celery.contrib.testing.app import setup_default_app

from tests.support import apps
from tests.support.postgresql import PostgreSQLServer, new_database
from tests.support.workers import WorkerProcess

SERVER_VARIABLE = "KATHIKON_TEST_POSTGRESQL_URL"


def pytest_configure(config: pytest.Config) -> None:
    # Without bytecode, each of the hundreds of processes that tests start compiles the package anew, for half a second.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if getattr(config.option, "numprocesses", None) and SERVER_VARIABLE not in os.environ:
        server = PostgreSQLServer()
        config.add_cleanup(server.destroy)
        config.add_cleanup(lambda: os.environ.pop(SERVER_VARIABLE, None))
        server.start()
        os.environ[SERVER_VARIABLE] = server.url


@pytest.fixture(scope="session")
def postgresql_server_url() -> Iterator[str]:
    """The PostgreSQL server that all tests of the run share."""
    if url := os.environ.get(SERVER_VARIABLE):
        yield url
    else:
        with PostgreSQLServer() as server:
            yield server.url


@pytest.fixture
def own_postgresql_server() -> Iterator[PostgreSQLServer]:
    """A PostgreSQL server for one test alone, which may stop, restart or crash it."""
    with PostgreSQLServer() as server:
        yield server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'kathikon.db'}"


@pytest.fixture
def postgresql_url(postgresql_server_url: str) -> Iterator[str]:
    """An empty database on the PostgreSQL server."""
    with new_database(postgresql_server_url) as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(autouse=True)
def fresh_kombu_pools() -> Iterator[None]:
    """kombu keeps a pool of connections for each broker URL: let none lead to the database of an earlier test."""
    yield
    kombu.pools.reset()


@pytest.fixture(autouse=True)
def joins_are_allowed() -> Iterator[None]:
    """A worker that is built in this process forbids `result.get()` to the whole of it: that ends with the test."""
    blocks = task_join_will_block()
    yield
    _set_task_join_will_block(blocks)


@pytest.fixture
def client(database_url: str) -> Iterator[Celery]:
    """An app on the test's database, and the current one: ``apps.add.delay(2, 2)`` goes through it."""
    with ExitStack() as stack:
        app = apps.create_app("client", kathikon_database_url=database_url)
        stack.enter_context(setup_default_app(app))
        app.set_current()
        yield app


@pytest.fixture
def start_worker(database_url: str, tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start workers on the test's database, with the arguments of WorkerProcess; all are gone when the test ends."""
    with ExitStack() as stack:
        count = 0

        def start(**options: Any) -> WorkerProcess:
            nonlocal count
            count += 1
            defaults = {"database_url": database_url, "directory": tmp_path, "name": f"worker{count}"}
            return stack.enter_context(WorkerProcess(**defaults | options))

        yield start
