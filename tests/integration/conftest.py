"""A database and a worker that the tests of a module share, since a worker takes a second of processor time to start.

Whoever shares them runs in one process of pytest-xdist (``--dist loadgroup``): see `pytest_collection_modifyitems`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import filterfalse
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.contrib.testing.app import setup_default_app
from celery.result import AsyncResult

from kathikon_celery.job import Job, State
from kathikon_celery.storage import Storage
from tests.support import apps
from tests.support.postgresql import new_database
from tests.support.projects import Project
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

#: Fixtures that are made anew for each of their parameters, and not for each test.
SHARED = ("shared_database_url", "pool")
#: For what does not depend on the database: the pool, Celery's signals, the command line.
on_one_database = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


#: Where what a pool does is on its own side: each pool then runs on one database, and prefork on both.
_DATABASES = {
    "prefork": ("sqlite", "postgresql"),
    "threads": ("postgresql",),
    "gevent": ("sqlite",),
    "solo": ("postgresql",),
}
#: Set this variable to run such tests with each pool on each database.
EVERYWHERE = "KATHIKON_TEST_EACH_POOL_EVERYWHERE"


def _is_left_out(item: pytest.Item) -> bool:
    """Whether a test marked ``each_pool`` is spared with this pool on this database."""
    if item.get_closest_marker("each_pool") is None or EVERYWHERE in os.environ:
        return False
    if any("database_url" in marker.args[0] for marker in item.iter_markers("parametrize")):  # it says its database
        return False
    params = item.callspec.params  # type: ignore[attr-defined]
    database = params.get("database_url") or params.get(SHARED[0])
    return "pool" in params and database is not None and database not in _DATABASES[params["pool"]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if left_out := list(filter(_is_left_out, items)):
        config.hook.pytest_deselected(items=left_out)
        items[:] = filterfalse(_is_left_out, items)
    for item in items:
        if isinstance(item, pytest.Function) and SHARED[0] in item.fixturenames:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            group = "-".join([item.module.__name__, *(str(params[name]) for name in SHARED if name in params)])
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the end of the workers' logs, and what their threads do, below what failed."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed and isinstance(item, pytest.Function):
        for worker in _workers_of(item):
            report.sections.append((f"log of {worker.name}", worker.report()))
    return report  # type: ignore[return-value]


def _workers_of(item: pytest.Function) -> list[WorkerProcess]:
    found = []
    for value in item.funcargs.values():
        found += [value] if isinstance(value, WorkerProcess) else getattr(value, "started", [])
    return found


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def shared_database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database of each kind in turn, which the tests of the module share."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('database') / 'kathikon.db'}"
    else:
        with new_database(request.getfixturevalue("postgresql_server_url")) as url:
            yield url


class Workers:
    """Starts workers on one database, and ends them all when it is left."""

    def __init__(self, database_url: str | None, directory: Path) -> None:
        self.database_url = database_url
        self.directory = directory
        self.started: list[WorkerProcess] = []
        self._stack = ExitStack()

    def __call__(self, **options: Any) -> WorkerProcess:
        """Start a worker, with the arguments of `WorkerProcess`, and wait until it is ready."""
        name = f"worker{len(self.started) + 1}"
        worker = WorkerProcess(
            **{"database_url": self.database_url, "directory": self.directory, "name": name} | options
        )
        self.started.append(worker)
        return self._stack.enter_context(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def shared_workers(shared_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Start workers on the shared database; they live as long as it."""
    with Workers(shared_database_url, tmp_path_factory.mktemp("workers")) as workers:
        yield workers


@pytest.fixture
def workers(database_url: str, tmp_path: Path) -> Iterator[Workers]:
    """Start workers on the test's own database; they end with the test."""
    with Workers(database_url, tmp_path) as workers:
        yield workers


class Jobs:
    """What the table says of jobs."""

    def __init__(self, app: Celery) -> None:
        self.storage = Storage.for_app(app)

    def of(self, result: AsyncResult) -> Job:
        """The row of a task."""
        job = self.storage.fetch(result.id)
        assert job is not None, f"no row for {result.id}"
        return job

    def wait(self, result: AsyncResult, *states: State, timeout: float = 60.0) -> Job:
        """The row of a task, as soon as it is in one of the *states*."""

        def reached() -> Job | None:
            job = self.storage.fetch(result.id)
            return job if job is not None and job.state in states else None

        try:
            return wait_until(reached, timeout)  # type: ignore[return-value]
        except AssertionError:
            wanted = " or ".join(states)
            found = self.storage.fetch(result.id)
            raise AssertionError(f"waited {timeout:g} s in vain for {wanted}: {found}") from None


@contextmanager
def client_of(database_url: str, **conf: Any) -> Iterator[Celery]:
    """An app on a database, and the current one: ``apps.add.delay(2, 2)`` goes through it."""
    app = apps.create_app("client", kathikon_database_url=database_url, **conf)
    with setup_default_app(app):
        app.set_current()
        yield app
    app.close()


@pytest.fixture
def app(shared_database_url: str) -> Iterator[Celery]:
    """A client on the shared database."""
    with client_of(shared_database_url) as app:
        yield app


@pytest.fixture
def jobs(request: pytest.FixtureRequest) -> Jobs:
    """The table that the test's client publishes to."""
    return Jobs(request.getfixturevalue("app" if SHARED[0] in request.fixturenames else "client"))


class Journal:
    """A file to which tasks append lines."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    @property
    def lines(self) -> list[str]:
        """What was appended so far."""
        return apps.read_lines(self.path)

    def wait(self, number: int, timeout: float = 60.0) -> list[str]:
        """The lines, as soon as there are so many."""
        return wait_until(lambda: self.lines if len(self.lines) >= number else [], timeout, f"{number} lines")

    def most_at_once(self) -> int:
        """How many of `start_and_end` ran at the same time, at most."""
        running = most = 0
        for line in self.lines:
            running += 1 if line.startswith("start ") else -1
            most = max(most, running)
        return most


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """An empty journal."""
    return Journal(tmp_path / "journal")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A user's project in a folder of its own."""
    return Project(tmp_path)
