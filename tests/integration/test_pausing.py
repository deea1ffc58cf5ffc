"""Pauses of queues, tasks and everything, with real workers."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from celery import Celery

from kathikon_celery import Kathikon
from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Journal, Workers, on_one_database
from tests.support import apps
from tests.support.waiting import wait_until


@pytest.fixture
def operator(client: Celery) -> Kathikon:
    return Kathikon(client, operator="ada")


@pytest.mark.each_pool
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_paused_queue_waits_and_goes_on_in_its_order(
    operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers, pool: str
) -> None:
    workers(pool=pool, concurrency=1, args=["-Q", "default,mail"])
    assert apps.add.apply_async((1, 1), queue="mail").get(timeout=60) == 2
    operator.pause_queue("mail", reason="a bad deploy")
    held = [apps.append.apply_async((journal.path, str(number)), queue="mail") for number in range(3)]
    assert [apps.add.delay(1, number).get(timeout=60) for number in range(3)] == [1, 2, 3]
    assert {jobs.of(one).state for one in held} == {State.AVAILABLE}
    assert {jobs.of(one).attempts for one in held} == {0}
    explained = operator.explain(held[0].id)
    assert explained.why == "paused"
    assert explained.text.endswith(" by ada: a bad deploy")
    assert operator.resume_queue("mail")
    assert [one.get(timeout=60) for one in held] == ["0", "1", "2"]
    assert journal.lines == ["0", "1", "2"]
    assert not operator.resume_queue("mail")


def test_what_runs_goes_on_and_a_new_worker_obeys(
    operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    workers(concurrency=1)
    running = apps.wait_for_file.delay(str(gate), journal.path, "began")
    journal.wait(1)
    operator.pause_all()
    held = apps.add.delay(1, 1)
    gate.touch()
    assert running.get(timeout=60) == "done"
    second = workers(concurrency=1)
    wait_until(lambda: operator.status().workers == 2, what="the second worker is there")
    assert operator.result(held.id).app.control.inspect(destination=[second.hostname], timeout=60).ping()
    assert jobs.of(held).state is State.AVAILABLE
    operator.resume_all()
    assert held.get(timeout=60) == 2


def test_a_paused_task_is_passed_over(operator: Kathikon, jobs: Jobs, workers: Workers) -> None:
    held = [apps.echo.delay(number) for number in range(3)]
    operator.pause_task("tests.support.apps.ech*")
    workers()
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    held.append(apps.echo.delay(3))
    assert apps.add.delay(1, 2).get(timeout=60) == 3
    assert {jobs.of(one).state for one in held} == {State.AVAILABLE}
    assert {jobs.of(one).attempts for one in held} == {0}
    assert operator.explain(held[0].id).why == "paused"
    (stats,) = operator.result(held[0].id).app.control.inspect(["worker1@test"], timeout=60).stats().values()
    assert stats["paused"] == {"everything": False, "queues": [], "tasks": ["tests.support.apps.ech*"]}
    operator.resume_task("tests.support.apps.ech*")
    assert [one.get(timeout=60) for one in held] == [[[number], {}] for number in range(4)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_worker_that_polls_obeys(operator: Kathikon, jobs: Jobs, workers: Workers) -> None:
    """As behind a pooler, where nobody can call a worker."""
    worker = workers(conf={"kathikon_wake": "poll"})
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    operator.pause_queue("default")
    inspect = operator.result("x").app.control.inspect([worker.hostname], timeout=60)
    wait_until(lambda: inspect.stats()[worker.hostname]["paused"]["queues"] == ["default"], what="the worker knows")
    held = apps.add.delay(1, 2)
    assert inspect.ping()
    assert jobs.of(held).state is State.AVAILABLE
    operator.resume_queue("default")
    assert held.get(timeout=60) == 3


def test_a_pause_ends_by_itself(operator: Kathikon, workers: Workers) -> None:
    workers()
    operator.pause_queue("default", until=timedelta(seconds=1.5))
    held = apps.add.delay(1, 1)
    (pause,) = operator.pauses()
    assert pause.until is not None
    assert held.get(timeout=60) == 2
    assert operator.pauses() == []
    assert operator.job(held.id).claimed_at >= pause.until  # type: ignore[operator]


@on_one_database
def test_what_is_refused(operator: Kathikon) -> None:
    with pytest.raises(ValueError, match="has no time zone"):
        operator.pause_queue("mail", until=datetime(2030, 1, 1))  # noqa: DTZ001 (that is the mistake)
    with pytest.raises(ValueError, match="has no name"):
        operator.pause_queue("")
    assert operator.pauses() == []
    for past in (datetime(2000, 1, 1, tzinfo=timezone.utc), timedelta(0), timedelta(seconds=-5)):
        with pytest.raises(ValueError, match="is not in the future"):
            operator.pause_queue("mail", until=past)
    with pytest.raises(TypeError, match="until = '30m' is neither a moment nor a time"):
        operator.pause_queue("mail", until="30m")  # type: ignore[arg-type]
    assert (operator.pauses(), operator.acts()) == ([], [])


@on_one_database
def test_a_second_pause_replaces_the_first(operator: Kathikon) -> None:
    operator.pause_queue("mail", reason="one")
    since = operator.pauses()[0].since
    Kathikon(operator.storage, "bob").pause_queue("mail", reason="two")
    (pause,) = operator.pauses()
    assert (pause.since, pause.operator, pause.reason) == (since, "bob", "two")
    assert [(act.verb, act.target, act.operator) for act in operator.acts()] == [
        ("pause", "queue mail", "bob"),
        ("pause", "queue mail", "ada"),
    ]
