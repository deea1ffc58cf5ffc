"""Unique jobs: a key belongs to one job that is there, in each mode, on each kind of database."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from threading import Barrier, Thread
from typing import Any

import pytest

from kathikon_celery.job import Cause, Job, State, UniqueKey, Use
from kathikon_celery.storage import Storage, insert
from kathikon_celery.storage import unique as unique_jobs
from kathikon_celery.storage.errors import NotUnique, Unavailable
from tests.storage.actors import Worker, new_job, the_job


def unique(job_id: str, while_: str = "active", on_conflict: str = "return", **fields: object) -> Job:
    within = fields.pop("within", None)
    answers = fields.pop("answers", True)
    key = UniqueKey("key", while_, within, on_conflict, bool(answers))  # type: ignore[arg-type]
    return new_job(job_id, unique=key, **fields)


def instead_of(storage: Storage, job: Job) -> str | None:
    """Publish *job*; return the id of the job that is there instead."""
    storage.insert(job)
    return job.duplicate_of


@pytest.mark.parametrize("while_", ["waiting", "active", "kept"])
def test_the_second_is_not_written(storage: Storage, while_: str) -> None:
    assert instead_of(storage, unique("job", while_)) is None
    assert instead_of(storage, unique("other", while_)) == "job"
    assert [job.id for job in storage.all()] == ["job"]


@pytest.mark.parametrize(
    ("while_", "claimed", "completed"), [("waiting", None, None), ("active", "job", None), ("kept", "job", "job")]
)
def test_how_long_the_key_is_held(
    storage: Storage, worker: Worker, while_: str, claimed: str | None, completed: str | None
) -> None:
    storage.insert(unique("job", while_))
    job = worker.claim_one()
    assert instead_of(storage, unique("while it is claimed", while_)) == claimed
    worker.complete(job)
    storage.delete("while it is claimed")
    assert instead_of(storage, unique("then", while_)) == completed
    storage.delete(["job", "then"])
    assert instead_of(storage, unique("last", while_)) is None


@pytest.mark.parametrize("state", [State.SCHEDULED, State.RETRYABLE])
def test_a_job_with_a_due_time_waits_as_well(storage: Storage, state: State) -> None:
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    storage.insert(unique("job", "waiting", scheduled_at=later, state=state))
    assert instead_of(storage, unique("other", "waiting")) == "job"
    assert instead_of(storage, unique("another", "waiting", scheduled_at=later)) == "job"


def test_two_keys_are_two_jobs(storage: Storage) -> None:
    storage.insert(unique("job"))
    assert instead_of(storage, new_job("other", unique=UniqueKey("another key", "active"))) is None


def test_raise(storage: Storage) -> None:
    storage.insert(unique("job"))
    with pytest.raises(NotUnique, match="job job has the same unique key") as caught:
        storage.insert(unique("other", on_conflict="raise"))
    assert caught.value.job_id == "job"
    assert [job.id for job in storage.all()] == ["job"]


@pytest.mark.parametrize(("on_conflict", "answers"), [("drop", True), ("return", False), ("raise", False)])
def test_what_cannot_be_answered_is_discarded(storage: Storage, on_conflict: str, answers: bool) -> None:
    storage.insert(unique("job"))
    assert instead_of(storage, unique("other", on_conflict=on_conflict, answers=answers)) is None
    other = the_job(storage, "other")
    assert (other.state, other.cause, other.status) == (State.DISCARDED, Cause.DUPLICATE, None)
    assert other.reason == "job job has the same unique key"
    assert other.ended_at is not None
    assert the_job(storage).state is State.AVAILABLE


def test_replace(storage: Storage, worker: Worker) -> None:
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    storage.insert(unique("job", "waiting", "replace", scheduled_at=later))
    assert instead_of(storage, unique("newer", "waiting", "replace")) is None
    job = the_job(storage)
    assert (job.state, job.cause) == (State.DISCARDED, Cause.REPLACED)
    assert job.reason == "job newer has the same unique key, and is newer"
    assert instead_of(storage, unique("newest", "waiting", "replace")) is None
    assert [one.id for one in worker.claim()] == ["newest"]
    assert instead_of(storage, unique("beside the running one", "waiting", "replace")) is None
    assert the_job(storage, "newest").state is State.CLAIMED


@pytest.mark.parametrize("while_", ["waiting", "active", "kept"])
def test_within(storage: Storage, set_row: Callable[..., None], while_: str) -> None:
    storage.insert(unique("job", while_, within=50))
    assert instead_of(storage, unique("soon", while_, within=50)) == "job"
    set_row("job", inserted_at=datetime.now(timezone.utc) - timedelta(seconds=100))
    assert instead_of(storage, unique("other", while_, within=200)) == "job"
    assert instead_of(storage, unique("later", while_, within=50)) is None
    assert instead_of(storage, unique("last", while_, within=50)) == "later"
    assert the_job(storage).state is State.AVAILABLE


def test_no_job_is_written_without_its_key(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many processes send the key at once, and each time another one is quicker."""
    monkeypatch.setattr(unique_jobs, "TRIES", 1)
    storage.insert(unique("job", "waiting", "replace"))
    with pytest.raises(Unavailable, match=r"^the unique key of job newer was given away 1 times while it was tried$"):
        storage.insert(unique("newer", "waiting", "replace"))
    assert [(job.id, job.state) for job in storage.all()] == [("job", State.AVAILABLE)]


def test_a_job_that_has_expired_keeps_nobody_out(storage: Storage) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=60)
    storage.insert(unique("expires later", expires_at=soon))
    assert instead_of(storage, unique("second")) == "expires later"
    assert the_job(storage, "expires later").state is State.AVAILABLE
    expired = unique("expired", expires_at=soon - timedelta(seconds=120))
    expired.unique = UniqueKey("other", "active", answers=True)
    third = unique("third")
    third.unique = expired.unique
    storage.insert(expired)
    assert instead_of(storage, third) is None
    gone = the_job(storage, "expired")
    assert (gone.state, gone.cause) == (State.DISCARDED, "expired")


@pytest.mark.parametrize("fields", [{"unique": UniqueKey("k", "active")}, {"limits": (Use("k", "k", concurrency=1),)}])
def test_an_id_that_is_sent_again_while_its_job_runs_is_that_job(
    storage: Storage, worker: Worker, other: Worker, fields: dict[str, Any]
) -> None:
    storage.insert(new_job("job", **fields))
    job = worker.claim_one()
    storage.insert(new_job("job", **fields))
    storage.insert_many([new_job("job", **fields)])
    assert other.claim(10) == []
    assert worker.complete(job) == 1
    assert the_job(storage).state is State.COMPLETED
    storage.insert(new_job("job", **fields))
    assert other.claim_one().id == "job"


def test_a_retry_of_its_own_is_no_second_job(storage: Storage, worker: Worker) -> None:
    storage.insert(unique("job"))
    job = worker.claim_one()
    assert worker.publish_as(job, unique("job", state=State.RETRYABLE))
    assert the_job(storage).state is State.AVAILABLE
    assert instead_of(storage, unique("other")) == "job"


def test_who_waits_again_has_its_waiting_key_no_longer(storage: Storage, worker: Worker) -> None:
    storage.insert(unique("job", "waiting"))
    job = worker.claim_one()
    storage.insert(unique("other", "waiting"))
    assert worker.give_back(job) == 1
    assert {job.id: job.state for job in storage.all()} == {"job": State.AVAILABLE, "other": State.AVAILABLE}


@pytest.mark.parametrize("while_", ["waiting", "active"])
def test_what_is_retried_by_hand_is_unique_no_longer(storage: Storage, while_: str) -> None:
    storage.insert(unique("job", while_))
    job = the_job(storage)
    job.state = State.CANCELLED
    storage.update(job)
    storage.insert(unique("other", while_))
    job = the_job(storage)
    job.state = State.AVAILABLE
    storage.update(job)
    assert {job.id: job.state for job in storage.all()} == {"job": State.AVAILABLE, "other": State.AVAILABLE}
    assert instead_of(storage, unique("another", while_)) == "other"


def test_the_same_job_again(storage: Storage, worker: Worker) -> None:
    first = unique("job")
    storage.insert(first)
    storage.insert(first)  # a repetition, as after a lost connection
    assert instead_of(storage, unique("job")) is None  # the same id from elsewhere
    worker.complete(worker.claim_one())
    assert instead_of(storage, unique("job")) is None
    assert [job.state for job in storage.all()] == [State.AVAILABLE]


def test_in_a_batch(storage: Storage) -> None:
    batch = [unique("job"), unique("second"), new_job("plain"), unique("third", answers=False)]
    storage.insert_many(batch)
    assert [job.duplicate_of for job in batch] == [None, "job", None, None]
    states = {job.id: job.state for job in storage.all()}
    assert states == {"job": State.AVAILABLE, "plain": State.AVAILABLE, "third": State.DISCARDED}


def test_of_many_at_once_one_is_written(storage: Storage) -> None:
    """The losers wait for the winner's transaction, and answer with its id."""
    batch, start = [unique(f"job-{number}") for number in range(8)], Barrier(8)

    def publish(job: Job) -> None:
        start.wait()
        insert.insert(storage.database, job)

    threads = [Thread(target=publish, args=(job,)) for job in batch]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (written,) = storage.all()
    assert {job.duplicate_of for job in batch} == {None, written.id}
    assert [job.id for job in batch if job.duplicate_of is None] == [written.id]


def test_a_copy_is_not_unique(storage: Storage) -> None:
    storage.insert(unique("job"))
    assert the_job(storage).unique is None
