"""Nodes, leases and the rescue of what the dead held (the fourth invariant)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from sqlalchemy import text

from kathikon_celery.job import State
from kathikon_celery.storage import Storage, finish, idle_query, messages, nodes, topology, transitions
from kathikon_celery.storage.errors import Unavailable
from kathikon_celery.storage.nodes import Holder
from tests.storage.actors import Worker, new_job, the_job
from tests.support.statements import counted
from tests.support.waiting import wait_until


def test_a_claimed_job_comes_back_without_a_crash(storage: Storage, worker: Worker, other: Worker) -> None:
    storage.insert(new_job(priority=3))
    before = the_job(storage)
    claimed = worker.claim_one()
    assert worker.die() == 1
    job = the_job(storage)
    assert (job.state, job.crashes, job.node_id, job.claimed_at) == (State.AVAILABLE, 0, None, None)
    assert job.fence > claimed.fence
    assert (job.available_at, job.priority) == (before.available_at, 3)
    assert other.claim_one().attempts == 2


def test_a_running_job_comes_back_with_a_crash(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    worker.start(worker.claim_one())
    worker.die()
    job = the_job(storage)
    assert (job.state, job.crashes, job.node_id, job.started_at) == (State.AVAILABLE, 1, None, None)
    assert [(error["attempt"], error["reason"]) for error in job.errors] == [(1, finish.LOST)]


def test_a_job_whose_processes_are_lost_too_often_is_dead(storage: Storage) -> None:
    storage.insert(new_job(max_attempts=3))
    for crash in (1, 2, 3):
        worker = Worker(storage)
        worker.start(worker.claim_one())
        worker.die()
        job = the_job(storage)
        assert (job.crashes, job.state) == (crash, State.DEAD if crash == 3 else State.AVAILABLE)
    assert job.reason == transitions.LOST_TOO_OFTEN
    assert [(error["attempt"], error["reason"]) for error in job.errors] == [
        (crash, finish.LOST) for crash in (1, 2, 3)
    ]
    assert job.failed_at == job.ended_at
    assert job.ended_at is not None
    assert job.started_at is not None
    assert job.node_id is None


def test_claims_that_are_lost_count_no_crash(storage: Storage) -> None:
    storage.insert(new_job(max_attempts=1))
    for _ in range(5):
        worker = Worker(storage)
        worker.claim_one()
        worker.die()
    assert the_job(storage).state is State.AVAILABLE
    assert the_job(storage).crashes == 0
    assert the_job(storage).errors == []


def test_an_early_acknowledged_job_that_ran_is_dead_and_runs_not_twice(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    worker.start(worker.claim_one(), acked=True)
    worker.die()
    job = the_job(storage)
    assert (job.state, job.reason, job.crashes) == (State.DEAD, transitions.LOST_AT_MOST_ONCE, 1)
    assert job.started_at is not None
    assert Worker(storage).claim() == []


@pytest.mark.parametrize("max_attempts", [1, 20])
def test_what_a_lost_run_said_stays_for_the_next(storage: Storage, worker: Worker, max_attempts: int) -> None:
    storage.insert(new_job(max_attempts=max_attempts))
    job = worker.claim_one()
    worker.start(job)
    worker.store(job, None, status="PROGRESS", result='{"done":1}', meta="{}")
    worker.die()
    row = the_job(storage)
    assert (row.status, row.result, row.meta) == (
        (None,) * 3 if max_attempts == 1 else ("PROGRESS", '{"done":1}', "{}")
    )


def test_a_lost_run_is_not_started_any_more(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    worker.store(worker.claim_one(), State.RUNNING, status="STARTED", meta="{}")
    worker.die()
    row = the_job(storage)
    assert row.status is row.result is row.meta is row.traceback is None


def test_only_what_the_dead_one_held(storage: Storage, worker: Worker, other: Worker) -> None:
    storage.insert_many([new_job(str(number)) for number in range(6)])
    mine, theirs = worker.claim(3), other.claim(2)
    worker.complete(mine[0])
    assert worker.die() == 2
    states = {job.id: job.state for job in storage.all()}
    assert states[mine[0].id] is State.COMPLETED
    assert states[mine[1].id] is states[mine[2].id] is State.AVAILABLE
    assert {states[job.id] for job in theirs} == {State.CLAIMED}


def test_a_second_rescue_finds_nothing(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    worker.claim_one()
    assert worker.die() == 1
    before = the_job(storage)
    assert worker.die() == 0
    assert the_job(storage) == before


def test_a_lease_that_was_renewed_meanwhile_saves_the_node(storage: Storage) -> None:
    dead, alive = Worker(storage), Worker(storage)
    storage.insert_many([new_job("1"), new_job("2")])
    for worker in (dead, alive):
        worker.claim_one()
    with storage.database.read() as connection:
        seen = {node.id: node.renewal for node in nodes.others(connection, 0)}
    nodes.renew(storage.database, alive.row, 120)
    assert nodes.remove(storage.database, alive.id, seen[alive.id]) is None
    assert nodes.remove(storage.database, dead.id, seen[dead.id]) == 1
    assert storage.counts() == {("default", "available"): 1, ("default", "claimed"): 1}


def test_a_lease_is_seen_by_others(storage: Storage, worker: Worker, other: Worker) -> None:
    def lease() -> float:
        with storage.database.read() as connection:
            (node,) = nodes.others(connection, worker.id)
        assert node.id == other.id
        return node.lease

    assert nodes.renew(storage.database, other.row, 300)
    assert lease() == pytest.approx(300, abs=60)
    assert nodes.renew(storage.database, other.row, -300)
    assert lease() == pytest.approx(-300, abs=60)


def test_nobody_renews_the_lease_of_another_process_of_the_same_number(storage: Storage, worker: Worker) -> None:
    """Tables that are made anew number their nodes anew."""
    for another in (worker.row._replace(machine="another"), worker.row._replace(pid=2)):
        assert not nodes.renew(storage.database, another, 30)
        assert idle_query.renew(storage.database, ["default"], True, another, 30) is None


def test_who_was_taken_for_dead_learns_it(storage: Storage, worker: Worker, other: Worker) -> None:
    worker.die()
    assert not nodes.renew(storage.database, worker.row, 30)
    assert Worker(storage).id > other.id  # no number twice


def test_rows_held_under_no_node_are_found_and_returned(
    storage: Storage, worker: Worker, set_row: Callable[..., None]
) -> None:
    """A claim that was committed after its node had been removed."""
    storage.insert(new_job())
    set_row(state="claimed", node_id=4711)
    messages.put(storage.database, ["queue"], "{}", "")
    ghost = Worker(storage)
    ghost.id = 4712
    (held,) = ghost.take()
    with storage.database.read() as connection:
        assert set(nodes.orphans(connection)) == {4711, 4712}
    for node_id in (4711, 4712):
        nodes.remove(storage.database, node_id)
    assert the_job(storage).state is State.AVAILABLE
    assert [message.seq for message in worker.take()] == [held.seq]
    with storage.database.read() as connection:
        assert nodes.orphans(connection) == []


def test_messages_that_the_dead_one_held_are_there_again(storage: Storage, worker: Worker, other: Worker) -> None:
    messages.put(storage.database, ["queue"], "{}", "text")
    (held,) = worker.take()
    worker.die()
    (again,) = other.take()
    assert (again.seq, again.body, again.redelivered) == (held.seq, "text", True)
    assert again.fence > held.fence


def test_auto_delete_queues_go_with_their_node_and_others_expire(storage: Storage, worker: Worker) -> None:
    database = storage.database
    for number in range(20):
        topology.declare_queue(database, f"reply-{number}", auto_delete=True)
        topology.own_queue(database, f"reply-{number}", worker.id)
    topology.declare_queue(database, "mine", expires=0.0)
    topology.own_queue(database, "mine", worker.id)
    topology.declare_queue(database, "another's", auto_delete=True)
    assert topology.delete_unused(database) == 0
    worker.die()
    with database.read() as connection:
        assert set(topology.all_queues(connection)) == {"mine", "another's"}
    wait_until(lambda: topology.delete_unused(database) == 1)  # SQLite's clock counts in milliseconds


def test_newest_grows_with_each_node(storage: Storage) -> None:
    def newest() -> int:
        with storage.database.read() as connection:
            return nodes.newest(connection)

    assert newest() == 0
    assert Worker(storage).id == newest()
    assert Worker(storage).id == newest()


class TestLock:
    """The session lock by which a node's death is seen at once; SQLite has none."""

    @pytest.fixture
    def holder(self, storage: Storage) -> Iterator[Holder]:
        holder = Holder(storage.database)
        yield holder
        holder.drop()

    def test_it_is_free_when_its_holder_is_gone(self, storage: Storage, worker: Worker, holder: Holder) -> None:
        database = storage.database

        def is_free() -> bool | None:
            with database.read() as connection:
                return nodes.is_lock_free(database, connection, worker.id)

        has_locks = database.dialect.name == "postgresql"
        assert is_free() is (True if has_locks else None)
        holder.hold(worker.id)
        assert is_free() is (False if has_locks else None)
        holder.drop()
        wait_until(
            lambda: is_free() is (True if has_locks else None), what="the server sees that the connection is gone"
        )

    def test_it_is_taken_as_soon_as_it_is_to_be_had(self, storage: Storage, worker: Worker, holder: Holder) -> None:
        """The server may see the connection that held it, long after that connection was lost."""
        lost = Holder(storage.database)
        lost.hold(worker.id)
        holder.hold(worker.id)
        lost.drop()

        def is_taken() -> bool:
            holder.hold(worker.id)
            with storage.database.read() as connection:
                return not nodes.is_lock_free(storage.database, connection, worker.id)

        wait_until(is_taken, what="the server sees that the lost connection is gone")

    def test_its_loss_is_noticed_without_a_statement(self, postgresql_storage: Storage) -> None:
        database, worker = postgresql_storage.database, Worker(postgresql_storage)
        holder = Holder(database)
        holder.hold(worker.id)
        holder.hold(worker.id)
        with database.read() as connection:
            terminate = (  # in this database: nodes of others have the same numbers
                "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_database ON pg_database.oid = database"
                " WHERE locktype = 'advisory' AND objid = :id AND datname = current_database()"
            )
            assert connection.execute(text(terminate), {"id": worker.id}).scalars().all() == [True]

        def is_noticed() -> bool:
            with suppress(Unavailable):
                holder.hold(worker.id)
                return False
            return True

        with counted() as statements:
            wait_until(is_noticed)
        holder.drop()
        assert not statements

    def test_a_new_id_takes_a_new_lock(self, storage: Storage, worker: Worker, other: Worker, holder: Holder) -> None:
        database = storage.database
        has_locks = database.dialect.name == "postgresql"

        def are_free() -> list[bool | None]:
            with database.read() as connection:
                return [nodes.is_lock_free(database, connection, one.id) for one in (worker, other)]

        holder.hold(worker.id)
        holder.hold(other.id)
        awaited = [True, False] if has_locks else [None, None]
        wait_until(lambda: are_free() == awaited, what="the server sees that the first lock's connection is gone")
