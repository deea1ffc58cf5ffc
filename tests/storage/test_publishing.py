"""Publishing an id that the table knows already, in whatever state it is (the third invariant)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import Connection

from kathikon_celery.job import TERMINAL, State
from kathikon_celery.storage import Storage, Unavailable, insert
from tests.storage.actors import Worker, new_job, the_job

IN_AN_HOUR = datetime.now(timezone.utc) + timedelta(hours=1)


def published(storage: Storage) -> None:
    pass


def scheduled(storage: Storage) -> None:
    storage.insert(new_job(scheduled_at=IN_AN_HOUR))


def retryable(storage: Storage) -> None:
    storage.insert(new_job(state=State.RETRYABLE, scheduled_at=IN_AN_HOUR))


def claimed(storage: Storage) -> None:
    Worker(storage).claim_one()


def running(storage: Storage) -> None:
    worker = Worker(storage)
    worker.start(worker.claim_one(), acked=True)


def completed(storage: Storage) -> None:
    worker = Worker(storage)
    worker.store(worker.claim_one(), status="SUCCESS", result="1", meta="{}")


def dead(storage: Storage) -> None:
    worker = Worker(storage)
    worker.store(worker.claim_one(), State.DEAD, status="FAILURE", traceback="Traceback", reason="boom")


def cancelled(storage: Storage) -> None:
    worker = Worker(storage)
    worker.end(worker.claim_one(), State.CANCELLED)


def discarded(storage: Storage) -> None:
    worker = Worker(storage)
    worker.end(worker.claim_one(), State.DISCARDED)


REACH = [published, scheduled, retryable, claimed, running, completed, dead, cancelled, discarded]


@pytest.mark.parametrize("reach", REACH)
def test_it_waits_anew_as_one_row(storage: Storage, reach: Callable[[Storage], None]) -> None:
    storage.insert(new_job(task="old", queue="default"))
    reach(storage)
    before = the_job(storage)
    storage.insert(new_job(task="new", queue="mails", priority=5, body="new", max_attempts=7))
    (job,) = storage.all()
    assert (job.task, job.queue, job.priority, job.body, job.max_attempts) == ("new", "mails", 5, "new", 7)
    assert job.state is State.AVAILABLE
    assert job.seq == before.seq
    assert job.fence > before.fence
    assert job.errors == before.errors
    assert job.node_id is job.claimed_at is job.started_at is job.ended_at is None
    assert job.status is job.result is job.traceback is job.meta is job.reason is job.scheduled_at is None
    assert not job.acked
    assert (job.attempts == 0) == (before.state in TERMINAL or before.attempts == 0)
    assert Worker(storage).claim_one("mails").id == "job"


@pytest.mark.parametrize("reach", REACH)
def test_with_a_due_time_it_waits_for_that(storage: Storage, reach: Callable[[Storage], None]) -> None:
    storage.insert(new_job())
    reach(storage)
    storage.insert(new_job(scheduled_at=IN_AN_HOUR))
    job = the_job(storage)
    assert (job.state, job.scheduled_at, job.available_at) == (State.SCHEDULED, IN_AN_HOUR, IN_AN_HOUR)
    assert storage.claim("default") == []


@pytest.mark.parametrize("reach", [claimed, running])
def test_the_end_of_the_old_delivery_does_not_end_the_new_one(
    storage: Storage, reach: Callable[[Storage], None]
) -> None:
    storage.insert(new_job())
    reach(storage)
    old, worker = the_job(storage), Worker(storage)
    storage.insert(new_job())
    assert worker.complete(old) == worker.give_back(old, crashed=True) == worker.end(old, State.DEAD) == 0
    assert not worker.store(old)
    assert the_job(storage).state is State.AVAILABLE
    new = worker.claim_one()
    assert worker.complete(old) == 0
    assert worker.complete(new) == 1


def test_the_very_same_publication_again_is_no_second_one(storage: Storage, worker: Worker) -> None:
    """A producer whose connection was lost does not know whether its first try was committed."""
    job = new_job()
    storage.insert(job)
    first = the_job(storage).fence
    storage.insert(job)
    assert the_job(storage).fence == first
    held = worker.claim_one()
    storage.insert(job)
    assert the_job(storage).fence == held.fence
    worker.complete(held)
    storage.insert(job)
    storage.insert_many([job])
    assert the_job(storage).state is State.COMPLETED
    storage.insert(the_job(storage))  # as it was read: a publication of its own
    assert the_job(storage).state is State.AVAILABLE


def test_the_very_same_countdown_again_is_no_second_one(storage: Storage) -> None:
    job = new_job(scheduled_at=IN_AN_HOUR)
    storage.insert(job)
    first = the_job(storage)
    storage.insert(job)
    assert the_job(storage) == first
    assert first.state is State.SCHEDULED


def test_a_lost_answer_to_a_publication_runs_no_ended_job_again(
    storage: Storage, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit arrived, its answer did not, and meanwhile the job was done."""
    database, once = storage.database, storage.database.once

    @contextmanager
    def lossy(durable: bool = False) -> Iterator[Connection]:
        with once(durable) as connection:
            yield connection
        monkeypatch.setattr(database, "once", once)
        worker.complete(worker.claim_one())
        raise Unavailable("the answer was lost")

    monkeypatch.setattr(database, "once", lossy)
    storage.insert(new_job())
    assert the_job(storage).state is State.COMPLETED


class TestByItsOwnTask:
    """``self.retry`` and ``self.replace``."""

    def test_it_waits_for_its_retry_with_its_errors(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        worker.start(job)
        assert worker.publish_again(job, state=State.RETRYABLE, scheduled_at=IN_AN_HOUR)
        worker.note_retry(job, "boom")
        row = the_job(storage)
        assert (row.state, row.available_at, row.attempts, row.status) == (State.RETRYABLE, IN_AN_HOUR, 1, "RETRY")
        assert [(error["attempt"], error["reason"]) for error in row.errors] == [(1, "boom")]
        assert worker.complete(job) == 0

    def test_errors_and_attempts_grow(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        for attempt in range(1, 4):
            job = worker.claim_one()
            assert worker.publish_again(job, state=State.RETRYABLE)
            worker.note_retry(job, f"boom {attempt}")
        row = the_job(storage)
        assert row.attempts == 3
        assert [(error["attempt"], error["reason"]) for error in row.errors] == [
            (1, "boom 1"),
            (2, "boom 2"),
            (3, "boom 3"),
        ]

    def test_a_late_note_of_a_deleted_job_is_not_another_jobs(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        deleted = worker.claim_one()
        assert worker.publish_again(deleted, state=State.RETRYABLE)
        storage.delete(deleted.id)
        storage.insert(new_job("other"))
        deleted.seq = the_job(storage, "other").seq  # SQLite gives the number again by itself
        worker.note_retry(deleted, "boom")
        assert the_job(storage, "other").errors == []

    def test_the_same_message_again_is_another_publication(self, storage: Storage, worker: Worker) -> None:
        publication = new_job()
        storage.insert(publication)
        job = worker.claim_one()
        assert insert.insert(storage.database, publication, hold=job.hold)
        assert the_job(storage).state is State.AVAILABLE

    def test_an_early_acknowledged_task_may_retry(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        worker.start(job, acked=True)
        assert worker.publish_again(job)
        assert not the_job(storage).acked

    def test_a_zombie_publishes_nothing(self, storage: Storage, worker: Worker, other: Worker) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        worker.die()
        taken = other.claim_one()
        before = the_job(storage)
        assert not worker.publish_again(job, state=State.RETRYABLE, scheduled_at=IN_AN_HOUR)
        assert the_job(storage) == before
        assert other.complete(taken) == 1

    def test_a_zombie_makes_no_new_row_of_a_job_that_was_deleted(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        storage.delete("job")
        assert not worker.publish_again(job)
        assert storage.all() == []

    def test_a_job_that_was_cancelled_meanwhile_stays_so(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        worker.end(job, State.CANCELLED)
        assert not worker.publish_again(job)
        assert the_job(storage).state is State.CANCELLED

    def test_a_task_that_has_set_its_own_state_may_retry(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        worker.store(job, State.DEAD, status="FAILURE")
        assert worker.publish_again(job)
        assert the_job(storage).state is State.AVAILABLE
