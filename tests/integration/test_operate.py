"""An operator's hands: cancel, retry, discard and explain, on jobs that real workers run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.bin.base import CLIContext
from celery.exceptions import TaskRevokedError
from click.testing import CliRunner, Result

from kathikon_celery import Kathikon, bulk
from kathikon_celery.cli import kathikon as command
from kathikon_celery.job import Cause, State
from kathikon_celery.operate.kathikon import NotAllowed
from kathikon_celery.storage.errors import NotFound
from tests.integration.conftest import Jobs, Journal, Workers
from tests.support import apps
from tests.support.waiting import wait_until


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that is not there yet."""
    return tmp_path / "gate"


@pytest.fixture
def operator(client: Celery) -> Kathikon:
    return Kathikon(client)


@pytest.fixture
def call(client: Celery) -> Callable[..., Result]:
    def call(*arguments: str, **options: Any) -> Result:
        context = CLIContext(app=client, no_color=True, workdir=None)
        return CliRunner().invoke(command, arguments, obj=context, **options)

    return call


def test_cancelled_without_a_worker_is_cancelled_for_good(
    operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers
) -> None:
    ready, due = apps.append.delay(journal.path, "ready"), apps.append.apply_async((journal.path, "due"), countdown=0.1)
    for result in (ready, due):
        job = operator.cancel(result.id)
        assert (job.state, job.cause, job.reason) == (State.CANCELLED, Cause.REVOKED, "cancelled by hand")
        with pytest.raises(NotAllowed, match="is cancelled; nothing was done: cancel is for jobs that are scheduled, "):
            operator.cancel(result.id)
    workers()
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    with pytest.raises(TaskRevokedError):
        ready.get(timeout=60)
    assert journal.lines == []
    assert {jobs.of(one).state for one in (ready, due)} == {State.CANCELLED}


def test_a_workflow_learns_that_its_part_was_cancelled(operator: Kathikon, workers: Workers) -> None:
    part = apps.add.apply_async((1, 1), countdown=3600).id
    result = chord([apps.add.s(1, 2), apps.add.s(3, 4).set(countdown=3600)])(apps.total.s())
    first, last = result.parent.results
    workers()
    assert first.get(timeout=60) == 3
    operator.cancel(last.id)
    with pytest.raises(TaskRevokedError, match="cancelled by hand"):
        result.get(timeout=60)
    assert operator.job(part).state is State.SCHEDULED


@pytest.mark.parametrize("terminate", [False, True])
def test_what_a_cancelled_task_returns_is_not_kept(
    operator: Kathikon, jobs: Jobs, journal: Journal, gate: Path, workers: Workers, terminate: bool
) -> None:
    worker = workers(concurrency=1)
    running = apps.wait_for_file.delay(str(gate), journal.path, "began")
    journal.wait(1)
    jobs.wait(running, State.RUNNING)
    operator.cancel(running.id, terminate=terminate)
    if not terminate:
        gate.touch()
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    with pytest.raises(TaskRevokedError):
        running.get(timeout=60)
    job = operator.job(running.id)
    assert (job.state, job.cause, job.crashes) == (State.CANCELLED, Cause.REVOKED, 0)
    assert worker.stop() == 0


def test_a_dead_job_is_retried_in_place_and_its_chain_goes_on(
    operator: Kathikon, jobs: Jobs, gate: Path, workers: Workers
) -> None:
    workers()
    last = chain(apps.fail_unless.s(str(gate), 5), apps.add.s(1)).delay()
    dead = jobs.wait(last.parent, State.DEAD)
    assert dead.cause is Cause.RAISED
    gate.touch()
    job = operator.retry(dead.id)
    assert (job.seq, job.attempts) == (dead.seq, 0)
    assert last.parent.get(timeout=60) == 5
    assert last.get(timeout=60) == 6
    assert [error["reason"] for error in jobs.of(last.parent).errors] == [error["reason"] for error in dead.errors]
    with pytest.raises(NotAllowed, match="is completed"):
        operator.retry(dead.id)


def test_a_retried_job_has_all_its_retries_and_does_not_expire(
    operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers
) -> None:
    workers()
    result = apps.retry_until_given_up.apply_async((journal.path,), expires=3600)
    first = jobs.wait(result, State.DEAD)
    assert len(journal.lines) == 3
    operator.retry(result.id)
    journal.wait(6)
    again = jobs.wait(result, State.DEAD)
    assert len(journal.lines) == 6
    assert (again.attempts, again.expires_at) == (first.attempts, None)


def test_a_bulk_verb_changes_what_fits(operator: Kathikon, jobs: Jobs, call: Callable[..., Result]) -> None:
    with bulk():
        mail = [apps.add.apply_async((n, 1), queue="mail") for n in range(15)]
        other = apps.add.apply_async((0, 1), queue="other")
    seen: list[int] = []
    options = ("--queue", "mail", "--state", "available")
    assert operator.jobs("available", queue="mail").count() == 15
    dry = call("discard", *options, "--dry-run")
    assert dry.exit_code == 0
    assert dry.output.startswith("Would discard 15 jobs.\nid ")
    refused = call("discard", *options, input="n\n")
    assert refused.exit_code == 1
    assert "Discard 15 jobs?" in refused.output
    assert {jobs.of(one).state for one in mail} == {State.AVAILABLE}
    assert operator.jobs("available", queue="mail").cancel(rate="50/s", progress=seen.append) == 15
    assert seen == [5, 10, 15]
    assert call("retry", "--queue", "mail", "--yes").stdout == "Retried 0 jobs.\n"  # without a state: the dead ones
    retried = call("retry", "--queue", "mail", "--state", "cancelled", "--yes")
    assert retried.exception is None, retried.exception
    assert (retried.exit_code, retried.stdout) == (0, "Retried 15 jobs.\n")
    assert {jobs.of(one).state for one in mail} == {State.AVAILABLE}
    assert jobs.of(other).fence == 1 or jobs.of(other).state is State.AVAILABLE
    discarded = call("discard", mail[0].id, "none", mail[1].id)
    assert discarded.exit_code == 1
    assert discarded.stdout == "Discarded 2 jobs.\n"
    assert discarded.stderr == "Error: there is no job 'none'\n"
    assert (jobs.of(mail[0]).state, jobs.of(mail[0]).cause) == (State.DISCARDED, Cause.GIVEN_UP)


def test_explanations(
    operator: Kathikon, jobs: Jobs, journal: Journal, gate: Path, workers: Workers, call: Callable[..., Result]
) -> None:
    def why(result: Any) -> str:
        return operator.explain(result.id).why

    waits = apps.wait_for_file.delay(str(gate), journal.path, "began")
    behind = apps.add.apply_async((1, 1), queue="mail")
    due = apps.add.apply_async((1, 1), countdown=3600)
    expired = apps.add.apply_async((1, 1), queue="mail", expires=-1)
    assert (why(waits), why(behind), why(due), why(expired)) == ("no_consumer", "no_consumer", "not_due", "expired")
    assert "no live worker consumes its queue 'mail'" in operator.explain(behind.id).text
    workers(concurrency=1)
    journal.wait(1)
    jobs.wait(waits, State.RUNNING)
    wait_until(lambda: why(apps.add.apply_async((1, 1))) in ("in_line", "claimed"), what="a worker's queues are known")
    assert why(waits) == "running"
    assert "(worker1@test)" in operator.explain(waits.id).text
    gate.touch()
    jobs.wait(waits, State.COMPLETED)
    shown = call("explain", waits.id, due.id)
    assert shown.output.startswith(f"{waits.id}: it is completed since ")
    with pytest.raises(NotFound, match="there is no job 'none'"):
        operator.explain("none")
