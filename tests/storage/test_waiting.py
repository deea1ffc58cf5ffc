"""Threads of one process that wait for results: who listens, who is woken, and what a lost database does to them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import select, text

from kathikon_celery.results import desk as desks
from kathikon_celery.results import wanted
from kathikon_celery.results.waiting import Wait
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage, tables
from tests.storage.actors import Worker, new_job
from tests.support.statements import counted
from tests.support.waiting import wait_until

#: Seconds between looks without a call: whoever is woken sooner was called.
NEVER = 1000.0


@pytest.fixture
def own(database_url: str) -> Iterator[Storage]:
    """A storage that nobody else uses."""
    with closing(Storage(database_url, Settings())) as storage:
        storage.setup()
        yield storage


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(60) as executor:
        yield executor


def wait_for(storage: Storage, *ids: str, timeout: float = 60.0, interval: float = NEVER) -> list[str]:
    """The ids of the jobs in the order in which they become ready."""
    found: list[str] = []
    deadline = monotonic() + timeout
    with Wait(storage.database, ids, interval) as wait:
        while wait.open and monotonic() < deadline:
            found += [job.id for job in wait.take(deadline - monotonic())]
    return found


def publish(storage: Storage, *ids: str) -> Callable[[str], None]:
    """Publish jobs, and return what ends one of them."""
    storage.insert_many([new_job(job_id) for job_id in ids])
    worker = Worker(storage)
    claimed = {job.id: job for job in worker.claim(len(ids))}

    def end(job_id: str) -> None:
        assert worker.store(claimed[job_id])

    return end


def desk(storage: Storage) -> Any:
    return desks._desks[storage.database]


def until_waiting(storage: Storage, number: int) -> None:
    """Return when so many wait, all of them asleep but the one who listens."""

    def are_there() -> bool:
        known = desks._desks.get(storage.database)
        if known is None:
            return False
        with known.lock:
            return (
                len(known._waits) == number
                and known._leader is not None
                and all(one.sleeps or one is known._leader for one in known._waits)
            )

    wait_until(are_there, 30, f"{number} waiting")


def listeners(storage: Storage) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
    with storage.database.read() as connection:
        return int(connection.execute(text(query)).scalar_one())


def test_who_waits_is_woken(own: Storage, pool: ThreadPoolExecutor) -> None:
    end = publish(own, "job")
    waiter = pool.submit(wait_for, own, "job")
    until_waiting(own, 1)
    end("job")
    assert waiter.result(60) == ["job"]


def test_what_is_ready_needs_no_waiting(own: Storage) -> None:
    publish(own, "job")("job")
    with Wait(own.database, ["job"], NEVER) as wait:
        assert [job.id for job in wait.take(0)] == ["job"]
        assert (wait.open, wait.take(60)) == ({}, [])


def test_the_time_is_up(own: Storage) -> None:
    publish(own, "job")
    assert wait_for(own, "job", timeout=0.2) == []
    with own.database.read() as connection:
        assert connection.execute(select(tables.waits)).all() == []
    assert (desk(own)._waits, desk(own)._by_key, desk(own)._entered) == ({}, {}, set())


def test_many_threads_share_one_listener(own: Storage, pool: ThreadPoolExecutor) -> None:
    ids = [str(number) for number in range(50)]
    end = publish(own, *ids)
    waiters = [pool.submit(wait_for, own, job_id) for job_id in ids]
    until_waiting(own, 50)
    if own.database.dialect.name == "postgresql":
        assert listeners(own) == 1
    for job_id in reversed(ids):  # some of them listen at that time, some do not
        end(job_id)
    assert [waiter.result(60) for waiter in waiters] == [[job_id] for job_id in ids]
    assert (desk(own)._waits, desk(own)._by_key, desk(own)._entered, desk(own)._leader) == ({}, {}, set(), None)


def test_two_wait_for_the_same(own: Storage, pool: ThreadPoolExecutor) -> None:
    end = publish(own, "job", "other")
    both = pool.submit(wait_for, own, "job", "other")
    one = pool.submit(wait_for, own, "job")
    vain = pool.submit(wait_for, own, "job", timeout=0.2)
    assert vain.result(60) == []  # who goes takes nothing away from those who stay
    until_waiting(own, 2)
    end("job")
    assert one.result(60) == ["job"]
    end("other")
    assert both.result(60) == ["job", "other"]


def test_a_thousand_cost_a_handful_of_queries(own: Storage, pool: ThreadPoolExecutor) -> None:
    ids = [str(number) for number in range(1000)]
    end = publish(own, *ids)
    for job_id in ids[:500]:
        end(job_id)
    with counted(all_threads=True) as statements:
        waiter = pool.submit(wait_for, own, *ids)
        until_waiting(own, 1)
    looks = [statement for statement in statements if "FROM kathikon_jobs" in statement]
    assert len(looks) <= 1 + len(wanted.DOUBTS)  # a slow machine may get to all of them
    begin = monotonic()
    with counted(all_threads=True) as statements:
        for job_id in ids[500:]:
            end(job_id)
        assert sorted(waiter.result(60)) == sorted(ids)
    looks = [statement for statement in statements if statement.lstrip().startswith("SELECT kathikon_jobs.id")]
    # Of 500 that end one by one. The fewer are awaited, the shorter are the pauses: what ends slowly is seen sooner.
    assert len(looks) < 50 + 25 * (monotonic() - begin)
    assert looks or own.database.dialect.enters_waits  # where a call says the outcome nobody need look


def test_an_error_in_the_listening_thread_leaves_no_one_alone(own: Storage, pool: ThreadPoolExecutor) -> None:
    end = publish(own, "job", "other")
    is_leading, go_on = threading.Event(), threading.Event()

    def interrupted() -> None:
        with Wait(own.database, ["other"], NEVER) as wait:
            wait.take(0)
            is_leading.set()
            while not go_on.is_set():
                wait.take(0.05)
            raise KeyboardInterrupt

    first = pool.submit(interrupted)
    assert is_leading.wait(30)
    waiter = pool.submit(wait_for, own, "job")
    wait_until(lambda: len(desk(own)._waits) == 2)
    go_on.set()
    with pytest.raises(KeyboardInterrupt):
        first.result(60)
    until_waiting(own, 1)
    end("job")
    assert waiter.result(60) == ["job"]


def test_who_is_interrupted_hands_over_at_once(own: Storage, pool: ThreadPoolExecutor) -> None:
    """KeyboardInterrupt comes in the midst of listening."""
    end = publish(own, "job")
    first = pool.submit(wait_for, own, "other")
    until_waiting(own, 1)
    second = pool.submit(wait_for, own, "job")
    until_waiting(own, 2)
    known = desk(own)

    def fail(timeout: float) -> bool:
        del known._wakeup.wait
        raise KeyboardInterrupt

    known._wakeup.wait = fail
    known._wakeup.notify()
    with pytest.raises(KeyboardInterrupt):
        first.result(60)
    until_waiting(own, 1)
    end("job")
    assert second.result(60) == ["job"]


def test_a_look_finds_what_nobody_called_for(own: Storage, pool: ThreadPoolExecutor) -> None:
    publish(own, "job")
    waiter = pool.submit(wait_for, own, "job", interval=0.05)
    until_waiting(own, 1)
    with own.database.write() as connection:
        connection.execute(text("UPDATE kathikon_jobs SET state = 'completed', node_id = NULL"))
    assert waiter.result(60) == ["job"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_fork_in_the_middle(own: Storage, pool: ThreadPoolExecutor) -> None:
    end = publish(own, "mine", "childs")
    waiter = pool.submit(wait_for, own, "mine")
    until_waiting(own, 1)
    with Wait(own.database, ["childs"], NEVER) as wait:
        assert wait.take(0) == []
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:  # the same wait goes on in the child, with a listener of its own
                assert wait.take(0) == []
                os.write(write, b"ready")
                found = [job.id for job in wait.take(60)]
                wait.close()
                desks.close_all()
                os._exit(0 if found == ["childs"] else 1)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(2)
        assert os.read(read, 5) == b"ready"
        end("childs")
        assert os.waitpid(pid, 0)[1] == 0
        assert [job.id for job in wait.take(60)] == ["childs"]
    end("mine")
    assert waiter.result(60) == ["mine"]


def test_closing_listens_no_longer_unless_somebody_waits(own: Storage, pool: ThreadPoolExecutor) -> None:
    end = publish(own, "job")
    waiter = pool.submit(wait_for, own, "job")
    until_waiting(own, 1)
    own.close()
    end("job")
    assert waiter.result(60) == ["job"]
    own.close()
    assert own.database not in desks._desks
    publish(own, "next")("next")
    assert wait_for(own, "next") == ["next"]


@pytest.mark.postgresql
class TestLostConnections:
    @pytest.fixture
    def own(self, postgresql_url: str) -> Iterator[Storage]:
        with closing(Storage(postgresql_url, Settings())) as storage:
            storage.setup()
            yield storage

    def terminate(self, storage: Storage, *, listener_only: bool) -> None:
        query = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE :queries"
        )
        with storage.database.read() as connection:
            terminated = connection.execute(text(query), {"queries": "LISTEN%" if listener_only else "%"})
            assert terminated.scalar_one() > 0

    @pytest.mark.parametrize("listener_only", [True, False])
    def test_who_waits_listens_anew(self, own: Storage, pool: ThreadPoolExecutor, listener_only: bool) -> None:
        end = publish(own, "job")
        waiter = pool.submit(wait_for, own, "job")
        until_waiting(own, 1)
        self.terminate(own, listener_only=listener_only)
        wait_until(lambda: listeners(own) == 1)
        end("job")
        assert waiter.result(60) == ["job"]

    def test_the_first_wait_of_a_process_whose_connections_were_cut(self, own: Storage) -> None:
        end = publish(own, "job")
        with own.database.read() as one, own.database.read() as other:  # both stay in the pool
            assert one is not other
        self.terminate(own, listener_only=False)
        end("job")
        assert wait_for(own, "job") == ["job"]

    def test_the_first_wait_while_the_server_is_away(
        self, own_postgresql_server: Any, pool: ThreadPoolExecutor
    ) -> None:
        with closing(Storage(own_postgresql_server.url, Settings())) as storage:
            storage.setup()
            end = publish(storage, "job")
            end("job")
            own_postgresql_server.stop()
            waiter = pool.submit(wait_for, storage, "job")
            wait_until(lambda: desk(storage).loss is not None)
            own_postgresql_server.start()
            assert waiter.result(60) == ["job"]

    def test_a_server_that_was_away(self, own_postgresql_server: Any, pool: ThreadPoolExecutor) -> None:
        with closing(Storage(own_postgresql_server.url, Settings())) as storage:
            storage.setup()
            end = publish(storage, "job")
            waiters: list[Future[list[str]]] = [pool.submit(wait_for, storage, "job") for _ in range(3)]
            until_waiting(storage, 3)
            own_postgresql_server.stop()
            wait_until(lambda: desk(storage).loss is not None)
            with Wait(storage.database, ["job"], NEVER) as wait:
                assert (wait.take(0), "is away" in str(wait.loss)) == ([], True)
            own_postgresql_server.start()
            wait_until(lambda: desk(storage).loss is None, 30)
            end("job")
            assert [waiter.result(60) for waiter in waiters] == [["job"]] * 3

    def test_a_server_that_stays_away(
        self, own_postgresql_server: Any, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(desks, "GIVE_UP", 1.0)
        with closing(Storage(own_postgresql_server.url, Settings())) as storage:
            storage.setup()
            publish(storage, "job")
            waiters = [pool.submit(wait_for, storage, "job") for _ in range(3)]
            until_waiting(storage, 3)
            own_postgresql_server.stop("immediate")
            for waiter in waiters:
                with pytest.raises(Exception, match="is away"):
                    waiter.result(60)
