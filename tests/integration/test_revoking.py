"""Revocations are written to the table first: they hold without a worker, after restarts, and for jobs that retry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import Celery, group
from celery.exceptions import TaskRevokedError

from kathikon_celery import Kathikon
from kathikon_celery.job import Cause, State
from tests.integration.conftest import Jobs, Journal, Workers, on_one_database
from tests.support import apps, outcomes
from tests.support.waiting import wait_until

OUTCOMES = "tests.support.outcomes"


def test_revoked_without_a_worker(client: Celery, jobs: Jobs, journal: Journal, workers: Workers) -> None:
    ready = apps.append.delay(journal.path, "ready")
    due = apps.append.apply_async((journal.path, "due"), countdown=3600)
    members = group(apps.append.s(journal.path, str(number)) for number in range(3)).delay()
    ready.revoke()
    client.control.revoke([due.id, "of nobody"])
    members.revoke()
    for result in (ready, due, *members):
        job = jobs.of(result)
        assert (job.state, job.cause, job.reason) == (State.CANCELLED, Cause.REVOKED, "revoked")
        assert result.state == "REVOKED"
    workers()
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert journal.lines == []
    with pytest.raises(TaskRevokedError):
        ready.get(timeout=60)
    assert client.AsyncResult("of nobody").state == "PENDING"


@on_one_database
def test_an_ended_job_keeps_its_end(client: Celery, jobs: Jobs, workers: Workers) -> None:
    workers()
    result = apps.add.delay(1, 1)
    assert result.get(timeout=60) == 2
    result.revoke()
    assert jobs.of(result).state is State.COMPLETED
    assert client.AsyncResult(result.id).get(timeout=60) == 2


def test_a_job_that_was_revoked_while_it_ran_does_not_retry(
    jobs: Jobs, journal: Journal, workers: Workers, tmp_path: Path
) -> None:
    """A worker that starts later has not heard of the revocation."""
    gate = tmp_path / "gate"
    first = workers(concurrency=1, app=OUTCOMES)
    result = outcomes.retry_when_there.delay(str(gate), journal.path)
    journal.wait(1)
    jobs.wait(result, State.RUNNING)
    result.revoke()
    assert jobs.of(result).state is State.RUNNING
    assert jobs.of(result).revoked_at is not None
    gate.touch()
    job = jobs.wait(result, State.CANCELLED)
    assert (job.cause, job.attempts) == (Cause.REVOKED, 1)
    first.stop()
    workers(app=OUTCOMES)
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert len(journal.lines) == 1
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)


def test_a_job_that_was_revoked_while_it_ran_is_not_run_again_after_its_worker_is_lost(
    jobs: Jobs, journal: Journal, workers: Workers, tmp_path: Path
) -> None:
    first = workers(concurrency=1)
    result = apps.wait_for_file.delay(str(tmp_path / "gate"), journal.path, "began")
    journal.wait(1)
    jobs.wait(result, State.RUNNING)
    result.revoke()
    first.kill9()
    workers()
    job = jobs.wait(result, State.CANCELLED)
    assert job.cause is Cause.REVOKED
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert len(journal.lines) == 1


@on_one_database
def test_a_task_that_runs_goes_on_and_its_result_counts(
    jobs: Jobs, journal: Journal, workers: Workers, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    workers(concurrency=1)
    result = apps.wait_for_file.delay(str(gate), journal.path, "began")
    journal.wait(1)
    jobs.wait(result, State.RUNNING)
    result.revoke()
    gate.touch()
    job = jobs.wait(result, State.COMPLETED, State.CANCELLED)
    assert job.state is State.COMPLETED


def test_terminated(jobs: Jobs, journal: Journal, workers: Workers, tmp_path: Path) -> None:
    workers(concurrency=1)
    running = apps.wait_for_file.delay(str(tmp_path / "gate"), journal.path, "began")
    behind = apps.append.delay(journal.path, "behind")
    journal.wait(1)
    jobs.wait(running, State.RUNNING)
    for result in (running, behind):
        result.revoke(terminate=True)
    for result in (running, behind):
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert journal.lines == ["began"]


@pytest.mark.parametrize("as_list", [False, True])
def test_revoked_by_stamps(client: Celery, jobs: Jobs, journal: Journal, workers: Workers, as_list: bool) -> None:
    def stamped(value: Any, line: str) -> Any:
        signature = apps.append.s(journal.path, line)
        signature.stamp(customer=value)
        return signature.delay()

    mine, listed, other = stamped("7", "mine"), stamped(["6", "7"], "listed"), stamped("8", "other")
    plain = apps.append.delay(journal.path, "plain")
    client.control.revoke_by_stamped_headers(["customer=7"] if as_list else {"customer": ["7", "9"]})
    assert [jobs.of(one).state for one in (mine, listed)] == [State.CANCELLED] * 2
    workers()
    assert [other.get(timeout=60), plain.get(timeout=60)] == ["other", "plain"]
    assert sorted(journal.lines) == ["other", "plain"]


@on_one_database
def test_a_command_for_one_worker_is_that_workers_alone(client: Celery, jobs: Jobs) -> None:
    result = apps.add.apply_async((1, 1), countdown=3600)
    client.control.revoke(result.id, destination=["nobody@nowhere"])
    assert jobs.of(result).state is State.SCHEDULED


def test_an_abortable_task_sees_that_its_job_was_cancelled(
    client: Celery, jobs: Jobs, journal: Journal, workers: Workers
) -> None:
    workers(concurrency=1, app=OUTCOMES)
    result = outcomes.work_until_aborted.delay(journal.path)
    journal.wait(1)
    jobs.wait(result, State.RUNNING)
    Kathikon(client).cancel(result.id)
    wait_until(lambda: "aborted" in journal.lines, what="the task sees that it is aborted")
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    assert jobs.of(result).state is State.CANCELLED


@pytest.mark.parametrize("how", ["revoked", "cancelled", "stamped"])
def test_an_operators_retry_holds_in_a_worker_that_remembers_the_revocation(
    client: Celery, jobs: Jobs, journal: Journal, workers: Workers, how: str
) -> None:
    operator, worker = Kathikon(client), workers(concurrency=1)
    signature = apps.append.s(journal.path, "ran")
    signature.stamp(customer="7")
    result = signature.apply_async(countdown=3600)
    if how == "stamped":
        client.control.revoke_by_stamped_headers({"customer": "7"}, reply=True, timeout=60, limit=1)
    elif how == "revoked":
        client.control.revoke(result.id, reply=True, timeout=60, limit=1)
    else:
        operator.cancel(result.id)
        client.control.revoke(result.id, reply=True, timeout=60, limit=1)
    assert worker.running
    assert jobs.wait(result, State.CANCELLED).attempts == 0
    operator.retry(result.id)
    assert operator.result(result.id).get(timeout=60) == "ran"
    result.revoke()
    assert jobs.of(result).state is State.COMPLETED


@on_one_database
def test_a_second_revocation_after_a_retry_holds(
    client: Celery, jobs: Jobs, journal: Journal, workers: Workers, tmp_path: Path
) -> None:
    operator = Kathikon(client)
    workers(concurrency=1)
    gate = tmp_path / "gate"
    result = apps.append.apply_async((journal.path, "ran"), countdown=3600)
    client.control.revoke(result.id, reply=True, timeout=60, limit=1)
    blocking = apps.wait_for_file.delay(str(gate), journal.path, "blocks")
    journal.wait(1)
    operator.retry(result.id)
    client.control.revoke(result.id, reply=True, timeout=60, limit=1)
    gate.touch()
    assert blocking.get(timeout=60) == "done"
    assert jobs.wait(result, State.CANCELLED).cause is Cause.REVOKED
    assert journal.lines == ["blocks"]
