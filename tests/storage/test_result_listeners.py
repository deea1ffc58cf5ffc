"""Waits for results: entered where the database calls by name, called by whoever ends the job, left and pruned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from sqlalchemy import select

from kathikon_celery.job import State
from kathikon_celery.storage import Storage, result_listeners, results, tables
from kathikon_celery.storage.engine.wakeup import ENDED, OUTCOME, Wakeup
from tests.storage.actors import Worker, new_job

LISTENER = 4711


@pytest.fixture
def hearing(storage: Storage) -> Iterator[Wakeup]:
    """What a process waits on for results."""
    with closing(storage.database.hearing(LISTENER)) as wakeup:
        yield wakeup


def entered(storage: Storage) -> list[tuple[str, int]]:
    with storage.database.read() as connection:
        return [tuple(row) for row in connection.execute(select(tables.waits.c.job, tables.waits.c.listener))]


def heard(wakeup: Wakeup, timeout: float = 60.0) -> tuple[bool, list[str]]:
    """Whether somebody called, and what was said: of an outcome the job's key, after the same sign."""
    called = wakeup.wait(timeout)
    said, wakeup.named = wakeup.named, []
    return called, [OUTCOME + result_listeners.told(call[1:]).id if call[0] == OUTCOME else call for call in said]


def ended(storage: Storage, worker: Worker, how: str) -> None:
    """End the job ``job``, as whoever may write a result does."""
    storage.insert(new_job())
    written = {"status": "SUCCESS", "result": "1", "traceback": None, "meta": None}
    if how == "run":
        assert worker.store(worker.claim_one())
    elif how == "alone":
        worker.claim_one()
        results.store_alone(storage.database, "job", State.DEAD, **written | {"status": "FAILURE"})
    else:
        assert worker.end(worker.claim_one(), State.DEAD)
        with storage.database.write() as connection:
            assert results.tell(storage.database, connection, "job", **written | {"status": "FAILURE"})


@pytest.mark.parametrize("how", ["run", "alone", "told"])
def test_whoever_waits_is_called(storage: Storage, worker: Worker, hearing: Wakeup, how: str) -> None:
    by_name = storage.database.dialect.enters_waits
    assert result_listeners.enter(storage.database, ["job", "other"], LISTENER) == []
    assert sorted(entered(storage)) == ([("job", LISTENER), ("other", LISTENER)] if by_name else [])
    ended(storage, worker, how)
    assert heard(hearing) == (True, ["ojob"] if by_name else [])
    assert entered(storage) == ([("other", LISTENER)] if by_name else [])
    (job,) = result_listeners.look(storage.database, ["job", "other"])
    assert result_listeners.is_ready(job)


@pytest.mark.postgresql
def test_nobody_is_called_for_what_others_wait_for(postgresql_storage: Storage) -> None:
    storage, worker = postgresql_storage, Worker(postgresql_storage)
    with closing(storage.database.hearing(1)) as one, closing(storage.database.hearing(2)) as two:
        result_listeners.enter(storage.database, ["job"], 2)
        storage.insert(new_job("nobody's"))
        assert worker.store(worker.claim_one())
        storage.insert(new_job())
        assert worker.store(worker.claim_one())
        assert heard(two) == (True, ["ojob"])
        assert heard(one, 0) == (False, [])


@pytest.mark.postgresql
@pytest.mark.parametrize("how", ["run", "alone", "told"])
def test_a_call_says_what_a_look_would_find(postgresql_storage: Storage, how: str) -> None:
    storage, worker = postgresql_storage, Worker(postgresql_storage)
    with closing(storage.database.hearing(LISTENER)) as hearing:
        result_listeners.enter(storage.database, ["job"], LISTENER)
        ended(storage, worker, how)
        assert hearing.wait(60)
        (call,) = hearing.named
    (found,) = result_listeners.look(storage.database, ["job"])
    assert result_listeners.told(call.removeprefix(OUTCOME)) == replace(found, cause=None)


@pytest.mark.postgresql
@pytest.mark.parametrize(("result", "sign"), [("é" * 3800, OUTCOME), ("é" * 4000, ENDED), ("x" * 100_000, ENDED)])
def test_a_result_that_fits_into_no_call(postgresql_storage: Storage, result: str, sign: str) -> None:
    storage, worker = postgresql_storage, Worker(postgresql_storage)
    with closing(storage.database.hearing(LISTENER)) as hearing:
        storage.insert(new_job())
        result_listeners.enter(storage.database, ["job"], LISTENER)
        assert worker.store(worker.claim_one(), result=result)
        assert heard(hearing) == (True, [f"{sign}job"])
    assert [job.result for job in result_listeners.look(storage.database, ["job"])] == [result]


def test_news_are_told_and_the_wait_goes_on(storage: Storage, worker: Worker, hearing: Wakeup) -> None:
    by_name = storage.database.dialect.enters_waits
    storage.insert(new_job())
    job = worker.claim_one()
    result_listeners.enter(storage.database, ["job"], LISTENER)
    assert worker.store(job, None, status="PROGRESS", result="{}")
    assert heard(hearing) == (True, ["njob"] if by_name else [])
    assert result_listeners.look(storage.database, ["job"]) == []
    (found,) = result_listeners.look(storage.database, ["job"], ready=False)
    assert (found.state, found.status, found.result) == (State.CLAIMED, "PROGRESS", "{}")
    assert worker.store(job)
    assert heard(hearing) == (True, ["ojob"] if by_name else [])


def test_what_is_rolled_back_is_no_end(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    job = worker.claim_one()
    before = result_listeners.enter(storage.database, ["job"], LISTENER), entered(storage)
    written: dict[str, Any] = {"status": "SUCCESS", "result": "1", "traceback": None, "meta": None}

    def end_in_vain() -> NoReturn:
        with storage.database.write() as connection:
            assert results.end(
                storage.database, connection, job.hold, State.COMPLETED, reason=None, cause=None, **written
            )
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        end_in_vain()
    assert (result_listeners.look(storage.database, ["job"]), entered(storage)) == before


@pytest.mark.parametrize(
    ("state", "status", "is_ready"),
    [
        (State.AVAILABLE, None, False),
        (State.RUNNING, "STARTED", False),
        (State.RETRYABLE, "RETRY", False),
        (State.WAITING_FOR_CHILDREN, None, False),
        (State.COMPLETED, "PROGRESS", False),
        (State.COMPLETED, None, True),
        (State.CANCELLED, None, True),
        (State.DISCARDED, "REVOKED", True),
        (State.DEAD, "FAILURE", True),
        (State.RUNNING, "FAILURE", True),
    ],
)
def test_what_is_ready(storage: Storage, set_row: Any, state: State, status: str | None, is_ready: bool) -> None:
    storage.insert(new_job())
    set_row(state=state.value, status=status)
    (job,) = result_listeners.look(storage.database, ["job"], ready=False)
    assert result_listeners.is_ready(job) is is_ready
    for keys in (["job"], ["job", "other"]):
        assert len(result_listeners.look(storage.database, keys)) == is_ready
        assert len(result_listeners.enter(storage.database, keys, LISTENER)) == is_ready


def test_what_is_ready_is_not_entered(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    worker.store(worker.claim_one())
    (job,) = result_listeners.enter(storage.database, ["job"], LISTENER)
    assert (job.id, job.result, job.body) == ("job", "1", "")
    assert entered(storage) == []


def test_entered_twice_is_entered_once(storage: Storage) -> None:
    for _ in range(2):
        result_listeners.enter(storage.database, ["a", "b"], LISTENER)
    assert len(entered(storage)) == (2 if storage.database.dialect.enters_waits else 0)


def test_thousands(storage: Storage) -> None:
    names = [f"job-{number}" for number in range(2 * result_listeners.CHUNK + 1)]
    storage.insert_many([new_job(name) for name in names])
    assert result_listeners.enter(storage.database, names, LISTENER) == []
    assert len(result_listeners.look(storage.database, names, ready=False)) == len(names)
    result_listeners.leave(storage.database, names, LISTENER)
    assert entered(storage) == []


def test_leaving_is_ones_own(storage: Storage) -> None:
    result_listeners.enter(storage.database, ["job"], 1)
    result_listeners.enter(storage.database, ["job"], 2)
    result_listeners.leave(storage.database, ["job", "unknown"], 1)
    assert entered(storage) == ([("job", 2)] if storage.database.dialect.enters_waits else [])


def test_stale_waits_are_pruned(storage: Storage) -> None:
    result_listeners.enter(storage.database, ["job"], LISTENER)
    number = len(entered(storage))
    assert result_listeners.prune(storage.database) == 0
    assert result_listeners.prune(storage.database, -1.0) == number
    assert entered(storage) == []
