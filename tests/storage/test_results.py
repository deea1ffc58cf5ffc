"""Results on the rows of their jobs, results without a job, and groups."""

from __future__ import annotations

from typing import Any

import pytest

from kathikon_celery.job import State
from kathikon_celery.storage import Storage, finish, prune, result_listeners, results
from kathikon_celery.storage.names import printable
from tests.storage.actors import Worker, new_job, the_job


def store_alone(storage: Storage, state: State | None, job_id: str = "job", **fields: Any) -> None:
    written = {"status": "SUCCESS", "result": '"alone"', "traceback": None, "meta": "{}", **fields}
    results.store_alone(storage.database, job_id, state, **written)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.COMPLETED, "SUCCESS"),
        (State.DEAD, "FAILURE"),
        (State.CANCELLED, "REVOKED"),
        (State.DISCARDED, "REVOKED"),
    ],
)
def test_a_result_ends_its_job(storage: Storage, worker: Worker, state: State, status: str) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    assert worker.store(job, state, status=status, result='"r"', traceback="t", meta='{"a":1}', reason="why")
    row = the_job(storage)
    assert (row.state, row.status, row.result, row.traceback, row.meta) == (state, status, '"r"', "t", '{"a":1}')
    assert (row.reason, row.node_id) == ("why", None)
    assert row.ended_at is not None
    assert [error["reason"] for error in row.errors] == (["why"] if state is State.DEAD else [])
    assert row.last_error == "why"


def test_many_results_at_once(storage: Storage, worker: Worker, other: Worker) -> None:
    ids = ["a", "b", "c", "moved on"]
    for job_id in ids:
        storage.insert(new_job(job_id))
    claimed = {job.id: job for job in worker.claim(4)}
    worker.give_back(claimed["moved on"])
    other.claim_one()
    taken = the_job(storage, "moved on")
    ends = {
        job.hold: {
            "status": "SUCCESS",
            "result": f'"{job_id}"',
            "traceback": None,
            "meta": "{}" if job_id == "b" else None,
        }
        for job_id, job in claimed.items()
    }
    for changed in (3, 0):
        with storage.database.write() as connection:
            assert results.end_many(storage.database, connection, ends) == changed
    for job_id in ids[:3]:
        row = the_job(storage, job_id)
        assert (row.state, row.status, row.result, row.node_id) == (State.COMPLETED, "SUCCESS", f'"{job_id}"', None)
        assert row.meta == ("{}" if job_id == "b" else None)
    assert the_job(storage, "moved on") == taken


def test_a_start_and_progress_do_not_end_it(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    assert worker.store(job, State.RUNNING, status="STARTED", result="{}")
    row = the_job(storage)
    assert (row.state, row.status, row.node_id) == (State.RUNNING, "STARTED", worker.id)
    assert row.started_at is not None
    assert worker.store(job, None, status="PROGRESS", result='{"done":1}')
    row = the_job(storage)
    assert (row.state, row.status, row.result) == (State.RUNNING, "PROGRESS", '{"done":1}')
    assert worker.complete(job) == 1


def test_the_acknowledgement_after_the_result_changes_nothing(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    worker.store(job)
    before = the_job(storage)
    assert worker.complete(job) == 0
    assert the_job(storage) == before


def test_a_retry_that_runs_already_gets_its_error_and_not_its_word(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    worker.publish_again(job)
    again = worker.claim_one()
    worker.store(again, None, status="PROGRESS")
    worker.note_retry(job, "boom")
    row = the_job(storage)
    assert row.status == "PROGRESS"
    assert [(error["attempt"], error["reason"]) for error in row.errors] == [(1, "boom")]
    assert worker.complete(again) == 1


@pytest.mark.parametrize(
    "text", ["a\0b", "\ud800 half a pair", "\udcff from a file name", "emoji \N{SNAKE}", "ünïcödé"]
)
def test_texts_that_a_database_does_not_keep_are_escaped(storage: Storage, worker: Worker, text: str) -> None:
    storage.insert_many([new_job("1", task=text), new_job("2", task=text)])
    one, two = worker.claim(2)
    assert worker.store(one, State.DEAD, status=text, result=text, traceback=text, meta=text, reason=text)
    assert worker.end(two, State.DEAD, text, text)
    store_alone(storage, None, "3", status=text, traceback=text)
    for job_id in ("1", "2"):
        row = the_job(storage, job_id)
        assert row.task == row.traceback == row.reason == printable(text)
        assert row.errors[0]["reason"] == text
    assert the_job(storage, "3").status == printable(text)


class TestAlone:
    """A result under an id that no delivery names: of a task that ran elsewhere, or was never a job."""

    @pytest.mark.parametrize("state", [None, State.COMPLETED, State.DEAD])
    def test_a_row_of_its_own(self, storage: Storage, worker: Worker, state: State | None) -> None:
        store_alone(storage, state, status="WORD")
        job = the_job(storage)
        assert (job.state, job.queue, job.status, job.result) == (state or State.COMPLETED, None, "WORD", '"alone"')
        assert job.ended_at is not None
        assert worker.claim() == []
        assert prune.prune(storage.database, {job.state: -1.0}) == 1

    def test_it_may_be_written_over(self, storage: Storage) -> None:
        store_alone(storage, None, status="PROGRESS")
        store_alone(storage, State.DEAD, status="FAILURE", result="2")
        store_alone(storage, State.COMPLETED, status="SUCCESS", result="3")
        job = the_job(storage)
        assert (job.state, job.status, job.result) == (State.COMPLETED, "SUCCESS", "3")

    def test_it_becomes_a_job_that_is_published(self, storage: Storage, worker: Worker) -> None:
        store_alone(storage, State.COMPLETED)
        storage.insert(new_job())
        job = worker.claim_one()
        assert the_job(storage).result is None
        assert worker.complete(job) == 1

    def test_of_a_job_that_somebody_holds_it_is_no_end(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        worker.start(job)
        store_alone(storage, State.DEAD, status="FAILURE")
        row = the_job(storage)
        assert (row.state, row.status, row.node_id, row.ended_at) == (State.RUNNING, "FAILURE", worker.id, None)
        assert worker.complete(job) == 1

    @pytest.mark.parametrize("state", [None, State.DEAD])
    def test_a_success_stays(self, storage: Storage, worker: Worker, state: State | None) -> None:
        storage.insert(new_job("queued"))
        worker.store(worker.claim_one(), State.COMPLETED)
        store_alone(storage, State.COMPLETED, "alone")
        for job_id in ("queued", "alone"):
            before = the_job(storage, job_id)
            store_alone(storage, state, job_id, status="WORD")
            assert the_job(storage, job_id) == before

    def test_news_of_a_job_that_waits(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        store_alone(storage, None, status="SENT")
        row = the_job(storage)
        assert (row.state, row.status, row.result) == (State.AVAILABLE, "SENT", '"alone"')
        job = worker.claim_one()
        assert the_job(storage).status == "SENT"
        worker.store(job, State.DEAD, status="FAILURE")
        store_alone(storage, None, status="SENT")
        assert the_job(storage).status == "FAILURE"

    def test_a_job_that_waits_is_not_completed_by_it(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        before = the_job(storage)
        store_alone(storage, State.COMPLETED)
        assert the_job(storage) == before
        assert worker.claim_one()

    def test_a_retry_is_told_until_the_next_word(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        first = worker.claim_one()
        assert worker.publish_as(first, new_job())
        worker.note_retry(first, "not yet")
        second = worker.claim_one()
        assert the_job(storage).status == "RETRY"
        worker.store(second, State.COMPLETED)
        assert the_job(storage).status == "SUCCESS"

    @pytest.mark.parametrize(
        ("ends", "word"), [(State.COMPLETED, "SUCCESS"), (State.DEAD, "FAILURE")], ids=["returned", "raised"]
    )
    def test_a_result_that_follows_the_acknowledgement(
        self, storage: Storage, worker: Worker, ends: State, word: str
    ) -> None:
        storage.insert_many([new_job(), new_job("stored before")])
        first, second = worker.claim(2)
        store_alone(storage, ends, second.id, status=word)
        assert worker.complete(first) == worker.complete(second) == 1
        with storage.database.write() as connection:
            results.await_results(connection, [first.hold, second.hold])
        waits = the_job(storage)
        assert (waits.state, waits.status) == (State.COMPLETED, "PENDING")
        assert not result_listeners.is_ready(waits)
        store_alone(storage, ends, status=word)
        for job_id in ("job", "stored before"):
            row = the_job(storage, job_id)
            assert (row.state, row.status, row.result) == (State.COMPLETED, word, '"alone"')

    @pytest.mark.parametrize("earlier", ["RETRY", "STARTED"])
    def test_a_failure_after_an_end_without_a_result(self, storage: Storage, worker: Worker, earlier: str) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        worker.store(job, None, status=earlier)
        assert worker.complete(job) == 1
        completed = the_job(storage)
        assert (completed.state, completed.status) == (State.COMPLETED, None)
        store_alone(storage, State.CANCELLED, status="REVOKED")
        assert the_job(storage) == completed
        store_alone(storage, State.DEAD, status="FAILURE", result="2")
        row = the_job(storage)
        assert (row.state, row.status, row.result) == (State.COMPLETED, "FAILURE", "2")
        assert (row.ended_at, row.reason) == (completed.ended_at, None)


class TestForgetting:
    def test_a_job_stays_without_its_result(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        worker.store(worker.claim_one(), State.COMPLETED, traceback="t", meta="{}")
        results.forget(storage.database, "job")
        row = the_job(storage)
        assert (row.state, row.status) == (State.COMPLETED, results.FORGOTTEN)
        assert row.result is row.traceback is row.meta is None

    def test_of_a_job_whose_end_was_told_it_is_not_told_again(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        worker.store(worker.claim_one(), State.DEAD, status="FAILURE")
        results.forget(storage.database, "job")
        with storage.database.read() as connection:
            assert finish.unreported(connection) == []

    def test_of_a_job_whose_end_is_untold_it_is_told(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        worker.end(worker.claim_one(), State.DEAD, "why", None)
        results.forget(storage.database, "job")
        with storage.database.read() as connection:
            assert [job.id for job in finish.unreported(connection)] == ["job"]

    def test_of_a_job_that_runs_its_end_is_known_again(self, storage: Storage, worker: Worker) -> None:
        storage.insert(new_job())
        job = worker.claim_one()
        worker.store(job, None, status="PROGRESS")
        results.forget(storage.database, "job")
        assert the_job(storage).status is None
        worker.store(job, State.COMPLETED, status="SUCCESS")
        assert the_job(storage).status == "SUCCESS"

    def test_a_result_alone_goes(self, storage: Storage) -> None:
        store_alone(storage, State.COMPLETED)
        results.forget(storage.database, "job")
        assert storage.fetch("job") is None

    def test_of_an_unknown_id(self, storage: Storage) -> None:
        results.forget(storage.database, "unknown")


def test_groups(storage: Storage) -> None:
    database = storage.database
    assert results.restore_group(database, "group") is None
    results.save_group(database, "group", "[1]")
    results.save_group(database, "group", "[1,2]")
    results.save_group(database, "x" * 1000, "[3]")
    assert results.restore_group(database, "group") == "[1,2]"
    assert results.restore_group(database, "x" * 1000) == "[3]"
    results.delete_group(database, "group")
    assert results.restore_group(database, "group") is None
    assert prune.old_groups(database, 3600) == 0
    assert prune.old_groups(database, -1) == 1
