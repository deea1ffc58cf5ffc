"""What Celery's worker offers: limits, revokes, autoscale, recycled processes, shutdowns, the choice of queues."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from celery import Celery, chain
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult

from kathikon_celery import bulk
from kathikon_celery.job import State
from kathikon_celery.storage import nodes
from tests.integration.conftest import Jobs, Journal, Workers, on_one_database
from tests.support import apps, outcomes
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess


@pytest.fixture(scope="module")
def worker(shared_workers: Workers) -> WorkerProcess:
    """The worker of the tests that need no special one."""
    return shared_workers(name="worker")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that `apps.wait_for_file` waits for; it appears when the test ends, at the latest."""
    path = tmp_path / "go on"
    yield path
    path.touch()


# --- time limits


def test_a_soft_time_limit_raises_in_the_task(app: Celery, jobs: Jobs, worker: WorkerProcess) -> None:
    result = apps.exceed_soft_limit.delay()
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=60)
    assert "SoftTimeLimitExceeded" in jobs.wait(result, State.DEAD).reason


def test_a_hard_time_limit_kills_the_process(app: Celery, jobs: Jobs, worker: WorkerProcess) -> None:
    result = apps.exceed_hard_limit.delay()
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=60)
    job = jobs.wait(result, State.DEAD)
    assert job.crashes == 0
    assert "TimeLimitExceeded" in job.reason
    assert f"job {result.id} had ended" not in worker.log  # the pool tells of it twice
    assert [apps.add.delay(number, 1).get(timeout=60) for number in range(4)] == [1, 2, 3, 4]


def test_time_limits_of_a_call(app: Celery, jobs: Jobs, worker: WorkerProcess) -> None:
    soft = apps.sleep.apply_async((60,), soft_time_limit=0.3)
    hard = apps.sleep.apply_async((60,), time_limit=0.3)
    with pytest.raises(SoftTimeLimitExceeded):
        soft.get(timeout=60)
    with pytest.raises(TimeLimitExceeded):
        hard.get(timeout=60)


# --- rate limits


def test_a_rate_limit_is_kept_and_blocks_nobody_else(
    app: Celery, jobs: Jobs, journal: Journal, worker: WorkerProcess
) -> None:
    # The task is nobody else's here: Celery's token bucket is per worker and task.
    app.control.rate_limit(apps.big_payload.name, "2/s", reply=True, destination=[worker.hostname], timeout=60)
    began = datetime.now(timezone.utc)
    limited = [apps.big_payload.delay("", number) for number in range(10)]
    wait_until(lambda: jobs.of(limited[0]).state is State.COMPLETED, what="the first one")
    waiting = [apps.add.delay(number, 1) for number in range(10)]
    assert [result.get(timeout=60) for result in waiting] == list(range(1, 11))
    done = [jobs.wait(result, State.COMPLETED) for result in limited]
    ends = sorted(job.ended_at for job in done)
    # Nine intervals of half a second. The first one may take its time as well, so they are counted from before it.
    assert (ends[-1] - began).total_seconds() > 4.3
    assert jobs.of(waiting[-1]).ended_at < ends[-1]
    assert {job.crashes for job in done} == {0}
    app.control.rate_limit(apps.big_payload.name, "0", reply=True, destination=[worker.hostname], timeout=60)


@pytest.mark.parametrize(
    ("database_url", "pool"), [("sqlite", "threads"), ("postgresql", "prefork")], indirect=["database_url"]
)
def test_a_new_rate_limit_strands_no_slot(client: Celery, jobs: Jobs, workers: Workers, pool: str) -> None:
    """The jobs that the old limit holds wait in Celery's old token bucket until its timer comes."""
    worker = workers(pool=pool, concurrency=2)

    def limit(rate: str) -> None:
        client.control.rate_limit(apps.quiet.name, rate, reply=True, destination=[worker.hostname], timeout=60)

    limit("1/m")
    held = [apps.quiet.delay(number) for number in range(5)]
    jobs.wait(held[0], State.COMPLETED)
    for result in held[1:]:
        jobs.wait(result, State.CLAIMED)
    limit("1000/s")
    assert [apps.add.delay(number, 1).get(timeout=60) for number in range(5)] == [1, 2, 3, 4, 5]
    assert {jobs.of(result).state for result in held[1:]} == {State.CLAIMED}


# --- revoke


def test_a_waiting_task_is_revoked(
    app: Celery, jobs: Jobs, journal: Journal, gate: Path, worker: WorkerProcess
) -> None:
    for running in [apps.wait_for_file.delay(str(gate)) for _ in range(2)]:
        jobs.wait(running, State.RUNNING)
    result = apps.append.delay(journal.path, "revoked")
    result.revoke()
    job = jobs.wait(result, State.CANCELLED)
    assert job.reason == "revoked"
    assert result.state == "REVOKED"
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    gate.touch()
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert journal.lines == []


def test_a_scheduled_task_is_revoked(app: Celery, jobs: Jobs, journal: Journal, worker: WorkerProcess) -> None:
    result = apps.append.apply_async((journal.path, "revoked"), countdown=3)
    later = apps.append.apply_async((journal.path, "later"), countdown=3.1)
    result.revoke()
    assert jobs.wait(result, State.CANCELLED).reason == "revoked"
    assert later.get(timeout=60) == "later"
    assert journal.lines == ["later"]


def test_a_task_that_no_worker_can_have_seen_is_revoked(
    app: Celery, jobs: Jobs, journal: Journal, worker: WorkerProcess
) -> None:
    result = apps.append.apply_async((journal.path, "revoked"), queue="of nobody yet")
    result.revoke()
    assert jobs.wait(result, State.CANCELLED).reason == "revoked"
    kept = apps.append.apply_async((journal.path, "kept"), queue="of nobody yet")
    app.control.add_consumer("of nobody yet", destination=[worker.hostname], reply=True, timeout=60)
    assert kept.get(timeout=60) == "kept"
    assert journal.lines == ["kept"]


def test_a_task_is_revoked_before_it_is_published(
    app: Celery, jobs: Jobs, journal: Journal, worker: WorkerProcess
) -> None:
    app.control.revoke("an id of the future", reply=True, timeout=60, destination=[worker.hostname])
    result = apps.append.apply_async((journal.path, "revoked"), task_id="an id of the future")
    jobs.wait(result, State.CANCELLED)
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert journal.lines == []


def test_a_running_task_ends_unless_it_is_terminated(
    app: Celery, jobs: Jobs, gate: Path, worker: WorkerProcess
) -> None:
    left, terminated = (apps.wait_for_file.delay(str(gate)) for _ in range(2))
    for result in (left, terminated):
        jobs.wait(result, State.RUNNING)
    app.control.revoke(left.id, reply=True, timeout=60, destination=[worker.hostname])
    app.control.revoke(terminated.id, terminate=True, signal="SIGKILL")
    job = jobs.wait(terminated, State.CANCELLED)
    assert (job.reason, job.crashes) == ("terminated", 0)
    with pytest.raises(TaskRevokedError):
        terminated.get(timeout=60)
    gate.touch()
    assert jobs.wait(left, State.COMPLETED).crashes == 0  # before its end, Celery 5.6 tells whoever asks of a revoke
    assert left.get(timeout=60) == "done"


def test_a_finished_task_is_not_revoked(app: Celery, jobs: Jobs, worker: WorkerProcess) -> None:
    result = apps.add.delay(1, 1)
    assert result.get(timeout=60) == 2
    app.control.revoke(result.id, terminate=True, reply=True, timeout=60, destination=[worker.hostname])
    assert (jobs.of(result).state, result.state) == (State.COMPLETED, "SUCCESS")


# --- at most once


def test_a_task_that_acknowledges_early_is_dead_when_its_process_is_lost(
    app: Celery, jobs: Jobs, journal: Journal, worker: WorkerProcess
) -> None:
    result = apps.kill_own_process_early.delay(journal.path, "once")
    job = jobs.wait(result, State.DEAD)
    assert (journal.lines, job.acked) == (["once"], True)


def test_a_task_that_acknowledges_early_is_dead_when_its_worker_is_lost(
    client: Celery, jobs: Jobs, journal: Journal, workers: Workers
) -> None:
    first = workers(concurrency=1)
    result = apps.append_early.delay(journal.path, "once", 60)
    journal.wait(1)
    first.kill9()
    workers(concurrency=1)
    job = jobs.wait(result, State.DEAD)
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert (journal.lines, job.attempts) == (["once"], 1)


def test_a_success_that_was_stored_is_not_run_again_where_that_is_wanted(
    client: Celery, jobs: Jobs, workers: Workers
) -> None:
    workers(app="tests.support.outcomes", conf={"worker_deduplicate_successful_tasks": True})
    result = chain(outcomes.succeed_and_come_again.s(), apps.echo.s()).apply_async()
    assert result.get(timeout=60) == [["first run"], {}]
    assert jobs.wait(result.parent, State.COMPLETED).attempts == 2


# --- the pool


@on_one_database
def test_autoscale(client: Celery, jobs: Jobs, gate: Path, workers: Workers) -> None:
    worker = workers(args=["--autoscale", "3,1"], env={"AUTOSCALE_KEEPALIVE": "0.5"})

    def processes() -> int:
        return len(client.control.inspect([worker.hostname], timeout=60).stats()[worker.hostname]["pool"]["processes"])

    assert processes() == 1
    results = [apps.wait_for_file.delay(str(gate)) for _ in range(4)]
    for result in results[:3]:
        jobs.wait(result, State.RUNNING)
    assert processes() == 3
    assert jobs.of(results[3]).state is State.AVAILABLE
    gate.touch()
    assert [result.get(timeout=60) for result in results] == ["done"] * 4
    wait_until(lambda: processes() == 1, what="a pool that has shrunk")
    assert apps.add.delay(1, 1).get(timeout=60) == 2


@pytest.mark.parametrize(
    ("option", "most"), [("--max-tasks-per-child=3", 3), ("--max-memory-per-child=1", 1)], ids=["tasks", "memory"]
)
@on_one_database
def test_processes_are_replaced(client: Celery, jobs: Jobs, workers: Workers, option: str, most: int) -> None:
    worker = workers(args=[option])
    results = [apps.describe.delay() for _ in range(12)]
    processes = [result.get(timeout=60)["pid"] for result in results]
    assert max(map(processes.count, processes)) <= most
    assert {jobs.wait(result, State.COMPLETED).crashes for result in results} == {0}
    worker.stop()  # a process logs what it did after it has written the result
    # What was claimed and then waited for a new process may have been claimed twice, but it has run once.
    assert worker.log.count("] succeeded in ") == 12


# --- who gets what


def test_no_job_waits_behind_a_busy_worker_while_another_is_idle(
    client: Celery, jobs: Jobs, gate: Path, workers: Workers
) -> None:
    for _ in range(2):
        workers(concurrency=2, args=["-O", "fair"])
    # The rate of fast tasks is what tempts a worker to claim ahead.
    for result in [apps.add.delay(number, 1) for number in range(200)]:
        result.get(timeout=60)
    running = [apps.wait_for_file.delay(str(gate)) for _ in range(3)]
    for result in running:
        jobs.wait(result, State.RUNNING)
    # One slot of four is free, wherever it is, and nothing waits for another.
    for number in range(5):
        assert apps.add.delay(number, 1).get(timeout=60) == number + 1
    running.append(apps.wait_for_file.delay(str(gate)))
    jobs.wait(running[-1], State.RUNNING)
    # All are busy: what comes now is nobody's until one is free.
    waiting = [apps.add.delay(number, 1) for number in range(3)]
    for result in waiting:
        jobs.wait(result, State.AVAILABLE)
    gate.touch()
    assert [result.get(timeout=60) for result in [*running, *waiting]] == ["done"] * 4 + [1, 2, 3]


#: Seconds for which a worker claims ahead; what waits for five times as long is given back.
FOR_LONG = {"KATHIKON_CLAIM_HORIZON": "5"}


@pytest.fixture
def behind(client: Celery, jobs: Jobs, journal: Journal, gate: Path) -> Callable[[], list[AsyncResult]]:
    """Have a worker of one process run a task that waits for the gate: what it has claimed behind it, in that order."""

    def send() -> list[AsyncResult]:
        with bulk():  # the worker is to take them as what is as short as those before
            short = [apps.add.delay(number, 1) for number in range(100)]
            blocking = apps.wait_for_file.delay(str(gate))
            behind = [apps.append.delay(journal.path, str(number)) for number in range(3)]
        jobs.wait(blocking, State.RUNNING)
        for result in short:
            jobs.wait(result, State.COMPLETED)
        for result in behind:
            jobs.wait(result, State.CLAIMED)
        return [blocking, *behind]

    return send


@on_one_database
def test_what_waits_in_a_busy_process_goes_to_another_worker(
    behind: Callable[[], list[AsyncResult]], jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    first = workers(concurrency=1, env={"KATHIKON_CLAIM_HORIZON": "1"})
    blocking, *waiting = behind()
    second = workers(concurrency=1)
    assert [result.get(timeout=60) for result in waiting] == ["0", "1", "2"]
    gate.touch()
    assert blocking.get(timeout=60) == "done"
    second.stop()
    # The process has found what was taken from it, and goes on.
    assert apps.describe.delay().get(timeout=60)["hostname"] == first.hostname
    assert journal.lines == ["0", "1", "2"]


def test_what_waits_in_a_busy_process_can_be_revoked(
    behind: Callable[[], list[AsyncResult]], jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    worker = workers(concurrency=1, env=FOR_LONG)
    blocking, first, *others = behind()
    [answer] = first.app.control.revoke(first.id, reply=True, timeout=60, limit=1)
    assert list(answer) == [worker.hostname]
    jobs.wait(first, State.CANCELLED)
    with pytest.raises(TaskRevokedError):
        first.get(timeout=60)
    gate.touch()
    assert [result.get(timeout=60) for result in (blocking, *others)] == ["done", "1", "2"]
    assert journal.lines == ["1", "2"]


@on_one_database
def test_what_waits_in_a_busy_process_is_left_to_others_at_a_warm_shutdown(
    behind: Callable[[], list[AsyncResult]], jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    first = workers(concurrency=1, env=FOR_LONG)
    blocking, *waiting = behind()
    first.process.terminate()
    for result in waiting:
        jobs.wait(result, State.AVAILABLE)
    workers(concurrency=1)
    assert [result.get(timeout=60) for result in waiting] == ["0", "1", "2"]
    gate.touch()
    assert blocking.get(timeout=60) == "done"
    assert first.wait(60) == 0
    assert journal.lines == ["0", "1", "2"]
    assert jobs.wait(blocking, State.COMPLETED).attempts == 1


@on_one_database
def test_what_waits_in_a_busy_process_is_left_to_others_when_the_consumer_begins_anew(
    behind: Callable[[], list[AsyncResult]], jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    first = workers(concurrency=1, env=FOR_LONG)
    blocking, *waiting = behind()
    assert blocking.app.control.broadcast("lose_connection", reply=True, timeout=60, limit=1)
    for result in waiting:
        jobs.wait(result, State.AVAILABLE)
    assert "Connection to broker lost" in first.log
    second = workers(concurrency=1)
    assert [result.get(timeout=60) for result in waiting] == ["0", "1", "2"]
    gate.touch()
    assert blocking.get(timeout=60) == "done"
    assert jobs.wait(blocking, State.COMPLETED).attempts == 1
    second.stop()
    assert apps.describe.delay().get(timeout=60)["hostname"] == first.hostname
    assert journal.lines == ["0", "1", "2"]


@on_one_database
def test_what_waits_in_a_process_that_is_killed_is_no_crash_of_its_own(
    behind: Callable[[], list[AsyncResult]], jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    worker = workers(concurrency=1, env=FOR_LONG)
    blocking, *waiting = behind()
    [process] = psutil.Process(worker.pid).children()
    process.kill()
    assert [result.get(timeout=60) for result in waiting] == ["0", "1", "2"]
    gate.touch()
    assert blocking.get(timeout=60) == "done"
    assert [(job.attempts, job.crashes) for job in map(jobs.of, waiting)] == [(1, 0)] * 3
    assert jobs.of(blocking).crashes == 1
    assert journal.lines == ["0", "1", "2"]


@pytest.mark.parametrize("conf", [{"worker_disable_prefetch": True}, {"worker_prefetch_multiplier": 1}], ids=str)
def test_nothing_is_claimed_ahead(
    client: Celery, jobs: Jobs, journal: Journal, gate: Path, workers: Workers, conf: dict[str, int]
) -> None:
    worker = workers(concurrency=1, conf=conf)
    assert "only supported for Redis" not in worker.log
    results = [apps.start_and_end.delay(journal.path, str(number), 0) for number in range(30)]
    blocking = apps.wait_for_file.delay(str(gate))
    jobs.wait(blocking, State.RUNNING)
    waiting = [apps.add.delay(number, 1) for number in range(5)]
    # What was claimed while the tasks were fast goes back.
    for result in waiting:
        jobs.wait(result, State.AVAILABLE)
    gate.touch()
    for result in results + waiting:
        result.get(timeout=60)
    assert journal.most_at_once() == 1
    if "worker_disable_prefetch" in conf:
        ran = sorted((jobs.of(result) for result in results), key=lambda job: job.claimed_at)
        assert all(before.ended_at <= after.claimed_at for before, after in pairwise(ran))


def test_a_queues_concurrency_caps_what_a_worker_runs_of_it(
    database_url: str, client: Celery, jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    workers(concurrency=3, env={"KATHIKON_QUEUES": "default:10,narrow:1"})
    narrow = [apps.start_and_end.apply_async((journal.path, str(n)), queue="narrow") for n in range(5)]
    wide = [apps.wait_for_file.delay(str(gate)) for _ in range(2)]
    # The wide queue has the other slots, though the narrow one was served first.
    for result in wide:
        jobs.wait(result, State.RUNNING)
    for result in narrow:
        result.get(timeout=60)
    assert journal.most_at_once() == 1


def test_queues_are_chosen(client: Celery, jobs: Jobs, workers: Workers) -> None:
    environment = {"KATHIKON_QUEUES": "default,mail,video"}
    one = workers(args=["-Q", "mail,another"], env=environment)
    two = workers(args=["-X", "mail"], env=environment)
    found = client.control.inspect([one.hostname, two.hostname], timeout=60).active_queues()
    assert {worker: sorted(queue["name"] for queue in queues) for worker, queues in found.items()} == {
        one.hostname: ["another", "mail"],
        two.hostname: ["default", "video"],
    }
    for queue, worker in {"mail": one, "another": one, "default": two, "video": two}.items():
        described = apps.describe.apply_async(queue=queue).get(timeout=60)
        assert (described["queue"], described["hostname"]) == (queue, worker.hostname)


# --- shutdown


def test_a_worker_that_was_taken_for_dead_hears_remote_control_again(
    client: Celery, jobs: Jobs, workers: Workers
) -> None:
    worker = workers(name="silent", conf={"kathikon_lease": 2.0})
    with jobs.storage.database.read() as connection:
        (node,) = [one for one in nodes.others(connection, 0) if one.name == worker.hostname]
    jobs.storage.backend.remove_node(node.id)  # with its queues, as the others do when its lease has run out
    worker.wait_for_log("It goes on as node")
    wait_until(lambda: client.control.ping(timeout=1), what="an answer")
    assert apps.add.delay(1, 1).get(timeout=60) == 2


@on_one_database
def test_a_warm_shutdown_ends_what_runs_and_leaves_the_rest_to_others(
    client: Celery, jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    first = workers(concurrency=1)
    running = apps.wait_for_file.delay(str(gate))
    jobs.wait(running, State.RUNNING)
    waiting = [apps.append.delay(journal.path, str(number)) for number in range(5)]
    second = workers(concurrency=1)
    assert [result.get(timeout=60) for result in waiting] == [str(number) for number in range(5)]
    first.process.terminate()
    first.wait_for_log("Warm shutdown")
    for _ in range(5):
        assert apps.describe.delay().get(timeout=60)["hostname"] == second.hostname
    gate.touch()
    assert running.get(timeout=60) == "done"
    assert first.wait(60) == 0
    assert jobs.wait(running, State.COMPLETED).attempts == 1
    assert sorted(journal.lines) == [str(number) for number in range(5)]


@on_one_database
@pytest.mark.parametrize("ignore_result", [False, True])
def test_what_was_claimed_ahead_goes_back_at_a_warm_shutdown(
    client: Celery, jobs: Jobs, journal: Journal, workers: Workers, ignore_result: bool
) -> None:
    first = workers(concurrency=2)
    options = {"ignore_result": ignore_result}
    results = [apps.append.apply_async((journal.path, str(number), 0.002), **options) for number in range(400)]
    journal.wait(20)
    first.process.terminate()
    workers(concurrency=2)
    for result in results:
        jobs.wait(result, State.COMPLETED)
    assert first.wait(60) == 0
    # Each ran once, whoever had claimed it first.
    assert sorted(journal.lines, key=int) == [str(number) for number in range(400)]
    assert {jobs.wait(result, State.COMPLETED).crashes for result in results} == {0}


@on_one_database
def test_a_cold_shutdown_gives_back_what_runs(
    client: Celery, jobs: Jobs, journal: Journal, gate: Path, workers: Workers
) -> None:
    first = workers(concurrency=1)
    result = apps.wait_for_file.delay(str(gate), journal.path, "again")
    jobs.wait(result, State.RUNNING)
    first.process.send_signal(signal.SIGQUIT)
    second = workers(concurrency=1)
    first.wait(60)
    assert "Cold shutdown" in first.log
    gate.touch()
    assert result.get(timeout=60) == "done"
    assert journal.lines == ["again", "again"]
    assert jobs.wait(result, State.COMPLETED).attempts == 2
    assert second.running


@on_one_database
def test_a_soft_shutdown_lets_short_tasks_end(
    client: Celery, jobs: Jobs, gate: Path, tmp_path: Path, workers: Workers
) -> None:
    first = workers(concurrency=2, conf={"worker_soft_shutdown_timeout": 8})
    short, long = (apps.wait_for_file.delay(str(path)) for path in (gate, tmp_path / "later"))
    for result in (short, long):
        jobs.wait(result, State.RUNNING)
    first.process.send_signal(signal.SIGQUIT)
    first.wait_for_log("Initiating Soft Shutdown")
    gate.touch()
    first.wait(60)
    assert jobs.wait(short, State.COMPLETED).attempts == 1
    jobs.wait(long, State.AVAILABLE)
    (tmp_path / "later").touch()
    workers(concurrency=1)
    assert long.get(timeout=60) == "done"
    assert jobs.wait(long, State.COMPLETED).attempts == 2
