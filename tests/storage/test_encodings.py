"""Databases whose encoding lacks letters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from sqlalchemy import NullPool, create_engine, make_url

from kathikon_celery.job import State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from tests.storage.actors import Worker, new_job, the_job

pytestmark = pytest.mark.postgresql


@pytest.fixture(scope="module")
def latin(postgresql_server_url: str) -> Iterator[Storage]:
    """Storage whose text columns lack most letters."""
    engine = create_engine(postgresql_server_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    name = "kathikon_in_latin1"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name}")
        connection.exec_driver_sql(
            f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        )
    with closing(Storage(make_url(postgresql_server_url).set(database=name), Settings())) as storage:
        storage.setup()
        yield storage
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_failure_with_letters_that_the_database_lacks_is_stored(latin: Storage) -> None:
    latin.insert(new_job())
    worker = Worker(latin)
    job = worker.claim_one()
    traceback = "ValueError: \N{HIRAGANA LETTER A}"
    assert worker.store(job, State.DEAD, status="FAILURE", traceback=traceback, reason="\N{HIRAGANA LETTER A}")
    ended = the_job(latin)
    assert (ended.state, ended.status) == (State.DEAD, "FAILURE")
    assert (ended.traceback, ended.reason) == (traceback, "\N{HIRAGANA LETTER A}")
