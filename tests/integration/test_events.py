"""Events of workers and tasks, as monitors see them: `app.events`, ``celery events`` and Flower."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from celery import Celery

from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Workers
from tests.support import apps
from tests.support.events import listening
from tests.support.programs import CeleryProgram
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess


@pytest.fixture(scope="module")
def worker(shared_workers: Workers) -> WorkerProcess:
    """A worker that sends events of its tasks."""
    return shared_workers(name="talker", concurrency=1, args=["-E"])


def test_a_task_tells_its_way(app: Celery, worker: WorkerProcess) -> None:
    app.conf.task_send_sent_event = True
    with listening(app) as events:
        result = apps.echo.delay("an argument")
        assert result.get(timeout=60)
        events.wait("task-succeeded")
        events.wait("task-sent")
        seen = {event["type"]: event for event in events.seen if event.get("uuid") == result.id}
    assert set(seen) == {"task-sent", "task-received", "task-started", "task-succeeded"}
    assert seen["task-received"]["clock"] < seen["task-started"]["clock"] < seen["task-succeeded"]["clock"]
    assert seen["task-sent"]["queue"] == "default"
    assert seen["task-sent"]["name"] == seen["task-received"]["name"] == "tests.support.apps.echo"
    assert "an argument" in seen["task-received"]["args"]
    assert {seen[kind]["hostname"] for kind in seen if kind != "task-sent"} == {worker.hostname}
    assert "an argument" in seen["task-succeeded"]["result"]


def test_nothing_is_sent_by_who_sends_tasks_unless_it_is_asked_for(app: Celery, worker: WorkerProcess) -> None:
    with listening(app) as events:
        result = apps.add.delay(1, 1)
        events.wait("task-succeeded")
        assert [event for event in events.of("task-sent") if event["uuid"] == result.id] == []


def test_failures_retries_and_revokes_are_told(app: Celery, jobs: Jobs, worker: WorkerProcess, tmp_path: Path) -> None:
    with listening(app) as events:
        failed = apps.fail.delay("alas")
        retried = apps.retry_then_succeed.delay(str(tmp_path / "journal"), 1)
        assert retried.get(timeout=60) == 1
        running = apps.wait_for_file.delay(str(tmp_path / "go on"))
        jobs.wait(running, State.RUNNING)
        running.revoke(terminate=True)
        [failure], [retry], [revoked] = (events.wait(kind) for kind in ("task-failed", "task-retried", "task-revoked"))
    assert (failure["uuid"], failure["exception"]) == (failed.id, "ValueError('alas')")
    assert "in fail" in failure["traceback"]
    assert (retry["uuid"], retry["exception"]) == (retried.id, "RuntimeError('try 1')")
    assert (revoked["uuid"], revoked["terminated"]) == (running.id, True)


def test_a_worker_tells_its_life(app: Celery, worker: WorkerProcess, shared_workers: Workers) -> None:
    with listening(app) as events:
        second = shared_workers(name="second", pool="solo", args=["-Q", "other"])

        def of_the_second(kind: str) -> list[dict[str, Any]]:
            return [event for event in events.of(kind) if event["hostname"] == second.hostname]

        [online] = wait_until(lambda: of_the_second("worker-online"), what="worker-online")
        assert (online["sw_ident"], online["pid"]) == ("py-celery", second.pid)
        beats = wait_until(lambda: of_the_second("worker-heartbeat"), 60, "worker-heartbeat")
        assert beats[0]["active"] == 0
        apps.add.apply_async((1, 1), queue="other").get(timeout=60)
        assert second.stop() == 0
        wait_until(lambda: of_the_second("worker-offline"), 60, "worker-offline")
        # Without -E a worker says nothing of its tasks.
        assert [event for event in events.seen if event["type"].startswith("task-")] == []


def test_several_monitors_see_everything(app: Celery, worker: WorkerProcess) -> None:
    with listening(app) as one, listening(app) as two:
        results = {apps.add.delay(number, 1).id for number in range(20)}
        for events in (one, two):
            assert {event["uuid"] for event in events.wait("task-succeeded", number=20)} == results


def test_celery_events_dumps_them(app: Celery, worker: WorkerProcess, shared_database_url: str, tmp_path: Path) -> None:
    with CeleryProgram(shared_database_url, tmp_path, "events", "--dump") as program:
        # It says that it starts before its queue is there.
        def told(text: str) -> bool:
            app.control.broadcast("heartbeat")
            return text in program.log

        wait_until(lambda: told(f"{worker.hostname} ["), 60, "a first event", interval=0.3)
        result = apps.echo.delay("an argument")
        wait_until(lambda: f"task succeeded: tests.support.apps.echo({result.id})" in program.log, 60, "the task's end")
        assert "heartbeat" in program.log
        assert "an argument" in program.log


def test_flower_shows_live_workers_and_tasks(
    app: Celery, worker: WorkerProcess, shared_database_url: str, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = CeleryProgram(
        shared_database_url, tmp_path, "flower", "--address=127.0.0.1", f"--port={port}", "--inspect-timeout=10000"
    )
    program.environment["FLOWER_UNAUTHENTICATED_API"] = "true"

    def get(path: str) -> Any:
        assert program.process.poll() is None, program.log
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
                return json.load(response)
        except OSError:  # also one of an answer that is cut off, or late
            return None

    with program:
        workers = wait_until(lambda: get("/api/workers?refresh=1"), 60, "a worker in Flower", interval=0.3)
        assert list(workers) == [worker.hostname]
        shown = workers[worker.hostname]
        assert [queue["name"] for queue in shown["active_queues"]] == ["default"]
        assert shown["stats"]["pid"] == worker.pid
        assert "tests.support.apps.echo" in shown["registered"]
        wait_until(lambda: get("/api/workers?status=1") == {worker.hostname: True}, 60, "the worker's heart")
        result = apps.echo.delay("an argument")
        failed = apps.fail.delay()

        def tasks() -> dict[str, Any] | None:
            found = get("/api/tasks") or {}
            return (
                found
                if {found.get(one.id, {}).get("state") for one in (result, failed)} == {"SUCCESS", "FAILURE"}
                else None
            )

        shown = wait_until(tasks, 60, "both tasks", interval=0.2)[result.id]
        assert (shown["name"], shown["state"]) == ("tests.support.apps.echo", "SUCCESS")
        assert shown["worker"] == worker.hostname
