"""Promotion, the next due time, and expiry."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import update

from kathikon_celery.job import State
from kathikon_celery.storage import Storage
from kathikon_celery.storage.tables import jobs
from tests.storage.actors import Worker, new_job, the_job


def moment(seconds: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


def test_nothing_waits(storage: Storage) -> None:
    storage.insert(new_job())
    assert storage.next_due() is None
    assert storage.promote_scheduled() == 0


@pytest.mark.parametrize("state", [State.AVAILABLE, State.RETRYABLE])
def test_next_due_is_the_earliest(storage: Storage, state: State) -> None:
    for seconds in (3000, 1000, 2000):
        storage.insert(new_job(str(seconds), state=state, scheduled_at=moment(seconds)))
    due = storage.next_due()
    assert due is not None
    assert due == pytest.approx(1000, abs=60)


def test_the_last_moment_that_python_knows_is_far_away(storage: Storage) -> None:
    storage.insert(new_job(scheduled_at=datetime.max.replace(tzinfo=timezone.utc)))
    due = storage.next_due()
    assert due is not None
    assert due > 1e11
    assert storage.promote_scheduled() == 0


def test_what_is_due_becomes_available_together_and_priority_decides(
    storage: Storage, worker: Worker, set_row: Callable[..., None]
) -> None:
    for number in range(10):
        state = State.RETRYABLE if number % 2 else State.SCHEDULED
        storage.insert(new_job(str(number), state=state, priority=number, scheduled_at=moment(100)))
        set_row(str(number), available_at=moment(-10 - number))
    storage.insert(new_job("later", scheduled_at=moment(100)))
    assert (storage.next_due() or 0) < -18
    assert storage.promote_scheduled() == 10
    assert [job.id for job in worker.claim(100)] == [str(number) for number in reversed(range(10))]
    assert the_job(storage, "later").state is State.SCHEDULED


def test_a_limit_takes_the_longest_overdue(storage: Storage, set_row: Callable[..., None]) -> None:
    for number in range(10):
        storage.insert(new_job(str(number), scheduled_at=moment(100)))
        set_row(str(number), available_at=moment(-100 - number))
    assert storage.promote_scheduled(limit=3) == 3
    assert {job.id for job in storage.all(state=State.AVAILABLE)} == {"7", "8", "9"}
    assert storage.promote_scheduled() == 7


def test_promotion_keeps_the_due_time_as_the_place_in_the_queue(
    storage: Storage, worker: Worker, set_row: Callable[..., None]
) -> None:
    storage.insert(new_job("due", scheduled_at=moment(100)))
    set_row("due", available_at=moment(-5))
    storage.insert(new_job("new"))
    storage.promote_scheduled()
    assert [job.id for job in worker.claim(2)] == ["due", "new"]


def test_a_thousand_that_are_due_at_once_become_available_at_once(storage: Storage, worker: Worker) -> None:
    storage.insert_many([new_job(str(number), priority=number, scheduled_at=moment(100)) for number in range(1000)])
    with storage.database.write() as connection:
        connection.execute(update(jobs).values(available_at=moment(-1)))
    assert storage.promote_scheduled() == 1000
    assert worker.claim_one().priority == 999


def test_a_promotion_leaves_the_fence_alone(storage: Storage, set_row: Callable[..., None]) -> None:
    storage.insert(new_job(scheduled_at=moment(100)))
    set_row(available_at=moment(-1))
    fence = the_job(storage).fence
    storage.promote_scheduled()
    assert (the_job(storage).state, the_job(storage).fence) == (State.AVAILABLE, fence)


@pytest.mark.parametrize("state", State)
def test_only_what_waits_expires(storage: Storage, set_row: Callable[..., None], state: State) -> None:
    storage.insert(new_job(expires_at=moment(-1)))
    storage.insert(new_job("fresh", expires_at=moment(100)))
    storage.insert(new_job("for ever"))
    for job_id in ("job", "fresh", "for ever"):
        set_row(job_id, state=state.value)
    waits = state in (State.SCHEDULED, State.RETRYABLE, State.AVAILABLE, State.BLOCKED)
    assert storage.discard_expired() == waits
    job = the_job(storage)
    if waits:
        assert (job.state, job.reason, job.status) == (State.DISCARDED, "expired", None)  # a worker tells of it
        assert job.ended_at == job.discarded_at
        assert job.ended_at is not None
    else:
        assert (job.state, job.reason) == (state, None)
    assert the_job(storage, "fresh").state is the_job(storage, "for ever").state is state
