"""Warm, soft and cold shutdowns of a worker, on each pool: what runs ends once, the rest is at once for others."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from celery import Celery
from celery.result import AsyncResult

from kathikon_celery import bulk
from kathikon_celery.consume.delivery import LOST
from kathikon_celery.job import Cause, Job, State
from tests.integration.conftest import Jobs, Journal, Workers, on_one_database
from tests.support import apps
from tests.support.workers import WorkerProcess

pytestmark = pytest.mark.each_pool


@pytest.fixture(params=["prefork", "threads", "gevent", "solo"])
def pool(request: pytest.FixtureRequest) -> str:
    if request.param == "gevent":
        pytest.importorskip("gevent")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Tasks wait for this file."""
    return tmp_path / "gate"


@pytest.fixture
def slots(pool: str) -> int:
    return 1 if pool == "solo" else 2


@pytest.fixture
def running(client: Celery, jobs: Jobs, journal: Journal, gate: Path, slots: int) -> list[AsyncResult]:
    """Tasks that wait for the gate, one for each slot: with late acknowledgement, and with an early one."""
    sent = [apps.wait_for_file.delay(str(gate), journal.path, "late")]
    if slots > 1:
        sent.append(apps.wait_for_file_early.delay(str(gate), journal.path))
    return sent


def begin(worker: WorkerProcess, jobs: Jobs, journal: Journal, running: list[AsyncResult]) -> WorkerProcess:
    """Wait until all tasks have begun, also by their rows."""
    journal.wait(len(running))
    for result in running:
        jobs.wait(result, State.RUNNING)
    return worker


def is_given_back(job: Job, attempts: int) -> bool:
    """Whether any worker may run the job, after that many attempts."""
    return (job.state, job.attempts, job.crashes, job.errors, job.node_id) == (State.AVAILABLE, attempts, 0, [], None)


def test_a_warm_shutdown_ends_the_batch_of_a_strategy_and_gives_back_what_it_keeps(
    client: Celery, jobs: Jobs, journal: Journal, gate: Path, workers: Workers, pool: str
) -> None:
    first = workers(pool=pool)
    batch = [apps.collect_for_pool.delay(str(gate), journal.path, "batch") for _ in range(apps.COLLECTED)]
    journal.wait(1)
    # Not sooner: a job that waits for long in the worker goes back, and another one takes its place in the batch.
    kept = [] if pool == "solo" else [apps.collect_for_pool.delay(str(gate), journal.path, "kept")]
    for result in batch + kept:
        jobs.wait(result, State.CLAIMED)
    first.process.terminate()
    workers(pool=pool)
    assert apps.add.delay(1, 1).get(timeout=60) == 2 if pool != "solo" else True  # by whoever takes tasks now
    assert {jobs.of(result).state for result in batch} == {State.CLAIMED}
    gate.touch()
    assert first.wait() == 0
    assert {jobs.wait(result, State.COMPLETED).attempts for result in batch} == {1}
    assert [result.get(timeout=60) for result in batch] == ["done"] * apps.COLLECTED
    assert journal.lines == ["batch"]
    for result in kept:
        assert jobs.wait(result, State.CLAIMED, State.AVAILABLE).crashes == 0


def test_a_warm_shutdown_in_a_rush_runs_each_job_once(
    client: Celery, jobs: Jobs, journal: Journal, workers: Workers, pool: str, slots: int
) -> None:
    """Also those that were handed to the pool and have not begun."""
    first, second = (workers(pool=pool, concurrency=slots * 2) for _ in range(2))
    with bulk():
        late = [apps.start_and_end.delay(journal.path, str(number), 0.01) for number in range(200)]
        early = [apps.append_early.delay(journal.path, f"early {number}", 0.01) for number in range(50)]
    journal.wait(20)
    first.process.terminate()
    ended = [jobs.wait(result, State.COMPLETED, State.DEAD) for result in late + early]
    client.control.shutdown(destination=[second.hostname])
    assert first.wait(60) == second.wait(60) == 0
    assert {(job.state, job.crashes) for job in ended} == {(State.COMPLETED, 0)}
    assert sorted(journal.lines) == sorted(
        [f"{what} {number}" for what in ("start", "end") for number in range(200)]
        + [f"early {number}" for number in range(50)]
    )


@on_one_database
def test_a_warm_shutdown_lets_what_runs_end_and_leaves_the_rest_at_once(
    running: list[AsyncResult], jobs: Jobs, journal: Journal, gate: Path, workers: Workers, pool: str, slots: int
) -> None:
    worker = begin(workers(pool=pool, concurrency=slots), jobs, journal, running)
    waiting = [apps.append.delay(journal.path, "waits") for _ in range(3)]
    worker.process.terminate()
    worker.wait_for_log("Warm shutdown")
    for result in waiting:
        jobs.wait(result, State.AVAILABLE)
    gate.touch()
    assert worker.wait(60) == 0
    assert [(job.state, job.attempts) for job in map(jobs.of, running)] == [(State.COMPLETED, 1)] * slots
    left = [job for job in map(jobs.of, waiting) if job.state is not State.COMPLETED]
    assert all(is_given_back(job, attempts=0) for job in left)
    assert journal.lines.count("waits") == len(waiting) - len(left)


def assert_cut(jobs: Jobs, running: list[AsyncResult]) -> None:
    """A late one may run again, an early one may not."""
    assert is_given_back(jobs.of(running[0]), attempts=1), jobs.of(running[0])
    for job in map(jobs.of, running[1:]):
        assert (job.state, job.cause) == (State.DEAD, Cause.LOST_ONCE), job
        assert job.reason == LOST.reason


@pytest.mark.parametrize(
    ("database_url", "remaps"), [("sqlite", False), ("postgresql", True)], indirect=["database_url"]
)
def test_a_cold_shutdown_gives_back_what_may_run_again(
    running: list[AsyncResult], jobs: Jobs, journal: Journal, gate: Path, workers: Workers, pool: str, slots: int,
    remaps: bool,
) -> None:  # fmt: skip
    worker = workers(pool=pool, concurrency=slots, env={"REMAP_SIGTERM": "SIGQUIT"} if remaps else {})
    begin(worker, jobs, journal, running)
    waiting = [apps.wait_for_file.delay(str(gate)), apps.wait_for_file_early.delay(str(gate), journal.path)]
    worker.process.send_signal(signal.SIGTERM if remaps else signal.SIGQUIT)
    worker.wait(60)
    assert "Cold shutdown" in worker.log
    assert "Traceback" not in worker.log
    assert len(journal.lines) == slots
    assert_cut(jobs, running)
    assert all(
        is_given_back(jobs.of(result), attempts=0) for result in waiting
    )  # the early one as well: it had not begun


@on_one_database
def test_a_cold_shutdown_ends_an_early_task_of_solo(
    client: Celery, jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    worker = workers(pool="solo", concurrency=1)
    early = apps.wait_for_file_early.delay(str(gate), journal.path)
    begin(worker, jobs, journal, [early])
    worker.process.send_signal(signal.SIGQUIT)
    worker.wait(60)
    assert (jobs.of(early).state, jobs.of(early).cause) == (State.DEAD, Cause.LOST_ONCE)


@on_one_database
def test_a_warm_shutdown_becomes_cold_at_the_next_signal(
    running: list[AsyncResult], jobs: Jobs, journal: Journal, workers: Workers, pool: str, slots: int
) -> None:
    worker = begin(workers(pool=pool, concurrency=slots), jobs, journal, running)
    first, second = (signal.SIGTERM, signal.SIGQUIT) if pool in ("prefork", "threads") else (signal.SIGINT,) * 2
    worker.process.send_signal(first)
    worker.wait_for_log("Warm shutdown" if first is signal.SIGTERM else "initiate cold shutdown")
    worker.process.send_signal(second)
    worker.wait(60)
    assert_cut(jobs, running)


@on_one_database
def test_a_soft_shutdown_lets_short_tasks_end(
    client: Celery, jobs: Jobs, journal: Journal, gate: Path, tmp_path: Path, workers: Workers, pool: str, slots: int
) -> None:
    worker = workers(pool=pool, concurrency=slots, conf={"worker_soft_shutdown_timeout": 8 if slots > 1 else 6})
    short = apps.wait_for_file.delay(str(gate), journal.path, "short")
    long = apps.wait_for_file.delay(str(tmp_path / "later"), journal.path, "long")
    begin(worker, jobs, journal, [short, long][:slots])
    worker.process.send_signal(signal.SIGQUIT)
    worker.wait_for_log("Initiating Soft Shutdown")
    gate.touch()
    worker.wait(60)
    assert (jobs.of(short).state, jobs.of(short).attempts) == (State.COMPLETED, 1)
    assert is_given_back(jobs.of(long), attempts=1 if slots > 1 else 0)
    assert sorted(journal.lines) == ["long", "short"][2 - slots :]
