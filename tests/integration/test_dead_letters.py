"""Dead jobs: retried in place, so that their workflows go on; copied; and their history."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.exceptions import ChordError

from kathikon_celery import Kathikon, bulk
from kathikon_celery.job import Cause, State
from kathikon_celery.operate.kathikon import NotAllowed
from tests.integration.conftest import Jobs, Journal, Workers, on_one_database
from tests.support import apps
from tests.support.waiting import wait_until
from tests.support.workers import ROOT


@pytest.fixture
def operator(client: Celery) -> Kathikon:
    return Kathikon(client, operator="ada")


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that is not there yet."""
    return tmp_path / "gate"


# --- chords


def chord_of(*header: Any) -> Any:
    """Return the result of a chord's body, and that of its header."""
    result = chord(header)(apps.total.s())
    return result, result.parent


def test_a_retried_part_completes_its_chord(operator: Kathikon, jobs: Jobs, gate: Path, workers: Workers) -> None:
    workers()
    result, parts = chord_of(apps.add.s(1, 1), apps.fail_unless.s(str(gate), 5))
    assert isinstance(jobs.wait(result, State.DEAD) and operator.result(result.id).result, ChordError)
    gate.touch()
    operator.retry(parts[1])
    jobs.wait(result, State.COMPLETED)
    assert operator.result(result.id).get(timeout=60) == 7


def test_a_chord_completes_when_the_last_of_its_failed_parts_was_retried(
    operator: Kathikon, jobs: Jobs, gate: Path, workers: Workers
) -> None:
    workers()
    result, parts = chord_of(apps.fail_unless.s(str(gate), 1), apps.fail_unless.s(str(gate), 2), apps.add.s(3, 0))
    for part in parts[:2]:
        jobs.wait(part, State.DEAD)
    assert isinstance(jobs.wait(result, State.DEAD) and operator.result(result.id).result, ChordError)
    gate.touch()
    operator.retry(parts[0])
    jobs.wait(parts[0], State.COMPLETED)
    assert operator.result(result.id).state == "FAILURE"
    operator.retry(parts[1])
    jobs.wait(result, State.COMPLETED)
    assert operator.result(result.id).get(timeout=60) == 6


def test_a_retried_link_of_a_chain_in_a_header(operator: Kathikon, jobs: Jobs, gate: Path, workers: Workers) -> None:
    """The part is the end of the chain, which has never been sent."""
    workers()
    link = apps.fail_unless.s(str(gate), 5)
    link.freeze()
    result, _ = chord_of(apps.add.s(1, 1), chain(link, apps.add.s(10)))
    assert isinstance(jobs.wait(result, State.DEAD) and operator.result(result.id).result, ChordError)
    gate.touch()
    operator.retry(link.id)
    jobs.wait(result, State.COMPLETED)
    assert operator.result(result.id).get(timeout=60) == 17


@on_one_database
def test_a_part_that_is_retried_before_the_others_have_ended(
    operator: Kathikon, jobs: Jobs, gate: Path, tmp_path: Path, workers: Workers
) -> None:
    """The body does not fail for the part's old error."""
    workers(concurrency=2)
    other = tmp_path / "other"
    result, parts = chord_of(apps.wait_for_file.s(str(other)), apps.fail_unless.s(str(gate), "done"))
    jobs.wait(parts[1], State.DEAD)
    gate.touch()
    operator.retry(parts[1])
    jobs.wait(parts[1], State.COMPLETED)
    other.touch()
    jobs.wait(parts[0], State.COMPLETED)
    job = jobs.wait(result, State.COMPLETED, State.DEAD)
    assert "Dependency" not in (job.reason or "")


def test_a_cancelled_part_that_is_retried(operator: Kathikon, jobs: Jobs, workers: Workers) -> None:
    result, parts = chord_of(apps.add.s(1, 1), apps.add.s(2, 2).set(countdown=3600))
    workers()
    operator.cancel(parts[1].id)
    with pytest.raises(Exception, match="cancelled by hand"):
        result.get(timeout=60)
    operator.retry(parts[1])
    jobs.wait(result, State.COMPLETED)
    assert operator.result(result.id).get(timeout=60) == 6


def test_a_task_that_replaced_itself_is_not_retried_but_its_part(
    operator: Kathikon, jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    """Otherwise the parts would run twice."""
    workers()
    part = apps.fail_unless.s(str(gate), 5)
    result = apps.hand_over.delay(chord([part, apps.add.s(1, 1)], apps.total.s()))
    dead = jobs.wait(result, State.DEAD)
    assert dead.cause is Cause.CHILDREN
    with pytest.raises(NotAllowed, match="was replaced by others, one of which has not succeeded; nothing was done"):
        operator.retry(result)
    gate.touch()
    assert operator.jobs("dead").able("retry").count() == 1
    assert operator.jobs("dead").retry() == 1
    jobs.wait(result, State.COMPLETED)
    assert operator.result(result.id).get(timeout=60) == 7


# --- copies


def test_a_copy_runs_alone(operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers) -> None:
    workers()
    first = apps.append.si(journal.path, "first")
    last = chain(first, apps.append.si(journal.path, "second")).apply_async(priority=3)
    assert last.get(timeout=60) == "second"
    copy = operator.rerun(last.parent, reason="once more")
    assert (copy.rerun_of, copy.priority, copy.root_id) == (last.parent.id, 3, None)
    assert copy.id != last.parent.id
    assert operator.result(copy.id).get(timeout=60) == "first"
    assert jobs.wait(last.parent, State.COMPLETED).attempts == 1
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert journal.lines == ["first", "second", "first"]
    (_, *others, act) = operator.history(last.parent)
    assert (act.event, act.operator, act.text) == ("rerun", "ada", f"as {copy.id}")
    assert {event.event for event in others} >= {"completed"}
    assert operator.history(copy.id)[0].text == f"rerun of {last.parent.id}"


@on_one_database
def test_a_copy_of_a_chords_part_is_no_part(operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers) -> None:
    result, parts = chord_of(apps.add.s(1, 1), apps.add.s(2, 2).set(countdown=3600))
    copy = operator.rerun(parts[1])
    workers()
    assert operator.result(copy.id).get(timeout=60) == 4
    assert (copy.scheduled_at, copy.group_id) == (None, None)
    assert jobs.of(parts[1]).state is State.SCHEDULED
    assert not result.ready()


@on_one_database
def test_a_message_that_could_run_code_is_not_copied(client: Celery, operator: Kathikon) -> None:
    result = apps.add.apply_async((1, 1), serializer="pickle")
    with pytest.raises(NotAllowed, match="cannot run again: its message, application/x-python-serialize, cannot be"):
        operator.rerun(result.id)
    assert operator.jobs().count() == 1
    assert operator.acts() == []


# --- history


def test_the_history_of_a_job_that_fails_is_retried_and_rescued(
    operator: Kathikon, jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    first = workers(concurrency=1)
    result = apps.fail_unless.delay(str(gate), 5)
    dead = jobs.wait(result, State.DEAD)
    first.stop()
    operator.retry(result.id, reason="mended")
    second = workers(concurrency=1)
    jobs.wait(result, State.DEAD)
    second.stop()
    events = operator.history(result.id)
    # The start of a task that ends at once is not written.
    assert [event.event for event in events if event.event != "started"] == [
        "published", "failed", "dead", "retry", "claimed", "failed", "dead"
    ]  # fmt: skip
    retry = next(event for event in events if event.event == "retry")
    assert (retry.operator, retry.text) == ("ada", "mended")
    ends = [event for event in events if event.event == "dead"]
    assert ends[0].traceback == dead.traceback
    assert ends[0].text == f"raised: {dead.reason}"
    running = apps.wait_for_file.delay(str(gate), journal.path, "began")
    third = workers(concurrency=1)
    journal.wait(1)
    jobs.wait(running, State.RUNNING)
    third.kill9()
    workers(concurrency=1)
    journal.wait(2)
    gate.touch()
    assert running.get(timeout=60) == "done"
    assert "rescued" in [event.event for event in operator.history(running.id)]


def test_the_history_goes_with_the_job(operator: Kathikon, jobs: Jobs) -> None:
    kept, deleted = (apps.add.delay(1, 1) for _ in range(2))
    for result in (kept, deleted):
        operator.discard(result.id)
    assert operator.storage.delete(deleted.id) == 1
    with operator.storage.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT job FROM kathikon_history").scalars().all()
    assert rows == [kept.id]
    assert operator.jobs("discarded").delete(reason="old") == 1
    assert next((act.verb, act.changed, act.reason) for act in operator.acts()) == ("delete", 1, "old")
    with operator.storage.database.read() as connection:
        assert connection.exec_driver_sql("SELECT job FROM kathikon_history").scalars().all() == []


# --- bulk acts


def test_a_bulk_act_that_is_killed_can_be_called_again(
    operator: Kathikon, jobs: Jobs, database_url: str, tmp_path: Path
) -> None:
    with bulk():
        results = [apps.add.delay(number, 1) for number in range(60)]
    program = [sys.executable, "-m", "celery", "-A", "tests.support.apps", "kathikon"]
    environment = os.environ | {"KATHIKON_DATABASE_URL": database_url, "PYTHONPATH": str(ROOT)}
    command = [*program, "discard", "--state", "available", "--rate", "20/s", "--yes", "--reason", "a test"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: operator.jobs("discarded").count() >= 4, what="the act has begun")
        process.send_signal(signal.SIGKILL)
    (act,) = operator.acts()
    done = operator.jobs("discarded").count()
    assert 4 <= done < 60
    assert (act.verb, act.reason, act.ended_at, act.changed) == ("discard", "a test", None, done)
    assert json.loads(act.target) == {"states": ["available"]}
    assert operator.jobs("available").count() == 60 - done
    again = subprocess.run(
        [*program, "discard", "--state", "available", "--yes", "--json"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(again.stdout) == {"verb": "discard", "changed": 60 - done}
    assert {jobs.of(one).cause for one in results} == {Cause.GIVEN_UP}
    assert [(one.changed, one.ended_at is None) for one in operator.acts()] == [(60 - done, False), (done, True)]
