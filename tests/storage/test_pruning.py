"""Pruning by retention, deleting, and purging."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest

from kathikon_celery.job import TERMINAL, State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage, acts, prune
from kathikon_celery.storage.names import key
from tests.storage.actors import Worker, new_job, the_job
from tests.support.statements import counted

AGE = 3600.0


def ended(storage: Storage, set_row: Callable[..., None], job_id: str, state: State, age: float) -> None:
    storage.insert(new_job(job_id))
    set_row(job_id, state=state.value, ended_at=datetime.now(timezone.utc) - timedelta(seconds=age))


@pytest.fixture
def with_one_of_each(storage: Storage, set_row: Callable[..., None]) -> None:
    for state in sorted(TERMINAL):
        ended(storage, set_row, f"old {state}", state, AGE + 60)
        ended(storage, set_row, f"new {state}", state, AGE - 60)
    storage.insert(new_job("waits"))


def url_of(storage: Storage) -> str:
    return storage.database.url.render_as_string(hide_password=False)


@pytest.mark.usefixtures("with_one_of_each")
def test_the_dead_are_kept_unless_the_setting_says_otherwise(storage: Storage) -> None:
    with closing(Storage(url_of(storage), Settings(retention_period=AGE))) as one:
        assert set(one.prunable_jobs()) == {"old cancelled", "old completed", "old discarded"}
        assert one.prune() == 3
        assert one.prune() == 0
    with closing(Storage(url_of(storage), Settings(retention_period={"dead": AGE, "completed": None}))) as one:
        assert one.prunable_jobs() == ["old dead"]
        assert one.prune() == 1
    assert "waits" in {job.id for job in storage.all()}


@pytest.mark.usefixtures("with_one_of_each")
def test_each_state_has_its_own_retention(storage: Storage) -> None:
    retention = {State.COMPLETED: AGE - 120, State.DEAD: None, State.CANCELLED: AGE, State.DISCARDED: AGE * 2}
    assert set(storage.prunable_jobs(retention=retention)) == {"old completed", "new completed", "old cancelled"}
    assert prune.prune(storage.database, retention) == 3
    assert storage.prunable_jobs(retention=retention) == []


def test_from_the_front_on_nothing_is_left_out(storage: Storage, set_row: Callable[..., None]) -> None:
    for number in range(6):
        ended(storage, set_row, str(number), State.COMPLETED, AGE + 100 - number)
    retention, fronts = {State.COMPLETED: AGE, State.CANCELLED: AGE}, dict[State, datetime]()
    assert prune.prune(storage.database, retention, 2, fronts) == 2
    with counted("DELETE") as statements:
        assert prune.prune(storage.database, retention, 2, fronts) == 2
    assert [">=" in one for one in statements] == [storage.database.dialect.keeps_old_rows]
    ended(storage, set_row, "late", State.COMPLETED, AGE + 1000)  # its end was committed after the others'
    ended(storage, set_row, "other", State.CANCELLED, AGE + 1000)
    assert prune.prune(storage.database, retention, 10, fronts) == 4
    assert storage.all() == []
    ended(storage, set_row, "again", State.COMPLETED, AGE + 1000)
    assert prune.prune(storage.database, retention, 10, fronts) == 1


def test_chunks_take_the_oldest_first(storage: Storage, set_row: Callable[..., None]) -> None:
    for number in range(10):
        ended(storage, set_row, str(number), State.COMPLETED, AGE + 100 - number)
    retention = {State.COMPLETED: AGE, State.CANCELLED: AGE}
    assert storage.prunable_jobs(4, retention) == ["0", "1", "2", "3"]
    assert prune.prune(storage.database, retention, 4) == 4
    assert storage.prunable_jobs(4, retention) == ["4", "5", "6", "7"]


def test_a_limit_counts_over_all_states(storage: Storage, set_row: Callable[..., None]) -> None:
    for state in (State.COMPLETED, State.CANCELLED):
        for number in range(3):
            ended(storage, set_row, f"{state} {number}", state, AGE * 2)
    retention = {State.COMPLETED: AGE, State.CANCELLED: AGE}
    assert len(storage.prunable_jobs(4, retention)) == 4
    assert prune.prune(storage.database, retention, 4) == 4
    assert len(storage.all()) == 2


def test_a_job_that_is_published_again_meanwhile_is_not_pruned(storage: Storage, set_row: Callable[..., None]) -> None:
    ended(storage, set_row, "job", State.COMPLETED, AGE * 2)
    storage.insert(new_job())
    assert prune.prune(storage.database, {State.COMPLETED: AGE}) == 0
    assert the_job(storage).state is State.AVAILABLE


def test_what_update_ended_is_pruned(storage: Storage) -> None:
    storage.insert(new_job())
    job = the_job(storage)
    job.state = State.CANCELLED
    storage.update(job)
    assert prune.prune(storage.database, {State.CANCELLED: -1.0}) == 1


def test_the_history_of_pruned_jobs_goes_with_them(storage: Storage, set_row: Callable[..., None]) -> None:
    for number in range(5):
        ended(storage, set_row, str(number), State.COMPLETED, AGE + 100 - number)
    with storage.database.write() as connection:
        acts.note(connection, [key("1"), key("4")], "rescued", None)
    assert prune.prune(storage.database, {State.COMPLETED: AGE}, 3, {}) == 3
    with storage.database.read() as connection:
        assert acts.history_of(connection, "1") == []
        assert [event.event for event in acts.history_of(connection, "4")] == ["rescued"]


def test_prunable_ids_may_be_deleted_whatever_their_length(storage: Storage, set_row: Callable[..., None]) -> None:
    long = "x" * 1000
    ended(storage, set_row, long, State.COMPLETED, AGE * 2)
    assert storage.delete(storage.prunable_jobs(retention={State.COMPLETED: AGE})) == 1
    assert storage.all() == []


def test_purge_deletes_what_waits_in_one_queue(storage: Storage, worker: Worker, set_row: Callable[..., None]) -> None:
    storage.insert_many([new_job(state.value) for state in State] + [new_job("elsewhere", queue="mails")])
    for state in State:
        set_row(state.value, state=state.value)
    with storage.database.write() as connection:
        assert prune.purge(connection, "default") == 4
    waiting = {"scheduled", "retryable", "available", "blocked"}
    assert {job.id for job in storage.all()} == {state.value for state in State} - waiting | {"elsewhere"}
