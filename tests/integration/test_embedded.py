"""A worker inside the process of the test."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import Celery, bootsteps, current_app
from kombu.asynchronous import get_event_loop

import kathikon_celery
from kathikon_celery import EmbeddedWorker
from kathikon_celery.job import State
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import Unavailable
from tests.integration.conftest import Journal
from tests.support import apps
from tests.support.waiting import wait_until


@pytest.fixture
def kathikon_database_url(database_url: str) -> str:
    return database_url


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = {thread.name for thread in threading.enumerate() if thread not in before}
    # One looks at the queues of this test's tasks, and one closes idle connections; both end by themselves.
    assert left - {"kathikon-unconsumed", "kathikon-idle"} == set()


def states(storage: Storage) -> dict[str, int]:
    return {state: number for (_, state), number in storage.counts().items()}


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_runs_tasks_whenever_it_is_entered(kathikon_app: Celery, kathikon_storage: Storage, pool: str) -> None:
    worker = EmbeddedWorker(kathikon_app, pool)
    for again in range(3):
        with worker:
            assert worker.is_running
            results = [apps.add.delay(number, again) for number in range(30)]
            assert [result.get(timeout=60) for result in results] == [number + again for number in range(30)]
        assert not worker.is_running
    assert states(kathikon_storage) == {"completed": 90}


def test_leaves_the_process_as_it_was(kathikon_app: Celery) -> None:
    def look() -> tuple[Any, ...]:
        Storage.for_app(kathikon_app).close()
        gc.collect()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        loggers = [logging.getLogger(), logging.getLogger("celery.worker.consumer.tasks")]
        told = [(logger.level, list(logger.handlers), list(logger.filters)) for logger in loggers]
        files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        # Before Celery 5.7, who sends to a queue that is not configured makes his own workers consume it.
        consumed = list(kathikon_app.amqp.queues.consume_from) if celery.VERSION >= (5, 7) else []
        return handlers, told, sys.stdout, sys.stderr, files, get_event_loop(), consumed

    with EmbeddedWorker(kathikon_app):
        apps.add.delay(1, 2).get(timeout=60)
    before = look()
    for queues in ("default", "other"):
        with EmbeddedWorker(kathikon_app, queues=queues):
            apps.add.apply_async((1, 2), queue=queues).get(timeout=60)
    with EmbeddedWorker(kathikon_app, exclude_queues="default"):
        pass
    assert look() == before


def test_on_tables_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = apps.create_app("ram", kathikon_copies="ram")

    @app.task
    def double(number: int) -> int:
        return 2 * number

    with EmbeddedWorker(app):
        assert double.delay(21).get(timeout=60) == 42
    storage = Storage.for_app(app)
    assert [job.state for job in storage.all()] == [State.COMPLETED]
    storage.reset()
    assert list(tmp_path.iterdir()) == []


def test_two_statements_are_a_script_with_a_worker(tmp_path: Path) -> None:
    script = """
from celery import Celery
from kathikon_celery import EmbeddedWorker

app = Celery("script")
app.config_from_object("kathikon_celery.config")

@app.task
def add(x, y):
    return x + y

with EmbeddedWorker(app, concurrency=2):
    print(add.delay(2, 2).get(timeout=60))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KATHIKON_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")
    assert (tmp_path / "kathikon.db").exists()


def test_stops_warmly(kathikon_app: Celery, kathikon_storage: Storage, tmp_path: Path, journal: Journal) -> None:
    gate = tmp_path / "gate"
    worker = EmbeddedWorker(kathikon_app, concurrency=1).start()
    running = apps.wait_for_file.delay(str(gate))
    wait_until(lambda: Storage.for_app(kathikon_app).fetch(running.id).state is State.RUNNING, what="the task runs")
    waiting = [apps.append.delay(journal.path, str(number)) for number in range(20)]
    with pytest.raises(TimeoutError, match=r"embedded.* after 0.2 s; .*wait_for_file"):
        worker.stop(timeout=0.2)
    gate.touch()
    worker.stop()
    assert running.get(timeout=60) == "done"
    assert journal.lines == []
    assert states(kathikon_storage) == {"completed": 1, "available": 20}
    with worker:
        assert sorted(int(result.get(timeout=60)) for result in waiting) == list(range(20))


def test_countdowns_retries_priorities_and_failures(
    kathikon_app: Celery, kathikon_storage: Storage, journal: Journal
) -> None:
    for priority in (1, 9, 5):
        apps.append.apply_async((journal.path, str(priority)), priority=priority)
    with EmbeddedWorker(kathikon_app, "solo"):
        journal.wait(3)
        assert journal.lines == ["9", "5", "1"]
        later = apps.add.apply_async((1, 1), countdown=0.3)
        retried = apps.retry_then_succeed.delay(journal.path, 2, 0.05)
        failing = apps.fail.delay("on purpose")
        assert retried.get(timeout=60) == 2
        assert later.get(timeout=60) == 2
        with pytest.raises(ValueError, match="on purpose"):
            failing.get(timeout=60)
    job = kathikon_storage.fetch(later.id)
    assert job is not None
    assert job.claimed_at >= job.scheduled_at  # type: ignore[operator]
    dead = kathikon_storage.fetch(failing.id)
    assert dead is not None
    assert (dead.state, dead.reason) == (State.DEAD, "ValueError('on purpose')")


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_task_is_at_home_in_its_app(kathikon_app: Celery, pool: str) -> None:
    @kathikon_app.task
    def publish() -> tuple[str, str, str]:
        return current_app.main, threading.current_thread().name, apps.add.delay(2, 3).id

    with EmbeddedWorker(kathikon_app, pool):
        main, thread, task_id = publish.delay().get(timeout=60)
        assert main == "kathikon_test"
        assert thread.startswith("kathikon-task" if pool == "threads" else "kathikon-worker")
        assert kathikon_app.AsyncResult(task_id).get(timeout=60) == 5


def test_tasks_may_be_defined_while_it_runs(kathikon_app: Celery) -> None:
    with EmbeddedWorker(kathikon_app):

        @kathikon_app.task(name="late")
        def late() -> str:
            return "first"

        assert late.delay().get(timeout=60) == "first"
        kathikon_app.tasks.unregister("late")

        @kathikon_app.task(name="late", rate_limit="100/s")
        def anew() -> str:
            return "second"

        assert anew.delay().get(timeout=60) == "second"


def test_several_at_once_on_queues_of_their_own(kathikon_app: Celery) -> None:
    @kathikon_app.task
    def who() -> str:
        return threading.current_thread().name

    with EmbeddedWorker(kathikon_app, "solo", queues="slow") as slow, EmbeddedWorker(kathikon_app, queues="fast"):
        assert who.apply_async(queue="slow").get(timeout=60) == "kathikon-worker"
        assert who.apply_async(queue="fast").get(timeout=60).startswith("kathikon-task")
        nobody = who.apply_async(queue="default")
        with EmbeddedWorker(kathikon_app):
            assert nobody.get(timeout=60).startswith("kathikon-task")
        assert slow.is_running
    assert not slow.is_running


def test_remote_control_reaches_it(kathikon_app: Celery) -> None:
    with EmbeddedWorker(kathikon_app, hostname="mine@here") as worker:
        with kathikon_app.connection_for_write() as connection:  # of its own: it ends with the block
            inspect = kathikon_app.control.inspect(timeout=30, limit=1, connection=connection)
            assert inspect.ping() == {"mine@here": {"ok": "pong"}}
            kathikon_app.control.shutdown(connection=connection)
        wait_until(lambda: not worker.is_running, what="the worker has ended")


def test_the_error_of_the_block_is_the_one_that_is_seen(kathikon_app: Celery) -> None:
    with pytest.raises(ZeroDivisionError), EmbeddedWorker(kathikon_app) as worker:
        1 / 0  # noqa: B018
    assert not worker.is_running


class FailsAtStart(bootsteps.StartStopStep):
    """A step of a consumer that cannot start."""

    def start(self, parent: Any) -> None:
        raise LookupError("a step failed")


def test_a_worker_that_cannot_start(kathikon_app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    kathikon_app.steps["consumer"].add(FailsAtStart)
    worker = EmbeddedWorker(kathikon_app)
    with pytest.raises(RuntimeError, match="ended before it was ready") as raised:
        worker.start()
    assert isinstance(raised.value.__cause__, LookupError)
    assert "a step failed" in caplog.text
    kathikon_app.steps["consumer"].remove(FailsAtStart)
    with worker:
        assert apps.add.delay(1, 1).get(timeout=60) == 2


def test_a_worker_that_breaks(kathikon_app: Celery) -> None:
    now = threading.Event()

    class FailsLater(bootsteps.StartStopStep):
        def start(self, parent: Any) -> None:
            def loop(*args: Any) -> None:
                parent.on_ready()
                now.wait(15)
                raise LookupError("the loop failed")

            parent.loop = loop

    kathikon_app.steps["consumer"].add(FailsLater)
    worker = EmbeddedWorker(kathikon_app).start()
    now.set()
    wait_until(lambda: not worker.is_running, what="the worker has ended")
    with pytest.raises(RuntimeError, match="ended by an error") as raised:
        worker.stop()
    assert str(raised.value.__cause__) == "the loop failed"


def test_only_a_stopped_one_starts(kathikon_app: Celery) -> None:
    worker = EmbeddedWorker(kathikon_app)
    worker.stop()
    with worker, pytest.raises(RuntimeError, match="runs already"):
        worker.start()
    worker.stop()


def test_an_unreachable_database_is_an_error_at_once(tmp_path: Path) -> None:
    app = apps.create_app("lost", kathikon_database_url=f"sqlite:///{tmp_path}/missing/kathikon.db")
    with pytest.raises(Unavailable, match="missing"):
        EmbeddedWorker(app).start()


def test_wrong_arguments(kathikon_app: Celery) -> None:
    with pytest.raises(ValueError, match=r"'prefork'; allowed is threads or solo\. .*celery worker"):
        EmbeddedWorker(kathikon_app, "prefork")
    with pytest.raises(ValueError, match=r"concurrency .* 0; allowed is a whole number from 1"):
        EmbeddedWorker(kathikon_app, concurrency=0)
    redis = Celery("old", broker="redis://:secret@host/0", set_as_current=False)
    with pytest.raises(ValueError, match=r"broker_url of 'old' is 'redis://:\*\*\*@host/0'") as raised:
        EmbeddedWorker(redis)
    assert "secret" not in str(raised.value)


def test_the_package_imports_it_when_it_is_asked_for() -> None:
    code = "import sys, kathikon_celery; print('celery.worker' in sys.modules, 'sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    with pytest.raises(AttributeError, match="no attribute 'Worker'"):
        kathikon_celery.Worker  # noqa: B018


def test_a_listener_hears_what_happens_to_jobs_in_its_process(tmp_path: Path) -> None:
    app = apps.create_app("heard", kathikon_database_url=f"sqlite:///{tmp_path}/heard.db")
    heard: list[tuple[str, State]] = []
    database = Storage.for_app(app).database
    stop = database.events.listen(lambda events: heard.extend((event.id, event.state) for event in events))
    with EmbeddedWorker(app):
        result = app.tasks[apps.add.name].delay(1, 1)
        assert result.get(timeout=60) == 2
    stop()
    states = {state for job_id, state in heard if job_id == result.id}
    assert states - {State.RUNNING} == {State.AVAILABLE, State.CLAIMED, State.COMPLETED}
