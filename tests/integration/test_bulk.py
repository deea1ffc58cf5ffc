"""Many tasks in few transactions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from threading import Thread
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from kathikon_celery import bulk
from kathikon_celery.job import State
from kathikon_celery.storage import Storage
from tests.integration.conftest import Jobs, Workers
from tests.support import apps

CHUNK = 3


@pytest.fixture
def jobs(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """An empty table, written in chunks of three."""
    jobs = Jobs(app)
    jobs.storage.clear_jobs()
    monkeypatch.setattr(jobs.storage, "settings", replace(jobs.storage.settings, insert_many_chunk_size=CHUNK))
    yield jobs
    jobs.storage.clear_jobs()


def test_what_is_sent_is_written_in_chunks(jobs: Jobs) -> None:
    written = []
    with bulk():
        for number in range(8):
            apps.add.delay(number, 1)
            written.append(len(jobs.storage.all()))
    assert written == [0, 0, 3, 3, 3, 6, 6, 6]
    assert [(job.task, job.state) for job in jobs.storage.all()] == [(apps.add.name, State.AVAILABLE)] * 8
    apps.add.delay(1, 1)
    assert len(jobs.storage.all()) == 9


def test_a_chunk_is_one_transaction(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    transactions = []
    write = jobs.storage.database.write

    def counted(**options: Any) -> Any:
        transactions.append(options)
        return write(**options)

    monkeypatch.setattr(jobs.storage.database, "write", counted)
    with bulk():
        for _ in range(7):
            apps.add.delay(1, 1)
    assert transactions == [{"durable": True}] * 3


def test_options_are_kept(jobs: Jobs) -> None:
    with bulk():
        later = apps.add.apply_async((1, 1), countdown=3600, priority=7, queue="elsewhere")
    job = jobs.of(later)
    assert (job.state, job.priority, job.queue) == (State.SCHEDULED, 7, "elsewhere")
    assert job.scheduled_at is not None
    assert job.scheduled_at - job.inserted_at > timedelta(seconds=3000)


def test_an_error_loses_nothing(jobs: Jobs) -> None:
    def send_and_fail() -> None:
        with bulk():
            apps.add.delay(1, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        send_and_fail()
    assert len(jobs.storage.all()) == 1


def test_a_block_in_a_block_is_one(jobs: Jobs) -> None:
    with bulk():
        with bulk():
            apps.add.delay(1, 1)
        assert jobs.storage.all() == []
    assert len(jobs.storage.all()) == 1


def test_other_threads_send_at_once(jobs: Jobs) -> None:
    with bulk():
        thread = Thread(target=apps.add.delay, args=(1, 1))
        thread.start()
        thread.join()
        assert len(jobs.storage.all()) == 1


def test_an_id_sent_twice_is_one_job(jobs: Jobs) -> None:
    with bulk():
        for number in (1, 2):
            apps.add.apply_async((number, 0), task_id="twice")
    (job,) = jobs.storage.all()
    assert job.id == "twice"
    assert "[2, 0]" in job.body


def test_what_the_database_refuses_is_an_error_where_it_is_sent(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    insert_many = Storage.insert_many
    refusals = iter([OSError("refused")])

    def refusing(self: Storage, batch: Any) -> None:
        for refusal in refusals:
            raise refusal
        insert_many(self, batch)

    monkeypatch.setattr(Storage, "insert_many", refusing)
    with bulk():
        sent = [apps.add.delay(number, 1) for number in range(CHUNK - 1)]
        with pytest.raises(OSError, match="refused"):
            apps.add.apply_async((1, 1), task_id="third", retry=False)
    assert {job.id for job in jobs.storage.all()} == {"third", *(result.id for result in sent)}


def test_workers_run_it_all(app: Celery, jobs: Jobs, shared_workers: Workers) -> None:
    shared_workers(concurrency=2)
    with bulk():
        results = [apps.add.delay(number, 1) for number in range(50)]
        parts = group(apps.add.s(number, 2) for number in range(20)).delay()
        counted = chord(apps.add.s(number, number) for number in range(5))(apps.total.s())
        chained = chain(apps.add.s(1, 1), apps.add.s(3)).delay()
    assert [result.get(timeout=60) for result in results] == [number + 1 for number in range(50)]
    assert parts.get(timeout=60) == [number + 2 for number in range(20)]
    assert (counted.get(timeout=60), chained.get(timeout=60)) == (20, 5)
