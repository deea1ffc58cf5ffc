"""What happens to a job is told after the commit, once for each transaction. Without listeners no statement changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from kathikon_celery.job import Cause, State
from kathikon_celery.storage import Storage, finish, promote
from kathikon_celery.storage.events import Event
from kathikon_celery.storage.settle import JobEnd, TaskEnd, settle
from tests.storage.actors import Worker, new_job, the_job
from tests.support.statements import heard

PAST = datetime.now(timezone.utc) - timedelta(hours=1)
FUTURE = datetime.now(timezone.utc) + timedelta(hours=1)
WRITTEN = {"status": "SUCCESS", "result": "1", "traceback": None, "meta": None}


class Heard:
    """What a listener has heard: a list for each call."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, State, Cause | None]]] = []

    def __call__(self, events: Sequence[Event]) -> None:
        self.calls.append([(event.id, event.state, event.cause) for event in events])

    def take(self) -> list[list[tuple[str, State, Cause | None]]]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def events(storage: Storage) -> Iterator[Heard]:
    listener = Heard()
    stop = storage.database.events.listen(listener)
    yield listener
    stop()


@pytest.fixture
def worker(storage: Storage) -> Worker:
    return Worker(storage)


def test_a_job_that_returns(storage: Storage, worker: Worker, events: Heard) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    worker.start(job)
    worker.complete(job)
    states = [State.AVAILABLE, State.CLAIMED, State.RUNNING, State.COMPLETED]
    assert events.take() == [[("job", state, None)] for state in states]


def test_many_of_one_transaction_are_one_call(storage: Storage, worker: Worker, events: Heard) -> None:
    storage.insert_many([new_job("1"), new_job("2", scheduled_at=FUTURE), new_job("3", priority=5)])
    (call,) = events.take()
    assert sorted(call) == [("1", State.AVAILABLE, None), ("2", State.SCHEDULED, None), ("3", State.AVAILABLE, None)]
    first, second = worker.claim(2)
    assert events.take() == [[("3", State.CLAIMED, None), ("1", State.CLAIMED, None)]]
    storage.insert(new_job("4"))
    events.take()
    number, claimed = worker.complete_and_claim(first, second)
    assert (number, [job.id for job in claimed]) == (2, ["4"])
    told = [event for call in events.take() for event in call]
    assert sorted(told) == [("1", State.COMPLETED, None), ("3", State.COMPLETED, None), ("4", State.CLAIMED, None)]


ENDS: dict[str, tuple[Callable[[Storage, Worker, Any], object], State, Cause | None]] = {
    "ended": (lambda storage, worker, job: worker.end(job, State.DEAD), State.DEAD, Cause.RAISED),
    "given back": (lambda storage, worker, job: worker.give_back(job), State.AVAILABLE, None),
    "crashed": (lambda storage, worker, job: worker.give_back(job, crashed=True), State.AVAILABLE, None),
    "its result": (lambda storage, worker, job: worker.store(job), State.COMPLETED, None),
    "a retry": (lambda storage, worker, job: worker.publish_again(job, scheduled_at=FUTURE), State.SCHEDULED, None),
    "its node is lost": (lambda storage, worker, job: worker.die(), State.AVAILABLE, None),
    "settled": (
        lambda storage, worker, job: settle(
            storage.database,
            TaskEnd(ends=[JobEnd(task_id=job.id, hold=job.hold, state=State.COMPLETED, written=dict(WRITTEN))]),
            {},
        ),
        State.COMPLETED,
        None,
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_what_becomes_of_a_claimed_job(storage: Storage, worker: Worker, events: Heard, how: str) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    events.take()
    act, state, cause = ENDS[how]
    act(storage, worker, job)
    assert events.take() == [[("job", state, cause)]]
    assert the_job(storage).state is state
    if how != "its node is lost":
        act(storage, worker, job)  # under a hold that is over
        assert [call for call in events.take() if call] == []


def test_a_process_that_is_lost_too_often(storage: Storage, worker: Worker, events: Heard) -> None:
    storage.insert(new_job(max_attempts=1))
    job = worker.claim_one()
    events.take()
    worker.give_back(job, crashed=True)
    assert events.take() == [[("job", State.DEAD, Cause.LOST)]]


def test_time(storage: Storage, events: Heard) -> None:
    storage.insert(new_job("old", expires_at=PAST))
    storage.insert(new_job("due", scheduled_at=FUTURE))
    with storage.database.write() as connection:
        connection.exec_driver_sql("UPDATE kathikon_jobs SET available_at = inserted_at WHERE id = 'due'")
    events.take()
    promote.promote(storage.database)
    promote.expire(storage.database)
    assert events.take() == [[("due", State.AVAILABLE, None)], [("old", State.DISCARDED, Cause.EXPIRED)]]


def test_by_hand_and_from_afar(storage: Storage, events: Heard) -> None:
    for name in ("cancelled", "revoked"):
        storage.insert(new_job(name))
    job = the_job(storage, "cancelled")
    job.state, job.cause = State.CANCELLED, Cause.REVOKED
    events.take()
    storage.update(job)
    assert events.take() == [[("cancelled", State.CANCELLED, Cause.REVOKED)]]
    revoked = {"status": "REVOKED", "result": None, "traceback": None, "meta": None}
    storage.backend.store_alone("revoked", State.CANCELLED, reason="revoked", cause=Cause.REVOKED, **revoked)
    assert events.take() == [[("revoked", State.CANCELLED, Cause.REVOKED)]]


def test_what_is_rolled_back_has_not_happened(storage: Storage, worker: Worker, events: Heard) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    events.take()

    def end_in_vain() -> None:
        with storage.database.write() as connection:
            finish.completed(storage.database, connection, [job.hold])
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        end_in_vain()
    worker.complete(job)  # on the same connection
    assert events.take() == [[("job", State.COMPLETED, None)]]


def test_an_error_of_a_listener_is_its_own(storage: Storage, events: Heard, caplog: pytest.LogCaptureFixture) -> None:
    def fail(events: Sequence[Event]) -> None:
        raise RuntimeError("no history today")

    stop = storage.database.events.listen(fail)
    storage.insert(new_job())
    stop()
    storage.insert(new_job("2"))
    assert [call[0][0] for call in events.take()] == ["job", "2"]
    assert caplog.text.count("test_an_error_of_a_listener") == 1
    assert "RuntimeError: no history today" in caplog.text


def test_without_a_listener_the_statements_are_the_same(storage: Storage, worker: Worker) -> None:
    def work() -> list[str]:
        statements: list[str] = []
        with heard(lambda statement, _values, _many: statements.append(statement)):
            storage.insert(new_job("1"))
            storage.insert(new_job("2"))
            one, two = worker.claim(2)
            worker.start(one, two)
            worker.complete(one)
            worker.give_back(two, crashed=True)
            worker.die()
        storage.clear_jobs()
        return statements

    before = work()
    stop = storage.database.events.listen(lambda events: None)
    worker.id = Worker(storage).id
    with_listener = work()
    stop()
    worker.id = Worker(storage).id
    assert work() == before
    assert len(with_listener) >= len(before)
