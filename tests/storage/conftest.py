"""One storage on each kind of database, made once a run and emptied for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from sqlalchemy import update

from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from kathikon_celery.storage.names import key
from kathikon_celery.storage.tables import jobs
from tests.storage.actors import Worker
from tests.support.postgresql import new_database


@pytest.fixture(scope="session")
def _sqlite_storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    yield from _set_up(f"sqlite:///{tmp_path_factory.mktemp('storage') / 'kathikon.db'}")


@pytest.fixture(scope="session")
def _postgresql_storage(postgresql_server_url: str) -> Iterator[Storage]:
    with new_database(postgresql_server_url) as url:
        yield from _set_up(url)


def _set_up(url: str) -> Iterator[Storage]:
    with closing(Storage(url, Settings())) as storage:
        storage.setup()
        yield storage


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def storage(request: pytest.FixtureRequest) -> Storage:
    """An empty storage on each kind of database in turn."""
    chosen: Storage = request.getfixturevalue(f"_{request.param}_storage")
    chosen.reset()
    return chosen


@pytest.fixture
def postgresql_storage(_postgresql_storage: Storage) -> Iterator[Storage]:
    """An empty storage on PostgreSQL, for what SQLite has not: such as connections that are lost."""
    _postgresql_storage.reset()
    yield _postgresql_storage
    _postgresql_storage.close()


@pytest.fixture
def worker(storage: Storage) -> Worker:
    """A node of it."""
    return Worker(storage)


@pytest.fixture
def other(storage: Storage) -> Worker:
    """Another one."""
    return Worker(storage)


@pytest.fixture
def set_row(storage: Storage) -> Callable[..., None]:
    """Write columns of a job's row past all rules."""

    def write(job_id: str = "job", **columns: object) -> None:
        with storage.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == key(job_id)).values(columns))

    return write
