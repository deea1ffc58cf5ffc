"""Signals of jobs, in the process that writes what happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from kathikon_celery import Kathikon, signals
from kathikon_celery.job import Cause, State
from kathikon_celery.storage import events
from tests.integration.conftest import Jobs, Journal, Workers
from tests.support import apps
from tests.support.waiting import wait_until


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    found: list[tuple[Any, ...]] = []

    def hear(sender: str, signal: Any, job_id: str, queue: str, cause: Any, **_: Any) -> None:
        found.append((signal.name, sender, job_id, queue, cause))

    monkeypatch.setattr(events, "_everywhere", [])
    every = (signals.job_dead, signals.job_cancelled, signals.job_discarded, signals.job_completed)
    for one in every:
        one.connect(hear, weak=False)
    yield found
    for one in every:
        one.disconnect(hear)


def test_signals_of_an_operators_acts(client: Celery, heard: list[tuple[Any, ...]]) -> None:
    operator = Kathikon(client)
    first, second = apps.add.delay(1, 1), apps.add.apply_async((1, 1), queue="mail")
    operator.cancel(first.id)
    operator.discard(second.id)
    second.revoke()
    task = "tests.support.apps.add"
    assert heard == [
        ("job_cancelled", task, first.id, "default", Cause.REVOKED),
        ("job_discarded", task, second.id, "mail", Cause.GIVEN_UP),
    ]
    apps.add.apply_async((1, 1), task_id="3").revoke()
    assert heard[-1] == ("job_cancelled", task, "3", "default", Cause.REVOKED)


def test_signals_in_a_worker(jobs: Jobs, journal: Journal, workers: Workers) -> None:
    first = workers(app="tests.support.signalled", env={"SIGNALS": journal.path}, concurrency=1)
    result = apps.fail.delay("no")
    jobs.wait(result, State.DEAD)
    wait_until(lambda: f"job_dead {result.id} raised" in journal.lines, what="the signal of a dead job")
    early = apps.add.apply_async((1, 1), expires=-1)
    wait_until(lambda: f"job_discarded {early.id} expired" in journal.lines, what="the signal of an expired job")
    first.stop()
    doomed = workers(concurrency=1)
    running = apps.append.delay(journal.path, "began", 60)
    wait_until(lambda: "began" in journal.lines, what="the task begins")
    workers(app="tests.support.signalled", env={"SIGNALS": journal.path}, concurrency=1)
    doomed.kill9()
    wait_until(lambda: f"job_rescued {running.id} None" in journal.lines, what="the signal of a rescued job")
