"""Every verb of the facade, and what it promises whatever the database."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import select

from kathikon_celery.job import Job, State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import MovedOn, NotFound, Storage
from kathikon_celery.storage.clock import now
from tests.storage.actors import Worker, new_job, the_job


def database_time(storage: Storage) -> datetime:
    with storage.database.read() as connection:
        moment: datetime = connection.execute(select(now())).scalar_one()
    return moment


def test_a_job_is_stored_as_it_was_given(storage: Storage) -> None:
    later = datetime.now(timezone.utc).replace(microsecond=123456) + timedelta(hours=1)
    given = {
        "queue": "mails", "task": "proj.send", "priority": -7, "envelope": '{"headers":{}}', "body": "[[], {}]",
        "scheduled_at": later, "expires_at": later + timedelta(hours=1), "max_attempts": 3,
        "root_id": "root", "parent_id": "parent", "group_id": "group",
    }  # fmt: skip
    storage.insert(Job(id="job", **given))
    job = the_job(storage)
    assert {name: getattr(job, name) for name in given} == given
    assert (job.state, job.attempts, job.crashes, job.acked, job.errors) == (State.SCHEDULED, 0, 0, False, [])
    assert job.node_id is job.claimed_at is job.started_at is job.ended_at is job.result is job.reason is None


def test_a_job_goes_through_its_life(storage: Storage) -> None:
    storage.insert(Job(id="job"))
    before = the_job(storage)
    (job,) = storage.claim("default")
    assert (job.state, job.attempts) == (State.CLAIMED, 1)
    assert job.fence > before.fence
    job.state = State.RUNNING
    storage.update(job)
    job.state, job.result = State.COMPLETED, "42"
    storage.update(job)
    assert the_job(storage) == job
    assert (job.state, job.result, job.node_id) == (State.COMPLETED, "42", None)
    assert job.inserted_at <= job.available_at <= job.claimed_at <= job.started_at <= job.ended_at == job.completed_at


def test_times_are_of_the_databases_clock_in_utc(storage: Storage) -> None:
    start = database_time(storage)
    storage.insert(Job(id="job"))
    (job,) = storage.claim("default")
    end = database_time(storage)
    for moment in (job.inserted_at, job.available_at, job.claimed_at):
        assert moment is not None
        assert moment.tzinfo is timezone.utc
        assert start <= moment <= end


@pytest.mark.parametrize(
    "zone", [timezone.utc, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-8))]
)
def test_a_due_time_keeps_its_moment_in_any_zone(storage: Storage, zone: timezone) -> None:
    due = datetime(2044, 2, 29, 12, 30, 15, 987654, tzinfo=zone)
    storage.insert(Job(id="job", scheduled_at=due))
    job = the_job(storage)
    assert job.scheduled_at == job.available_at == due
    assert job.scheduled_at is not None
    assert job.scheduled_at.tzinfo is timezone.utc


def test_a_due_time_that_is_past_means_now(storage: Storage) -> None:
    start = database_time(storage)
    storage.insert(Job(id="job", scheduled_at=start - timedelta(days=1)))
    job = the_job(storage)
    assert job.state is State.AVAILABLE
    assert job.available_at is not None
    assert job.available_at >= start


def test_insert_many_writes_chunk_by_chunk(storage: Storage) -> None:
    chunked = Storage(storage.database.url.render_as_string(hide_password=False), Settings(insert_many_chunk_size=7))
    due = database_time(storage) + timedelta(hours=1)
    chunked.insert_many([new_job(str(number), scheduled_at=due if number % 3 else None) for number in range(50)])
    chunked.close()
    assert {job.id for job in storage.all()} == {str(number) for number in range(50)}
    assert storage.counts() == {("default", "available"): 17, ("default", "scheduled"): 33}


def test_insert_many_of_the_same_id_keeps_one_row(storage: Storage) -> None:
    storage.insert_many([new_job(priority=1), new_job(priority=2), new_job(priority=3)])
    assert [job.priority for job in storage.all()] == [3]


def test_all_lists_the_oldest_first_by_queue_and_state(storage: Storage) -> None:
    storage.insert_many([new_job("1"), new_job("2", queue="mails"), new_job("3"), new_job("4")])
    (claimed,) = storage.claim("default", 1)
    assert [job.id for job in storage.all()] == ["1", "2", "3", "4"]
    assert [job.id for job in storage.all(queue="mails")] == ["2"]
    assert [job.id for job in storage.all(state=State.CLAIMED)] == [claimed.id] == ["1"]
    assert [job.id for job in storage.all("default", State.AVAILABLE)] == ["3", "4"]
    assert storage.all("nowhere") == []


def test_delete_takes_one_id_or_several(storage: Storage) -> None:
    storage.insert_many([new_job(str(number)) for number in range(5)])
    assert storage.delete("0") == 1
    assert storage.delete(["1", "2", "unknown"]) == 2
    assert storage.delete([]) == 0
    assert [job.id for job in storage.all()] == ["3", "4"]


def test_clear_jobs_leaves_the_nodes_and_reset_leaves_nothing(storage: Storage) -> None:
    worker = Worker(storage)
    storage.insert(new_job())
    storage.clear_jobs()
    assert storage.all() == []
    storage.insert(new_job())
    assert worker.claim_one()
    storage.reset()
    storage.insert(new_job())
    assert worker.claim() == []


def test_the_next_call_after_close_connects_again(storage: Storage) -> None:
    storage.insert(new_job())
    storage.close()
    assert storage.fetch("job")
    storage.close()
    storage.insert(new_job("other"))


def test_a_body_of_20_mb(storage: Storage) -> None:
    body = "äöü€" * 5_000_000
    storage.insert(Job(id="job", body=body))
    (job,) = storage.claim("default")
    assert job.body == body


def test_fetch_of_an_unknown_id(storage: Storage) -> None:
    assert storage.fetch("unknown") is None


def test_update_of_an_unknown_id(storage: Storage) -> None:
    with pytest.raises(NotFound, match="'unknown'"):
        storage.update(Job(id="unknown"))


def test_update_of_a_job_that_has_moved_on_changes_nothing(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    stale = the_job(storage)
    worker.claim_one()
    before = the_job(storage)
    stale.state = State.CANCELLED
    with pytest.raises(MovedOn, match=f"fence {before.fence - 1} and has {before.fence} now; fetch it again"):
        storage.update(stale)
    assert the_job(storage) == before


def test_update_that_makes_a_job_wait_again_forgets_the_run(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    claimed = worker.claim_one()
    worker.start(claimed)
    worker.end(claimed, State.DEAD, "boom", "Traceback")
    job = the_job(storage)
    job.state = State.AVAILABLE
    storage.update(job)
    assert (job.attempts, job.traceback, job.reason, job.ended_at, job.started_at) == (0, None, None, None, None)
    assert [error["reason"] for error in job.errors] == ["boom"]
    assert worker.complete(claimed) == 0
    assert worker.claim_one().id == "job"


def test_update_to_retryable_waits_for_its_due_time(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    worker.claim_one()
    job = the_job(storage)
    due = database_time(storage) + timedelta(hours=1)
    job.state, job.scheduled_at = State.RETRYABLE, due
    storage.update(job)
    assert job.available_at == due
    assert 3540 < (storage.next_due() or 0) <= 3600


def test_of_two_updates_at_once_one_is_refused(storage: Storage) -> None:
    """Both read the same; the one that comes second must not overwrite the first one's transition."""
    storage.insert(new_job())
    claims = [the_job(storage) for _ in range(8)]
    barrier, won, lost = threading.Barrier(len(claims)), [], []

    def claim(job: Job) -> None:
        job.state = State.CLAIMED
        barrier.wait(60)
        try:
            storage.update(job)
            won.append(job)
        except MovedOn:
            lost.append(job)

    threads = [threading.Thread(target=claim, args=[job]) for job in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(won), len(lost)) == (1, 7)
    assert the_job(storage).attempts == 1


def test_the_hot_path_writes_one_row(storage: Storage, worker: Worker) -> None:
    """History costs it nothing: what happened when is on the row."""
    from sqlalchemy import func

    from kathikon_celery.storage.tables import metadata

    storage.insert(new_job())
    job = worker.claim_one()
    worker.start(job)
    worker.store(job)
    worker.complete(job)
    with storage.database.read() as connection:
        counts = {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in metadata.sorted_tables
        }
    assert {name for name, count in counts.items() if count} == {"kathikon_jobs", "kathikon_nodes"}
    done = the_job(storage)
    assert done.inserted_at <= done.available_at <= done.claimed_at <= done.started_at <= done.ended_at  # type: ignore[operator]
    assert done.errors == []


def test_a_workflow_is_what_has_one_root(storage: Storage) -> None:
    long = "x" * 300  # longer than a key
    for job_id, fields in {
        "root": {},
        "child": {"root_id": "root", "parent_id": "root"},
        "part": {"root_id": "root", "group_id": "group"},
        "alone": {"group_id": "other group"},
        "first": {},
        "last": {"root_id": "first", "group_id": "other group"},
        "stranger": {},
        "of a long one": {"root_id": long, "group_id": long[1:]},
        long: {},
    }.items():
        storage.insert(new_job(job_id, **fields))

    def workflow(job_id: str) -> list[str]:
        return [job.id for job in storage.workflow(job_id)]

    assert workflow("root") == workflow("child") == workflow("group") == ["root", "child", "part"]
    assert workflow("other group") == ["alone", "first", "last"]
    assert workflow("last") == workflow("first") == ["first", "last"]
    assert workflow("stranger") == ["stranger"]
    assert len(workflow(long)) == len(workflow(long[1:])) == len(workflow("of a long one")) == 2
    assert workflow("nobody") == []
    storage.delete("root")
    assert workflow("root") == ["child", "part"]
