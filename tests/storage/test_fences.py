"""Reports of a worker whose job has moved on, and reports in any order: the second and the fifth invariant."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest

from kathikon_celery.job import Job, State
from kathikon_celery.storage import Storage, finish
from tests.storage.actors import Worker, new_job, the_job

#: All that a worker can report of a job it holds.
REPORTS: dict[str, Callable[[Worker, Job], object]] = {
    "started": lambda worker, job: worker.start(job),
    "started early": lambda worker, job: worker.start(job, acked=True),
    "completed": lambda worker, job: worker.complete(job),
    "dead": lambda worker, job: worker.end(job, State.DEAD),
    "cancelled": lambda worker, job: worker.end(job, State.CANCELLED),
    "discarded": lambda worker, job: worker.end(job, State.DISCARDED),
    "given back": lambda worker, job: worker.give_back(job),
    "unbegun": lambda worker, job: worker.give_back(job, has_begun=False),
    "crashed": lambda worker, job: worker.give_back(job, crashed=True),
    "result": lambda worker, job: worker.store(job),
    "failure": lambda worker, job: worker.store(job, State.DEAD, status="FAILURE"),
    "revoked": lambda worker, job: worker.store(job, State.CANCELLED, status="REVOKED"),
    "start with a result": lambda worker, job: worker.store(job, State.RUNNING, status="STARTED"),
    "progress": lambda worker, job: worker.store(job, None, status="PROGRESS"),
    "retry": lambda worker, job: worker.publish_again(job),
}
#: Those after which the job is over, for this delivery.
ENDS = REPORTS.keys() - {"started", "started early", "start with a result", "progress"}


def taken_by_another(worker: Worker, other: Worker) -> None:
    worker.die()
    other.claim_one()


def run_by_another(worker: Worker, other: Worker) -> None:
    worker.die()
    other.start(other.claim_one())


def done_by_another(worker: Worker, other: Worker) -> None:
    worker.die()
    other.store(other.claim_one(), result='"theirs"')


def buried_by_another(worker: Worker, other: Worker) -> None:
    worker.die()
    other.end(other.claim_one(), State.DEAD, "theirs")


def waits(worker: Worker, other: Worker) -> None:
    worker.die()


MEANWHILE = [taken_by_another, run_by_another, done_by_another, buried_by_another, waits]


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("report", REPORTS)
def test_a_zombies_report_changes_nothing(
    storage: Storage, worker: Worker, other: Worker, report: str, meanwhile: Callable[[Worker, Worker], None]
) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    worker.start(job)
    meanwhile(worker, other)
    before = the_job(storage)
    assert not REPORTS[report](worker, job)
    assert the_job(storage) == before
    with storage.database.read() as connection:
        assert finish.moved_on(connection, [job.hold]) == ["job"]


@pytest.mark.parametrize("report", REPORTS)
def test_a_fence_that_a_crashed_server_gave_twice_is_the_second_nodes(
    storage: Storage, worker: Worker, other: Worker, set_row: Callable[..., None], report: str
) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    set_row(node_id=None, state="available", fence=job.fence - 1, attempts=0)  # the server has forgotten the claim
    again = other.claim_one()
    assert (again.seq, again.fence) == (job.seq, job.fence)
    before = the_job(storage)
    assert not REPORTS[report](worker, job)
    assert the_job(storage) == before


@pytest.mark.parametrize("report", REPORTS)
def test_a_number_that_is_given_anew_fits_no_old_claim(storage: Storage, worker: Worker, report: str) -> None:
    """SQLite gives the number of a row that was deleted, if it was the highest, to the next one."""
    storage.insert(new_job())
    job = worker.claim_one()
    assert storage.delete(job.id) == 1
    storage.insert(new_job())
    again = worker.claim_one()
    assert again.hold != job.hold
    assert not REPORTS[report](worker, job)
    assert the_job(storage).hold == again.hold


@pytest.mark.parametrize(("first", "second"), list(permutations(sorted(ENDS), 2)))
def test_the_first_end_counts(storage: Storage, worker: Worker, first: str, second: str) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    worker.start(job)
    assert REPORTS[first](worker, job)
    before = the_job(storage)
    if second == "retry" and before.state not in (State.AVAILABLE, State.CANCELLED):
        return  # a task may publish itself again whatever it has said of itself before
    assert not REPORTS[second](worker, job)
    assert the_job(storage) == before


@pytest.mark.parametrize("report", REPORTS)
def test_a_report_twice_is_a_report_once(storage: Storage, worker: Worker, report: str) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    assert REPORTS[report](worker, job)
    before = the_job(storage)
    REPORTS[report](worker, job)
    assert the_job(storage) == before


def test_the_pools_acceptance_may_come_after_the_end(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    assert worker.complete(job) == 1
    assert worker.start(job) == 0
    assert the_job(storage).state is State.COMPLETED


def test_a_batch_counts_what_it_changed(storage: Storage, worker: Worker, other: Worker) -> None:
    storage.insert_many([new_job(str(number)) for number in range(10)])
    jobs = worker.claim(10)
    worker.give_back(jobs[0])
    storage.delete(jobs[1].id)
    worker.complete(jobs[2])
    assert worker.complete(*jobs) == 7
    with storage.database.read() as connection:
        lost = finish.moved_on(connection, [job.hold for job in jobs])
    assert lost == ["0", f"#{jobs[1].seq}"]


def test_no_report_removes_a_row(storage: Storage, worker: Worker) -> None:
    """The first invariant: a row leaves the table only through prune, purge or delete."""
    storage.insert_many([new_job(report) for report in REPORTS])
    for job in worker.claim(len(REPORTS)):
        REPORTS[job.id](worker, job)
    worker.die()
    storage.promote_scheduled()
    storage.discard_expired()
    assert {job.id for job in storage.all()} == set(REPORTS)
