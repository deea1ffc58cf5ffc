"""What is on disk when a call returns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from kathikon_celery.job import Job, State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage, Unavailable, claim
from kathikon_celery.storage.dialects.sqlite import FLUSHES
from kathikon_celery.storage.engine.database import Database
from tests.storage.actors import Worker, new_job, the_job
from tests.support.statements import counted, heard

#: What waits for the disk after a publication that did not.
FLUSH = "pg_logical_emit_message"


@pytest.mark.postgresql
@pytest.mark.parametrize("durability", ["disk", "server"])
def test_durability_of_postgresql(postgresql_url: str, durability: str) -> None:
    database = Database(postgresql_url, publish_durability=durability, worker_durability=durability)
    for durable in (True, False):
        with database.write(durable=durable) as connection:
            found = connection.execute(text("SHOW synchronous_commit")).scalar()
            assert found == {"disk": "on", "server": "off"}[durability]
    database.close()


@pytest.mark.skipif(not FLUSHES, reason="SQLite flushes by itself here")
@pytest.mark.parametrize("durability", ["disk", "server"])
def test_durability_of_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    """What is to be on disk is flushed after its commit, while others write already."""
    url = f"sqlite:///{tmp_path}/kathikon.db"
    other = Storage(url, Settings(publish_durability="server"))
    other.setup()
    database = Database(url, publish_durability=durability)
    flushed: list[str] = []

    def flush(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        other.insert(new_job())  # would wait for ever while the lock is held

    monkeypatch.setattr(os, "fdatasync", flush)
    with database.write(durable=True) as connection:
        connection.execute(text("DELETE FROM kathikon_jobs"))
    assert flushed == ([f"{tmp_path}/kathikon.db-wal"] if durability == "disk" else [])
    with database.write() as connection:
        assert connection.execute(text("SELECT count(*) FROM kathikon_jobs")).scalar() == len(flushed)
    assert len(flushed) == (durability == "disk")
    database.close()
    other.close()


@pytest.mark.skipif(not FLUSHES, reason="SQLite flushes by itself here")
def test_a_commit_that_fails_is_not_flushed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fdatasync", pytest.fail)
    with pytest.raises(RuntimeError), storage.database.write(durable=True):
        raise RuntimeError


def test_a_log_that_is_gone_is_on_disk_already(tmp_path: Path) -> None:
    storage = Storage(f"sqlite:///{tmp_path}/kathikon.db")
    storage.setup()
    storage.close()  # the last connection writes the log to the database, and deletes it
    assert not (tmp_path / "kathikon.db-wal").exists()
    storage.database.dialect.flush({})


@pytest.mark.postgresql
class TestPublicationThatWakes:
    """On PostgreSQL the node that is woken begins while the publication is on its way to the disk."""

    @pytest.fixture
    def storage(self, request: pytest.FixtureRequest, postgresql_url: str) -> Iterator[Storage]:
        settings = Settings(publish_durability=getattr(request, "param", "disk"))
        with closing(Storage(postgresql_url, settings)) as storage:
            storage.setup()
            yield storage

    @pytest.mark.parametrize(("storage", "flushes"), [("disk", [True]), ("server", [])], indirect=["storage"])
    def test_it_waits_for_the_disk_by_itself(self, storage: Storage, flushes: list[bool]) -> None:
        Worker(storage).wait_for("default")
        with counted() as statements:
            storage.insert(new_job())
        assert [FLUSH in one for one in statements] == [False, *flushes]

    def test_another_one_is_one_statement(self, storage: Storage) -> None:
        with counted() as statements:
            storage.insert(new_job())
        assert [FLUSH in one for one in statements] == [False]

    def test_what_was_committed_before_its_connection_was_lost_is_flushed(self, storage: Storage) -> None:
        """By the second try, which cannot know how far the first one came."""
        Worker(storage).wait_for("default")
        flushes: list[bool] = []

        def lose(statement: str, _values: Any, _many: bool) -> None:
            flushes.append(FLUSH in statement)
            if flushes == [False, True]:
                raise Unavailable("the connection was lost")

        with heard(lose):
            storage.insert(new_job())
        assert flushes == [False, True] * 2


@pytest.mark.postgresql
class TestCrashOfTheServer:
    @pytest.fixture
    def storage(self, own_postgresql_server: Any) -> Iterator[Storage]:
        """On a server that writes nothing out by itself."""
        with closing(Storage(own_postgresql_server.url, Settings())) as storage:
            storage.setup()
            with storage.database.read() as connection:
                connection.execute(text("ALTER SYSTEM SET wal_writer_delay = '10s'"))
                connection.execute(text("SELECT pg_reload_conf()"))
            yield storage

    def test_a_publication_that_wakes_is_on_disk_when_it_returns(
        self, storage: Storage, own_postgresql_server: Any
    ) -> None:
        Worker(storage).wait_for("default")
        storage.insert(new_job())
        own_postgresql_server.stop("immediate")
        own_postgresql_server.start()
        assert the_job(storage).state is State.AVAILABLE

    def test_whoever_claimed_what_it_took_has_no_claim_on_another_job(
        self, storage: Storage, own_postgresql_server: Any
    ) -> None:
        """Though that gets the same number: the sequence's next step was not on disk either."""
        worker = Worker(storage)
        with storage.database.read() as connection:
            connection.execute(text("CHECKPOINT"))  # after which the sequence writes its next step
        Worker(storage).wait_for("default")
        held: list[Job] = []

        def crash(statement: str, _values: Any, _many: bool) -> None:
            if FLUSH in statement and not held:
                held.append(worker.claim_one())
                own_postgresql_server.stop("immediate")
                own_postgresql_server.start()

        with heard(crash):
            storage.insert(new_job())
        (job,) = storage.all()
        assert job.seq == held[0].seq
        with storage.database.once() as connection:
            assert claim.claim_again(storage.database, connection, [held[0].hold], worker.id) == 0
        assert worker.complete(held[0]) == 0
        assert the_job(storage).state is State.AVAILABLE
