"""What every pool does with a task, and what becomes of its row."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from time import time

import pytest
from celery import Celery, Task
from celery.exceptions import Ignore, NotRegistered

from kathikon_celery import bulk
from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Journal, Workers
from tests.support import apps
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture(scope="module", params=["prefork", "threads", "solo", "gevent"])
def pool(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def worker(shared_workers: Workers, pool: str) -> WorkerProcess:
    if pool == "gevent":
        pytest.importorskip("gevent")
    for earlier in shared_workers.started:
        earlier.kill9()
    return shared_workers(pool=pool, name=pool, concurrency=2)


def test_tasks_run_and_return(app: Celery, jobs: Jobs) -> None:
    results = [apps.add.delay(number, 1) for number in range(20)]
    assert [result.get(timeout=60) for result in results] == [number + 1 for number in range(20)]
    for result in results:
        job = jobs.wait(result, State.COMPLETED)
        assert (job.attempts, job.crashes, job.errors, job.node_id) == (1, 0, [], None)
        assert job.inserted_at <= job.claimed_at <= job.ended_at


def test_results_of_many_are_written_together(app: Celery, jobs: Jobs) -> None:
    with bulk():
        sent = [apps.add.delay(number, 1) for number in range(300)]
        failing = apps.fail.delay("broken among many")
    assert [result.get(timeout=60) for result in sent] == [number + 1 for number in range(300)]
    with pytest.raises(ValueError, match="broken among many"):
        failing.get(timeout=60)
    ended = [jobs.wait(result, State.COMPLETED) for result in sent]
    assert {(job.attempts, job.status, job.node_id) for job in ended} == {(1, "SUCCESS", None)}
    ends = {job.ended_at for job in ended}
    took = (max(ends) - min(ends)).total_seconds()
    assert len(ends) < 200 or took > 1.0  # a machine that runs fewer than 300 a second has not much to share


def test_processes_of_a_pool_do_not_copy_what_they_share(app: Celery, pool: str) -> None:
    """A garbage collection would write into each object that there was when they were forked."""
    frozen = apps.frozen_objects.delay().get(timeout=60)
    assert frozen > 50_000 if pool == "prefork" else frozen == 0


def test_arguments_arrive_as_they_were(app: Celery) -> None:
    arguments = ["", "ü\u2028\U0001f600", None, 1.5, [1, {"a": []}], "x" * 100_000]
    assert apps.echo.delay(*arguments, key="wért").get(timeout=60) == [arguments, {"key": "wért"}]


def test_an_error_is_raised_in_the_caller_with_its_traceback(app: Celery, jobs: Jobs) -> None:
    result = apps.fail.delay("broken on purpose")
    with pytest.raises(ValueError, match=r"^broken on purpose$"):
        result.get(timeout=60)
    assert result.state == "FAILURE"
    assert "in fail" in result.traceback
    job = jobs.wait(result, State.DEAD)
    assert job.reason == "ValueError('broken on purpose')"
    assert "in fail" in job.traceback
    assert [(error["attempt"], error["reason"]) for error in job.errors] == [(1, job.reason)]


def test_a_retry_waits_in_the_same_row(app: Celery, jobs: Jobs, journal: Journal) -> None:
    result = apps.retry_then_succeed.delay(journal.path, 2, countdown=0.1)
    assert result.get(timeout=60) == 2
    assert journal.lines == [result.id] * 3
    job = jobs.wait(result, State.COMPLETED)

    def errors() -> list[tuple[int, str]]:
        return [(error["attempt"], error["reason"]) for error in jobs.wait(result, State.COMPLETED).errors]

    # The process that retries writes its error after the next run may have begun in another process.
    wait_until(lambda: errors() == [(1, "RuntimeError('try 1')"), (2, "RuntimeError('try 2')")], what="both errors")
    assert (job.attempts, job.crashes, job.reason) == (3, 0, None)
    waiting = apps.retry_then_succeed.delay(journal.path, 1, countdown=3600)
    assert jobs.wait(waiting, State.RETRYABLE).node_id is None
    wait_until(lambda: waiting.state == "RETRY", what="Celery's word for it")
    jobs.storage.delete(waiting.id)


def test_a_task_that_retries_in_vain_is_dead(app: Celery, jobs: Jobs, journal: Journal) -> None:
    result = apps.retry_until_given_up.delay(journal.path)
    with pytest.raises(OSError, match="still broken"):
        result.get(timeout=60)
    job = jobs.wait(result, State.DEAD)
    assert len(journal.lines) == 3
    # A child notes the failure after it has published the retry, which may be over by then.
    wait_until(lambda: len(jobs.of(result).errors) == 3, what="three failures noted")
    assert [error["attempt"] for error in jobs.of(result).errors] == [1, 2, 3]
    assert {error["reason"] for error in job.errors} == {"OSError('still broken')"}


def test_a_countdown_is_kept_in_the_table_and_met(
    app: Celery, jobs: Jobs, journal: Journal, worker: WorkerProcess
) -> None:
    before = time()
    result = apps.append.apply_async((journal.path, "countdown"), countdown=3.0)
    after = time()
    job = jobs.of(result)
    assert job.state is State.SCHEDULED
    assert before + 3.0 <= job.scheduled_at.timestamp() <= after + 3.0
    scheduled = app.control.inspect([worker.hostname], timeout=30).scheduled()[worker.hostname]
    assert result.id in [entry["request"]["id"] for entry in scheduled] or time() >= job.scheduled_at.timestamp()
    lines = journal.lines
    assert not lines or time() >= job.scheduled_at.timestamp()  # the answer may have taken that long
    assert result.get(timeout=60) == "countdown"
    assert jobs.of(result).claimed_at >= job.scheduled_at


def test_an_eta_is_met_whatever_its_zone(app: Celery, jobs: Jobs) -> None:
    eta = datetime.now(timezone(timedelta(hours=5))) + timedelta(seconds=0.5)
    result = apps.describe.apply_async(eta=eta)
    assert jobs.of(result).scheduled_at == eta
    assert datetime.fromisoformat(result.get(timeout=60)["eta"]) == eta
    assert jobs.of(result).claimed_at >= eta


def test_an_eta_that_is_past_is_now(app: Celery, jobs: Jobs) -> None:
    result = apps.add.apply_async((1, 1), eta=datetime.now(timezone.utc) - timedelta(days=1))
    assert result.get(timeout=60) == 2


def test_what_expired_is_discarded_and_does_not_run(app: Celery, jobs: Jobs, journal: Journal) -> None:
    result = apps.append.apply_async((journal.path, "late"), countdown=0.5, expires=0.1)
    in_time = apps.append.apply_async((journal.path, "in time"), countdown=0.6, expires=60)
    assert in_time.get(timeout=60) == "in time"
    job = jobs.wait(result, State.DISCARDED)
    assert job.reason == "expired"
    assert result.state == "REVOKED"
    assert journal.lines == ["in time"]


def test_a_rejected_job_is_discarded(app: Celery, jobs: Jobs) -> None:
    result = apps.reject.delay()
    job = jobs.wait(result, State.DISCARDED)
    assert "as asked" in job.reason


def test_a_rejected_job_that_is_requeued_runs_again(app: Celery, jobs: Jobs, journal: Journal) -> None:
    result = apps.reject_until_third_start.delay(journal.path, "again")
    assert result.get(timeout=60) == 3
    job = jobs.wait(result, State.COMPLETED)
    assert (job.attempts, job.crashes) == (3, 0)


def test_an_ignored_job_is_completed(app: Celery, jobs: Jobs) -> None:
    result = apps.ignore.delay()
    job = jobs.wait(result, State.COMPLETED)
    assert (job.result, job.errors, job.attempts) == (None, [], 1)
    assert not isinstance(result.result, Ignore)


def test_no_result_is_kept_where_none_is_wanted(app: Celery, jobs: Jobs, journal: Journal) -> None:
    results = [
        apps.append_without_result.delay(journal.path, "task"),
        apps.append.apply_async((journal.path, "call"), ignore_result=True),
    ]
    for result in results:
        job = jobs.wait(result, State.COMPLETED)
        assert (job.result, job.status) == (None, None)
    assert sorted(journal.lines) == ["call", "task"]


def test_an_error_is_kept_even_where_no_result_is_wanted(app: Celery, jobs: Jobs) -> None:
    job = jobs.wait(apps.fail.apply_async(("alas",), ignore_result=True), State.DEAD)
    assert job.reason == "ValueError('alas')"


def test_a_task_that_acknowledges_early_is_running_on_disk_before_it_starts(
    app: Celery, jobs: Jobs, journal: Journal, tmp_path: Path
) -> None:
    result = apps.wait_for_file_early.delay(str(tmp_path / "go on"), journal.path)
    journal.wait(1)
    job = jobs.of(result)
    assert (job.state, job.acked) == (State.RUNNING, True)
    (tmp_path / "go on").touch()
    assert result.get(timeout=60) == "done"
    job = jobs.wait(result, State.COMPLETED)
    assert (job.attempts, journal.lines) == (1, ["early"])


@pytest.mark.parametrize("task", [apps.collect, apps.collect_early])
def test_a_strategy_keeps_more_than_there_are_slots(app: Celery, jobs: Jobs, task: Task) -> None:
    batch = [task.delay() for _ in range(apps.COLLECTED)]
    assert {result.get(timeout=60) for result in batch} == {apps.COLLECTED}
    assert {jobs.wait(result, State.COMPLETED).attempts for result in batch} == {1}
    kept = [task.delay() for _ in range(apps.COLLECTED - 1)]
    for result in kept:
        jobs.wait(result, State.CLAIMED)
    assert apps.add.delay(1, 1).get(timeout=60) == 2  # the slots are free
    last = task.delay()
    assert {result.get(timeout=60) for result in [*kept, last]} == {apps.COLLECTED}


def test_a_failure_is_stored_after_a_strategys_acknowledgement(app: Celery, jobs: Jobs) -> None:
    for result in [apps.collect_early.delay("alas") for _ in range(apps.COLLECTED)]:
        with pytest.raises(ValueError, match="alas"):
            result.get(timeout=60)
        jobs.wait(result, State.COMPLETED)


def test_a_strategy_may_pass_on_what_runs_at_most_once(
    app: Celery, jobs: Jobs, journal: Journal, tmp_path: Path
) -> None:
    results = [apps.pass_on_early.delay(str(tmp_path / "go on"), journal.path) for _ in range(3)]
    journal.wait(1)
    wait_until(lambda: State.RUNNING in [jobs.of(result).state for result in results], what="one that runs")
    assert all(job.acked for job in map(jobs.of, results) if job.state is State.RUNNING)
    (tmp_path / "go on").touch()
    assert [result.get(timeout=60) for result in results] == ["done"] * 3
    assert (len(journal.lines), {jobs.wait(one, State.COMPLETED).attempts for one in results}) == (3, {1})


def test_many_tasks_that_acknowledge_early_run_once(app: Celery, jobs: Jobs, journal: Journal) -> None:
    results = [apps.append_early.delay(journal.path, str(number)) for number in range(30)]
    assert [result.get(timeout=60) for result in results] == [str(number) for number in range(30)]
    assert sorted(journal.lines, key=int) == [str(number) for number in range(30)]
    assert {jobs.wait(result, State.COMPLETED).attempts for result in results} == {1}


def test_a_task_that_acknowledges_early_and_raises_is_dead(app: Celery, jobs: Jobs) -> None:
    job = jobs.wait(apps.fail_early.delay("early"), State.DEAD)
    assert job.reason == "ValueError('early')"


def test_a_task_replaces_itself(app: Celery, jobs: Jobs) -> None:
    result = apps.replace.delay(2, 3)
    assert result.get(timeout=60) == 5
    job = jobs.wait(result, State.COMPLETED)
    assert (job.task, job.attempts) == ("tests.support.apps.add", 2)


def test_progress_is_seen_while_the_task_runs(app: Celery, jobs: Jobs, tmp_path: Path) -> None:
    result = apps.progress.delay(str(tmp_path / "go on"))
    wait_until(lambda: result.state == "PROGRESS", what="PROGRESS")
    assert result.info == {"done": 1, "of": 2}
    assert jobs.wait(result, State.RUNNING).status == "PROGRESS"
    (tmp_path / "go on").touch()
    assert result.get(timeout=60) == "done"
    assert result.state == "SUCCESS"


def test_a_long_task_is_seen_to_run(app: Celery, jobs: Jobs, tmp_path: Path) -> None:
    result = apps.wait_for_file.delay(str(tmp_path / "go on"))
    job = jobs.wait(result, State.RUNNING)
    assert job.started_at >= job.claimed_at
    (tmp_path / "go on").touch()
    assert result.get(timeout=60) == "done"


def test_a_task_that_the_worker_does_not_know_is_dead_and_kept(app: Celery, jobs: Jobs) -> None:
    result = app.send_task("tests.no_such_task", (1,))
    job = jobs.wait(result, State.DEAD)
    assert "NotRegistered" in job.reason
    assert job.body
    with pytest.raises(NotRegistered):
        result.get(timeout=60)


def test_a_task_knows_its_delivery(app: Celery, worker: WorkerProcess, pool: str) -> None:
    described = apps.describe.apply_async(priority=7).get(timeout=60)
    assert (described["priority"], described["queue"], described["hostname"]) == (7, "default", worker.hostname)
    assert described["eta"] is None
    banner = f"concurrency: 2 ({'thread' if pool == 'threads' else pool})"
    assert banner in worker.log
    assert "without mingle and gossip" in worker.log
    in_child = pool == "prefork"
    assert (described["ppid"] if in_child else described["pid"]) == worker.pid
    assert described["pid"] != os.getpid()


def test_a_retry_is_not_redelivered(app: Celery, journal: Journal) -> None:
    assert apps.how_delivered.delay(journal.path).get(timeout=60) == [False, False, True]


def test_higher_priorities_run_first(app: Celery, jobs: Jobs, journal: Journal, tmp_path: Path, pool: str) -> None:
    # One slot is free at a time: what two of them begin, one after the other, may be written in another order.
    gates = [tmp_path / "go on"] if pool == "solo" else [tmp_path / "go on", tmp_path / "the last"]
    for gate in gates:
        running = jobs.wait(apps.wait_for_file.delay(str(gate)), State.RUNNING, State.CLAIMED)
    # Until then the worker may claim ahead, by what it finished in the last moments.
    wait_until(lambda: (datetime.now(timezone.utc) - running.claimed_at).total_seconds() > 1.5, what="a calm pool")
    results = [apps.append.apply_async((journal.path, str(p)), priority=p) for p in (0, 5, -3, 255, 10)]
    gates[0].touch()
    assert [int(result.get(timeout=60)) for result in results] == [0, 5, -3, 255, 10]
    assert [int(line) for line in journal.lines] == [255, 10, 5, 0, -3]
    gates[-1].touch()
