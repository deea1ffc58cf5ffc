"""Where nothing is known of Celery's insides, its own pool, request, tracer and way to send do the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery, chain, chord

from kathikon_celery.internals import PARTS
from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Journal
from tests.support import apps
from tests.support.workers import ROOT, WorkerProcess

pytestmark = pytest.mark.each_pool

Start = Callable[..., WorkerProcess]
CONCURRENCY = 2


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_worker(client: Celery, jobs: Jobs, start_worker: Start, journal: Journal, pool: str) -> None:
    worker = start_worker(app="tests.support.unknown_celery", pool=pool, concurrency=CONCURRENCY)
    assert [one.get(timeout=60) for one in [apps.add.delay(n, n) for n in range(20)]] == [2 * n for n in range(20)]
    assert apps.add.apply_async((1, 1), countdown=0.2).get(timeout=60) == 2
    assert chain(apps.add.s(1, 2), apps.add.s(3)).delay().get(timeout=60) == 6
    assert chord([apps.add.s(n, n) for n in range(3)], apps.total.s()).delay().get(timeout=60) == 6
    assert apps.after_retries.delay(2, 5).get(timeout=60) == 5
    failed = apps.fail.delay("broken")
    with pytest.raises(ValueError, match="broken"):
        failed.get(timeout=60)
    assert jobs.wait(failed, State.DEAD).traceback
    # More than there are slots of tasks that are acknowledged before they run.
    early = [apps.append_early.delay(f"{journal.path}.early", str(n)) for n in range(3 * CONCURRENCY)]
    assert [one.get(timeout=60) for one in early] == [str(n) for n in range(3 * CONCURRENCY)]
    failed = apps.fail_early.delay("broken early")
    with pytest.raises(ValueError, match="broken early"):
        failed.get(timeout=60)
    for one in early:
        jobs.wait(one, State.COMPLETED)
    jobs.wait(failed, State.DEAD)
    if pool == "prefork":  # a process that is lost
        jobs.wait(apps.kill_own_process_early.delay(f"{journal.path}.lost", "once"), State.DEAD)
        assert apps.read_lines(f"{journal.path}.lost") == ["once"]
        assert apps.kill_own_process.delay(journal.path, "run", 1).get(timeout=60)
    assert worker.stop() == 0
    told = [line for line in worker.log.splitlines() if "Kathikon leaves out" in line]
    parts = [part for part in PARTS if any(part.name in line for line in told)]
    assert len(told) == len(parts)
    assert {"the request", "the tracer", "statements compiled once"} <= {part.name for part in parts}


def test_a_client(database_url: str, tmp_path: Path) -> None:
    code = "from tests.support.unknown_celery import app; print([app.send_task('any').id for _ in range(3)])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KATHIKON_DATABASE_URL": database_url}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the short way of delay()") == 1


@pytest.mark.parametrize(
    ("pool", "database_url"),
    [("prefork", "postgresql"), ("threads", "sqlite"), ("gevent", "postgresql")],
    indirect=["database_url"],
)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT], ids=["warm", "cold"])
def test_a_shutdown_runs_no_early_task_twice(
    client: Celery, jobs: Jobs, start_worker: Start, journal: Journal, pool: str, how: signal.Signals
) -> None:
    """Celery's request tells neither that a task has begun nor, if it acknowledges early, that it has ended."""
    options = {"app": "tests.support.unknown_celery", "pool": pool, "concurrency": CONCURRENCY}
    worker = start_worker(**options)
    sent = [apps.append_early.delay(journal.path, f"{n}", 1.0) for n in range(3 * CONCURRENCY)]
    journal.wait(CONCURRENCY)
    worker.process.send_signal(how)
    worker.wait(60)
    start_worker(**options, name="next")
    for one in sent:
        jobs.wait(one, State.COMPLETED, State.DEAD)
    assert len(journal.lines) == len(set(journal.lines))
    if how is signal.SIGTERM:
        assert sorted(journal.lines) == sorted(f"{n}" for n in range(len(sent)))


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_early_task_cannot_have_its_message_requeued(
    client: Celery, jobs: Jobs, start_worker: Start, pool: str
) -> None:
    start_worker(app="tests.support.unknown_celery", pool=pool)
    job = jobs.wait(apps.reject_early.delay(), State.COMPLETED, State.DEAD)
    assert (job.state, job.attempts) == (State.COMPLETED, 1)
