"""The containers of Celery's smoke suite as processes of this machine, for `tests.upstream`.

The suite makes its containers with ``container`` of pytest-docker-tools, which this plugin replaces: a worker becomes
a `ProcessContainer` of `kathikon_celery.testing`, Redis becomes a ``redis-server``. A test that needs any other
container is skipped. On Kathikon, broker and backend are those of `kathikon_celery.testing.components`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_docker_tools
from celery import Celery
from pytest_celery import CeleryWorkerContainer, RedisContainer, RedisTestBackend, RedisTestBroker
from pytest_docker_tools.templates import resolve_fixtures_in_params

from kathikon_celery.testing import components, worker_utils
from kathikon_celery.testing.isolation import disconnect
from kathikon_celery.testing.process import ProcessContainer
from tests.support.postgresql import new_database

BROKER_VARIABLE = "UPSTREAM_BROKER"
LATE_ACKS_VARIABLE = "UPSTREAM_LATE_ACKS"

broker = os.environ.get(BROKER_VARIABLE, "redis")


class RedisServer(ProcessContainer):
    """A ``redis-server`` on a free port, which keeps nothing on disk. ``with`` starts and ends it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        super().__init__(
            ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"],
            directory=folder / f"redis-{self.port}",
            content={},
            environment={},
            prompt="Ready to accept connections",
        )

    @property
    def attrs(self) -> dict[str, Any]:
        """As if port 6379 of the container were published."""
        attrs = super().attrs
        attrs["Config"]["Hostname"] = f"localhost:{self.port}"
        attrs["NetworkSettings"]["Ports"] = {f"{self.port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(self.port)}]}
        return attrs

    def exec_run(self, cmd: Any, **options: Any) -> Any:
        """``redis-cli`` talks to this server."""
        if isinstance(cmd, list) and cmd[0] == "redis-cli":
            cmd = ["redis-cli", "-p", str(self.port), *cmd[1:]]
        return super().exec_run(cmd, **options)

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()


class LocalRedisContainer(RedisContainer):
    """The wrapper of pytest-celery for a `RedisServer`."""

    @property
    def port(self) -> int:
        return int(self._container.port)


def container(*, wrapper_class: Any, command: Any = None, environment: Any = None, **_: Any) -> Any:
    """In place of pytest-docker-tools' factory of fixtures: the same fixture, but of a process."""

    def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
        name = wrapper_class.__name__
        if issubclass(wrapper_class, RedisContainer):
            with RedisServer(tmp_path_factory.mktemp("redis")) as server:
                yield LocalRedisContainer(server)
        elif issubclass(wrapper_class, CeleryWorkerContainer) and command is not None:
            words, variables = resolve_fixtures_in_params(request, [command, environment])
            host, _, port = str(variables.get("REDIS_HOST", "")).partition(":")
            variables = variables | ({"REDIS_HOST": host, "REDIS_PORT": port} if port else {})
            process = ProcessContainer(
                words,
                directory=tmp_path_factory.mktemp(wrapper_class.worker_name()),
                content=request.getfixturevalue("default_worker_initial_content"),
                environment={key: str(value) for key, value in variables.items()},
                prompt="ready.",
            )
            try:
                process.start()
                yield wrapper_class(process)
            finally:
                process.kill()
        else:
            pytest.skip(f"{name} needs Docker")

    return pytest.fixture(start)


pytest_docker_tools.container = container


@pytest.fixture(scope="session")
def docker_client() -> None:
    """What is not made by `container` above: RabbitMQ and what else pytest-celery makes itself."""
    pytest.skip("needs Docker, as RabbitMQ does here")


@pytest.fixture
def default_worker_utils_module() -> ModuleType:
    return worker_utils


if broker == "redis":

    @pytest.fixture
    def celery_broker(celery_redis_broker: RedisTestBroker) -> RedisTestBroker:
        return celery_redis_broker

    @pytest.fixture
    def celery_backend(celery_redis_backend: RedisTestBackend) -> RedisTestBackend:
        return celery_redis_backend

else:
    celery_broker = celery_redis_broker = components.celery_broker
    celery_backend = celery_redis_backend = components.celery_backend
    kathikon_database_container = components.kathikon_database_container

    @pytest.fixture
    def kathikon_database_url(tmp_path: Path) -> Iterator[str]:
        if broker == "sqlite":
            yield f"sqlite:///{tmp_path / 'kathikon.db'}"
        else:
            with new_database(os.environ["KATHIKON_TEST_POSTGRESQL_URL"]) as url:
                yield url

    if os.environ.get(LATE_ACKS_VARIABLE):
        celery_setup_app = components.celery_setup_app
    else:

        @pytest.fixture
        def celery_setup_app(celery_setup_app: Celery) -> Iterator[Celery]:
            yield celery_setup_app
            disconnect(celery_setup_app)
