"""Broker, backend and worker for the ``celery_setup`` of pytest-celery: a database and local processes, no Docker.

In the ``conftest.py`` at the root of the tests::

    pytest_plugins = ["kathikon_celery.testing.components"]

From then on ``celery_setup`` runs on the database of `kathikon_database_url`, which also `kathikon_storage` shows. The
workers are those that ``default_worker_container_cls``, ``default_worker_tasks``, ``default_worker_app`` and the other
fixtures of pytest-celery describe, each a process in a folder of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import celery
import pytest
import sqlalchemy as sa
from pytest_celery import (
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestContainer,
    CeleryTestWorker,
    CeleryWorkerContainer,
)

from kathikon_celery import config
from kathikon_celery.settings import mask, parse_url
from kathikon_celery.testing.isolation import disconnect
from kathikon_celery.testing.process import ProcessContainer

__all__ = [
    "DatabaseContainer",
    "KathikonTestBackend",
    "KathikonTestBroker",
    "KathikonWorkerContainer",
    "celery_backend",
    "celery_broker",
    "celery_setup_app",
    "default_worker_container",
    "default_worker_container_cls",
    "kathikon_database_container",
    "kathikon_start_container",
    "kathikon_start_worker",
]


class DatabaseService:
    """A database with the interface of a Docker container: it may refuse all connections, as if it were down."""

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        self.id = secrets.token_hex(32)
        self.name = mask(url)
        self.status = "running"
        self.attrs: dict[str, Any] = {
            "Config": {"Env": []},
            "HostConfig": {"PortBindings": {}},
            "NetworkSettings": {"Networks": {"local": {"IPAddress": "127.0.0.1"}}, "Ports": {}},
        }

    def logs(self, **_: Any) -> bytes:
        """Nothing: the log belongs to the server."""
        return b""

    def reload(self) -> None:
        """Nothing to do: the status is always that of now."""

    def kill(self, signal: str | int | None = None) -> None:
        """Cut all connections and refuse new ones until `restart`. Raises `RuntimeError` for a file."""
        if self.url.get_backend_name() != "postgresql":
            raise RuntimeError(f"{self.name} cannot be killed: only a PostgreSQL database can refuse connections")
        self._allow(False)
        self.status = "exited"

    def restart(self, timeout: float = 10.0) -> None:
        """Cut all connections and take new ones. Does nothing for a file."""
        if self.url.get_backend_name() == "postgresql":
            self._allow(False)
            self._allow(True)
        self.status = "running"

    def _allow(self, allowed: bool) -> None:
        engine = sa.create_engine(
            self.url.set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
        )
        activity = sa.table("pg_stat_activity", sa.column("pid"), sa.column("datname"))
        cut = sa.select(sa.func.pg_terminate_backend(activity.c.pid)).where(activity.c.datname == self.url.database)
        with engine.connect() as connection:
            name = connection.dialect.identifier_preparer.quote(str(self.url.database))
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {'true' if allowed else 'false'}")
            if not allowed:
                connection.execute(cut).all()


class DatabaseContainer(CeleryTestContainer):
    """The database of a test, for the nodes of pytest-celery."""

    def __init__(self, url: str) -> None:
        super().__init__(DatabaseService(url))
        self._url = f"kathikon+{url}"

    @property
    def celeryconfig(self) -> dict[str, str]:
        """The URL for workers and for the test: the same, since all of them run here."""
        return {"url": self._url, "host_url": self._url}

    def teardown(self) -> None:
        """Take connections again, for code that reads the database or drops it."""
        if self.status != "running":
            self.restart()


class KathikonTestBroker(CeleryTestBroker):
    """A broker of pytest-celery: a database."""


class KathikonTestBackend(CeleryTestBackend):
    """A result backend of pytest-celery: the broker's database."""


class KathikonWorkerContainer(CeleryWorkerContainer):
    """A worker of pytest-celery that runs as a process. A class of your own may be any `CeleryWorkerContainer`."""

    @classmethod
    def version(cls) -> str:
        """The version of Celery in this environment."""
        return str(celery.__version__)

    @classmethod
    def utils_module(cls) -> ModuleType:
        """The module that lists the worker's processes."""
        from kathikon_celery.testing import worker_utils

        return worker_utils


@pytest.fixture
def kathikon_database_container(kathikon_database_url: str) -> Iterator[DatabaseContainer]:
    """The database of this test, for broker and backend."""
    container = DatabaseContainer(kathikon_database_url)
    yield container
    container.teardown()


@pytest.fixture
def celery_broker(kathikon_database_container: DatabaseContainer) -> KathikonTestBroker:
    """In place of pytest-celery's Redis and RabbitMQ."""
    return KathikonTestBroker(kathikon_database_container)


@pytest.fixture
def celery_backend(kathikon_database_container: DatabaseContainer) -> KathikonTestBackend:
    """In place of pytest-celery's Redis."""
    return KathikonTestBackend(kathikon_database_container)


@pytest.fixture
def celery_setup_app(
    celery_setup_cls: Any, celery_setup_config: dict[str, Any], celery_setup_name: str
) -> Iterator[celery.Celery]:
    """The app of `celery_setup` and its workers, with late acks and the other switches of `kathikon_celery.config`.

    Other values in `celery_setup_config` or the ``update_app_config`` of `celery_setup_cls` come first. The connections
    of the app are closed when the test ends.
    """
    app = celery_setup_cls.create_setup_app(
        celery_setup_config=celery_setup_config, celery_setup_app_name=celery_setup_name
    )
    _ = app.conf["broker_url"]  # makes Celery read the configuration, which replaces app.conf
    chosen = {*app.conf.changes, *celery_setup_config}
    values = {name: getattr(config, name) for name in config.__all__ if name not in chosen}
    app.conf.update({name: value for name, value in values.items() if isinstance(value, bool)})
    yield app
    disconnect(app)


@pytest.fixture
def default_worker_container_cls() -> type[CeleryWorkerContainer]:
    """The class of the worker. Override it to give workers your own command, tasks, queue or environment."""
    return KathikonWorkerContainer


StartContainer = Callable[[], CeleryWorkerContainer]


@pytest.fixture
def kathikon_start_container(
    default_worker_container_cls: type[CeleryWorkerContainer],
    default_worker_command: list[str],
    default_worker_env: Mapping[str, str],
    default_worker_initial_content: Mapping[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[StartContainer]:
    """Start a `default_worker_container_cls`; all started ones are killed when the test ends."""
    with ExitStack() as stack:

        def start() -> CeleryWorkerContainer:
            process = ProcessContainer(
                default_worker_command,
                directory=tmp_path_factory.mktemp(default_worker_container_cls.worker_name()),
                content=default_worker_initial_content,
                environment=default_worker_env,
                prompt="ready.",
            )
            stack.callback(process.kill)
            process.start()
            return default_worker_container_cls(process)

        yield start


@pytest.fixture
def default_worker_container(kathikon_start_container: StartContainer) -> CeleryWorkerContainer:
    """The worker of `celery_setup`, ready."""
    return kathikon_start_container()


@pytest.fixture
def kathikon_start_worker(
    kathikon_start_container: StartContainer,
    default_worker_cls: type[CeleryTestWorker],
    default_worker_app: celery.Celery,
) -> Callable[[], CeleryTestWorker]:
    """Start one more worker like that of `celery_setup`; it is ready when the call returns."""
    return lambda: default_worker_cls(container=kathikon_start_container(), app=default_worker_app)
