"""Claiming: the order, and that nobody gets what another has."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import select

from kathikon_celery.job import Cause, State
from kathikon_celery.storage import Storage, claim, idle_query, messages, nodes, results, tables
from tests.storage.actors import Worker, new_job, the_job
from tests.support.waiting import wait_until

PRIORITIES = [0, 2**62, -(2**62), 1, -1, 2**63 - 1, -(2**63), 10, 9, 255]


def test_higher_priority_first(storage: Storage) -> None:
    storage.insert_many([new_job(str(priority), priority=priority) for priority in PRIORITIES])
    assert [job.priority for job in storage.claim("default", 100)] == sorted(PRIORITIES, reverse=True)


def test_one_by_one_in_the_same_order(storage: Storage, worker: Worker) -> None:
    storage.insert_many([new_job(str(priority), priority=priority) for priority in PRIORITIES])
    assert [worker.claim_one().priority for _ in PRIORITIES] == sorted(PRIORITIES, reverse=True)


def test_of_equal_priority_what_is_ready_for_longer(
    storage: Storage, worker: Worker, set_row: Callable[..., None]
) -> None:
    storage.insert_many([new_job(name) for name in ("late", "early", "between")])
    start = datetime.now(timezone.utc)
    for name, microseconds in (("late", 2), ("early", 0), ("between", 1)):
        set_row(name, available_at=start + timedelta(microseconds=microseconds))
    assert [job.id for job in worker.claim(3)] == ["early", "between", "late"]


def test_of_the_same_moment_what_was_published_first(
    storage: Storage, worker: Worker, set_row: Callable[..., None]
) -> None:
    ids = [f"{number:02}" for number in range(20)]
    storage.insert_many([new_job(job_id) for job_id in ids])
    moment = datetime.now(timezone.utc)
    for job_id in reversed(ids):
        set_row(job_id, available_at=moment)
    assert [job.id for job in worker.claim(7) + worker.claim(20)] == ids


def test_no_more_than_asked_for_and_of_the_queue_asked_for(storage: Storage, worker: Worker) -> None:
    storage.insert_many([new_job(str(number), queue="mails" if number % 2 else "default") for number in range(20)])
    assert [job.id for job in worker.claim(3, "mails")] == ["1", "3", "5"]
    assert worker.claim(0) == []
    assert len(worker.claim(100)) == 10
    assert worker.claim(100) == []
    assert worker.claim(100, "nowhere") == []


def test_what_a_claim_tells_and_writes(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job(task="proj.task", priority=4, envelope='{"headers":{}}', body="[]"))
    before, job, row = the_job(storage), worker.claim_one(), the_job(storage)
    assert (row.state, row.node_id, row.attempts, row.fence) == (State.CLAIMED, worker.id, 1, before.fence + 1)
    for name in ("seq", "id", "queue", "task", "state", "priority", "fence", "attempts", "crashes", "envelope", "body"):
        assert getattr(job, name) == getattr(row, name)


def test_only_what_is_available_is_claimed(storage: Storage, worker: Worker, set_row: Callable[..., None]) -> None:
    storage.insert_many([new_job(state.value) for state in State])
    for state in State:
        set_row(state.value, state=state.value)
    assert [job.id for job in worker.claim(100)] == ["available"]


def test_a_node_that_was_taken_for_dead_gets_nothing(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    worker.die()
    assert worker.claim() == []
    assert the_job(storage).state is State.AVAILABLE


def test_claims_of_many_threads_never_overlap(storage: Storage) -> None:
    """Twelve workers, a thousand jobs, claims that are given back in between."""
    count, claimers = 1000, 12
    storage.insert_many([new_job(str(number), priority=number % 3) for number in range(count)])
    workers = [Worker(storage) for _ in range(claimers)]
    barrier = threading.Barrier(claimers)
    done: list[str] = []
    fences: list[tuple[int, int]] = []
    errors: list[BaseException] = []

    def work(worker: Worker, size: int) -> None:
        try:
            barrier.wait(60)
            while jobs := worker.claim(size):
                fences.extend((job.seq, job.fence) for job in jobs)
                back = jobs[0] if jobs[0].attempts == 1 and len(jobs) > 5 else None
                if back:
                    assert worker.give_back(back) == 1
                rest = [job for job in jobs if job is not back]
                assert worker.complete(*rest) == len(rest)
                done.extend(job.id for job in rest)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(one, 3 + number)) for number, one in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert Counter(done) == {str(number): 1 for number in range(count)}
    assert len(fences) == len(set(fences))
    assert storage.counts() == {("default", "completed"): count}


def test_a_job_is_no_longer_there_once_another_has_claimed_it_in_an_open_transaction(storage: Storage) -> None:
    """PostgreSQL skips it; SQLite lets the second wait, and then find the next one."""
    storage.insert_many([new_job("1"), new_job("2")])
    first, second, got = Worker(storage), Worker(storage), []
    thread = threading.Thread(target=lambda: got.extend(second.claim()))
    with storage.database.write() as connection:
        (job,) = claim.claim(storage.database, connection, "default", 1, first.id)
        thread.start()
        if storage.database.dialect.name == "postgresql":
            thread.join(60)
            assert [one.id for one in got] == ["2"]
    thread.join(60)
    assert (job.id, [one.id for one in got]) == ("1", ["2"])


@pytest.mark.parametrize(
    ("queue", "expected"), [("default", True), ("mails", False), ("messages", True), ("held", False)]
)
def test_is_anything_there(storage: Storage, worker: Worker, queue: str, expected: bool) -> None:
    storage.insert(new_job())
    storage.insert(new_job("later", queue="mails", scheduled_at=datetime.now(timezone.utc) + timedelta(hours=1)))
    messages.put(storage.database, ["messages", "held"], "{}", "")
    worker.take(queue="held")
    with storage.database.read() as connection:
        assert idle_query.look(storage.database, connection, [queue]) is expected
        assert idle_query.look(storage.database, connection, ["nowhere", queue]) is expected
        assert not idle_query.look(storage.database, connection, [])


def test_a_claim_that_the_server_forgot_is_made_again(storage: Storage, set_row: Callable[..., None]) -> None:
    storage.insert_many([new_job("1"), new_job("2")])
    worker = Worker(storage)
    jobs = worker.claim(2)
    set_row("1", state="available", node_id=None, fence=jobs[0].fence - 1, attempts=0)  # as after a crash of the server
    holds = [job.hold for job in jobs]
    with storage.database.write() as connection:
        assert claim.claim_again(storage.database, connection, holds, worker.id) == 1
    assert worker.complete(*jobs) == 2


@pytest.mark.postgresql
def test_a_publication_calls_one_idle_node_that_waits_for_its_queue(postgresql_storage: Storage) -> None:
    storage = postgresql_storage
    worker, other = Worker(storage), Worker(storage)
    for one, names in ((worker, ["mails"]), (other, ["default", "mails"])):
        one.wait_for(*names)
    wakeups = [storage.database.wakeup(one.id) for one in (worker, other)]
    assert all(wakeup.wait(60) for wakeup in wakeups)  # they listen now
    storage.insert(new_job())
    assert wakeups[1].wait(60)
    (job,) = storage.all()
    assert wakeups[1].calls() == ({"default": job.seq}, None)
    assert wakeups[1].calls() == ({}, None)
    assert not wakeups[0].wait(0)
    storage.insert(new_job("2"))  # nobody waits for it any more
    assert not wakeups[1].wait(0.05)
    storage.insert(new_job("3", queue="mails"))
    assert wakeups[0].wait(60)
    for wakeup in wakeups:
        wakeup.close()


@pytest.mark.postgresql
def test_the_job_that_a_node_was_called_for_is_claimed_as_any_other(postgresql_storage: Storage) -> None:
    storage = postgresql_storage
    worker, other = Worker(storage), Worker(storage)
    for name in ("1", "2"):
        storage.insert(new_job(name))
    one, two = storage.all()
    assert worker.claim_told(one, "mails") == []
    claimed = worker.claim_told(one)
    assert [(job.id, job.state, job.node_id, job.attempts) for job in claimed] == [("1", State.CLAIMED, worker.id, 1)]
    assert other.claim_told(one) == []
    assert worker.complete(*claimed) == 1
    nodes.remove(storage.database, other.id)
    assert other.claim_told(two) == []
    assert [job.id for job in worker.claim(5)] == ["2"]


@pytest.mark.postgresql
@pytest.mark.parametrize("way", ["claim", "told", "complete"])
@pytest.mark.parametrize("room", [1, 2])
def test_a_claim_says_that_the_node_waits_if_it_has_room_for_more(
    postgresql_storage: Storage, way: str, room: int
) -> None:
    storage, database = postgresql_storage, postgresql_storage.database
    worker = Worker(storage)
    wakeup = database.wakeup(worker.id)
    storage.insert_many([new_job("1"), new_job("2")])
    first = worker.claim_one()
    wait_until(lambda: not wakeup.wait(0.05))  # it listens, and nobody calls
    waiting = claim.Waiting(["default"], room)
    with database.once() as connection:
        if way == "claim":
            claimed = claim.claim(database, connection, "default", 1, worker.id, None, waiting)
        elif way == "told":
            claimed = claim.claim_told(database, connection, "default", storage.all()[1].seq, worker.id, waiting)
        else:
            _, claimed = claim.complete_and_claim(
                database, connection, [first.hold], "default", 1, worker.id, None, waiting
            )
    assert [job.id for job in claimed] == ["2"]
    with database.read() as connection:
        waits = connection.execute(select(tables.nodes.c.waiting).where(tables.nodes.c.id == worker.id)).scalar()
    assert waits == (["default"] if room > 1 else None)
    storage.insert(new_job("3"))
    assert wakeup.wait(10 if room > 1 else 0) is (room > 1)
    wakeup.close()


def test_a_publication_is_heard(storage: Storage) -> None:
    worker = Worker(storage)
    if storage.database.dialect.wakes_by_name:
        worker.wait_for("default")
    wakeup = storage.database.wakeup(worker.id)
    while wakeup.wait(0.05):
        pass
    storage.insert(new_job())
    assert wakeup.wait(60)
    while wakeup.wait(0.05):
        pass
    storage.insert(new_job("later", scheduled_at=datetime.now(timezone.utc) + timedelta(hours=1)))
    assert wakeup.wait(60)
    wakeup.close()


@pytest.mark.postgresql
def test_what_is_done_and_what_is_claimed_with_it(postgresql_storage: Storage) -> None:
    """One statement does what `completed` and `claim` do one after the other, whatever there is to claim."""
    storage, worker = postgresql_storage, Worker(postgresql_storage)
    storage.insert_many([new_job(str(number), priority=number) for number in range(6)])
    fences = {job.id: job.fence for job in storage.all()}
    first = worker.claim(2)
    assert [job.id for job in first] == ["5", "4"]
    number, second = worker.complete_and_claim(*first, limit=3)
    assert (number, [(job.id, job.fence, job.node_id) for job in second]) == (
        2,
        [(name, fences[name] + 1, worker.id) for name in "321"],
    )
    worker.give_back(second[0])
    number, third = worker.complete_and_claim(*second, limit=10)
    assert (number, [(job.id, job.fence) for job in third]) == (2, [("3", fences["3"] + 3), ("0", fences["0"] + 1)])
    assert worker.complete_and_claim(*third, limit=10) == (2, [])
    assert worker.complete_and_claim(*third, limit=10) == (0, [])
    assert storage.counts() == {("default", "completed"): 6}


@pytest.mark.postgresql
def test_a_zombie_neither_completes_nor_claims(postgresql_storage: Storage) -> None:
    storage, worker, other = postgresql_storage, Worker(postgresql_storage), Worker(postgresql_storage)
    storage.insert_many([new_job("1"), new_job("2")])
    job = worker.claim_one()
    worker.die()
    assert worker.complete_and_claim(job, limit=10) == (0, [])
    assert {job.id for job in other.claim(10)} == {"1", "2"}


def test_only_a_claim_whose_task_has_begun_is_an_attempt(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    for has_begun, attempts in ((False, 0), (True, 1), (False, 1), (True, 2)):
        assert worker.give_back(worker.claim_one(), has_begun=has_begun) == 1
        assert (the_job(storage).state, the_job(storage).attempts) == (State.AVAILABLE, attempts)


@pytest.mark.parametrize("how", ["given back", "crashed", "rescued"])
def test_what_was_revoked_while_it_was_claimed_is_not_given_to_others(
    storage: Storage, worker: Worker, how: str
) -> None:
    """The worker stores the revocation when it hears of it, and acts on it when the job's turn comes."""
    storage.insert_many([new_job("revoked"), new_job("not", priority=-1)])
    job, other = worker.claim(2)
    results.store_alone(
        storage.database, job.id, State.CANCELLED, status="REVOKED", result="1", traceback=None, meta=None
    )
    assert the_job(storage, job.id).state is State.CLAIMED
    if how == "rescued":
        worker.die()
    else:
        worker.give_back(job, other, has_begun=False, crashed=how == "crashed")
    job = the_job(storage, "revoked")
    assert (job.state, job.cause, job.reason, job.status, job.node_id) == (
        State.CANCELLED, Cause.REVOKED, "revoked", None, None
    )  # fmt: skip
    assert job.ended_at is not None
    assert [one.id for one in Worker(storage).claim(5)] == ["not"]
