"""Every command of ``celery inspect`` and ``celery control``, answered by two workers, and the programs around them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import celery
import pytest
import sqlalchemy as sa
from celery import Celery
from celery.bin.base import CLIContext
from celery.bin.control import control, inspect, status
from celery.bin.list import list_
from celery.bin.purge import purge
from celery.exceptions import TaskRevokedError
from celery.worker.control import Panel
from click.testing import CliRunner, Result

from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Journal, Workers
from tests.support import apps
from tests.support.events import listening
from tests.support.programs import CeleryProgram
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

ONE, TWO = "one@test", "two@test"
PASSWORD = "not-for-your-eyes"

pytestmark = pytest.mark.usefixtures("one", "two")


@pytest.fixture(scope="module")
def one(shared_workers: Workers, shared_database_url: str) -> WorkerProcess:
    """A worker with one process, whose pool may be restarted."""
    url = sa.make_url(shared_database_url)
    if url.host:  # the server takes any password
        url = url.set(password=PASSWORD)
    conf = {"worker_pool_restarts": True}
    return shared_workers(name="one", concurrency=1, database_url=url.render_as_string(hide_password=False), conf=conf)


@pytest.fixture(scope="module")
def two(shared_workers: Workers) -> WorkerProcess:
    """A worker that scales itself, and consumes another queue."""
    return shared_workers(name="two", args=["--autoscale", "3,1", "-Q", "other"])


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that `apps.wait_for_file` waits for; it appears when the test ends, at the latest."""
    path = tmp_path / "go on"
    yield path
    path.touch()


def invoke(app: Celery, command: Any, *arguments: str) -> Result:
    """Run a command line of Celery's, in this process."""
    return CliRunner().invoke(command, arguments, obj=CLIContext(app=app, no_color=True, workdir=None))


def run(app: Celery, command: Any, *arguments: str) -> str:
    """What a command line of Celery's prints."""
    result = invoke(app, command, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def inspected(app: Celery, name: str, *arguments: str) -> dict[str, Any]:
    """What both workers answer to ``celery inspect``, which ends as soon as they have."""
    output = run(app, inspect, name, "--json", "--timeout", "60", "--destination", f"{ONE},{TWO}", *arguments)
    answers: dict[str, Any] = json.loads(output)
    assert set(answers) == {ONE, TWO}
    return answers


def controlled(app: Celery, name: str, *arguments: str, to: str = f"{ONE},{TWO}") -> dict[str, Any]:
    """What the workers answer to ``celery control``."""
    output = run(app, control, name, "--json", "--timeout", "60", "--destination", to, *arguments)
    answers = {worker: answer for reply in json.loads(output) for worker, answer in reply.items()}
    assert set(answers) == set(to.split(","))
    return answers


def processes(app: Celery, worker: str) -> set[int]:
    """The process ids of a worker's pool."""
    return set(app.control.inspect([worker], timeout=60).stats()[worker]["pool"]["processes"])


def queues(app: Celery, worker: str) -> list[str]:
    """The queues that a worker consumes."""
    return [queue["name"] for queue in app.control.inspect([worker], timeout=60).active_queues()[worker]]


def test_every_command_is_tested() -> None:
    tests = [name.removeprefix("test_").partition("_") for name in globals() if name.startswith("test_")]
    tested = {(kind, name) for kind, _, names in tests for name in names.split("_and_")}
    commands = {(meta.type, name) for name, meta in Panel.meta.items() if Panel.data[name].__module__ != apps.__name__}
    assert commands - tested == set()


# --- celery inspect


def test_inspect_active(app: Celery, jobs: Jobs, gate: Path) -> None:
    result = apps.wait_for_file.delay(str(gate))
    jobs.wait(result, State.RUNNING)
    answers = inspected(app, "active")
    assert [task["id"] for task in answers[ONE]] == [result.id]
    assert answers[ONE][0]["name"] == "tests.support.apps.wait_for_file"
    assert answers[ONE][0]["worker_pid"] in processes(app, ONE)
    assert answers[TWO] == []


def test_inspect_active_queues(app: Celery) -> None:
    names = {worker: [queue["name"] for queue in found] for worker, found in inspected(app, "active_queues").items()}
    assert names == {ONE: ["default"], TWO: ["other"]}


def test_inspect_clock(app: Celery) -> None:
    before, after = inspected(app, "clock"), inspected(app, "clock")
    assert 0 < before[ONE]["clock"] < after[ONE]["clock"]


def test_inspect_conf(app: Celery) -> None:
    answers = inspected(app, "conf")
    assert answers[ONE]["task_acks_late"] is True
    assert answers[ONE]["worker_pool_restarts"] is True
    assert "worker_pool_restarts" not in answers[TWO]
    assert PASSWORD not in str(answers)
    assert inspected(app, "conf", "true")[TWO]["worker_pool_restarts"] is False


def test_inspect_hello(app: Celery) -> None:
    # What workers ask each other; the command line does not have it.
    answers = app.control.inspect([ONE, TWO], timeout=60).hello("three@test", revoked=["an id from elsewhere"])
    assert {worker for worker in answers if "an id from elsewhere" in answers[worker]["revoked"]} == {ONE, TWO}
    assert answers[ONE]["clock"] > 0


def test_inspect_memsample(app: Celery) -> None:
    assert all(answer.endswith("MB") for answer in inspected(app, "memsample").values())


def test_inspect_memdump(app: Celery) -> None:
    inspected(app, "memsample")
    assert all("MB" in answer for answer in inspected(app, "memdump").values())


def test_inspect_objgraph(app: Celery) -> None:
    # The command needs a library that neither Celery nor we depend on.
    for answer in inspected(app, "objgraph", "Request", "1", "1").values():
        assert "objgraph library" in answer["error"] if "error" in answer else Path(answer["filename"]).exists()


def test_inspect_ping(app: Celery) -> None:
    assert inspected(app, "ping") == {ONE: {"ok": "pong"}, TWO: {"ok": "pong"}}


def test_inspect_query_task(app: Celery, jobs: Jobs, gate: Path) -> None:
    result = apps.wait_for_file.delay(str(gate))
    jobs.wait(result, State.RUNNING)
    answers = inspected(app, "query_task", result.id, "no such task")
    assert list(answers[ONE]) == [result.id]
    state, task = answers[ONE][result.id]
    assert (state, task["args"], task["hostname"]) == ("active", [str(gate)], ONE)
    assert answers[TWO] == {}


def test_inspect_registered(app: Celery) -> None:
    answers = inspected(app, "registered", "acks_late")
    assert "tests.support.apps.append_early [acks_late=False]" in answers[ONE]
    assert answers[ONE] == answers[TWO]


def test_inspect_report(app: Celery) -> None:
    answers = inspected(app, "report")
    assert "transport:kathikon" in answers[ONE]["ok"]
    assert PASSWORD not in str(answers)


def test_inspect_reserved(app: Celery, jobs: Jobs, gate: Path) -> None:
    jobs.wait(apps.wait_for_file.delay(str(gate)), State.RUNNING)
    waiting = apps.add.delay(1, 1)
    # Nobody reserves what has no slot yet: it waits in the table, for whoever is free first.
    assert inspected(app, "reserved") == {ONE: [], TWO: []}
    assert jobs.of(waiting).state is State.AVAILABLE
    gate.touch()
    assert waiting.get(timeout=60) == 2


def test_inspect_revoked(app: Celery) -> None:
    result = apps.add.apply_async((1, 1), countdown=60)
    result.revoke()
    wait_until(lambda: all(result.id in ids for ids in inspected(app, "revoked").values()), what="both know the id")


def test_inspect_scheduled(app: Celery, jobs: Jobs) -> None:
    elsewhere = apps.add.apply_async((1, 1), countdown=60, queue="other")
    result = apps.add.apply_async((1, 2), countdown=60, priority=3)
    answers = inspected(app, "scheduled")  # each shows what it may run when it is due
    shown = {name: {entry["request"]["id"]: entry for entry in entries} for name, entries in answers.items()}
    assert (result.id in shown[TWO], elsewhere.id in shown[ONE]) == (False, False)
    assert shown[TWO][elsewhere.id]["request"]["delivery_info"]["routing_key"] == "other"
    found = shown[ONE][result.id]
    assert datetime.fromisoformat(found["eta"]) == jobs.of(result).scheduled_at
    request = found["request"]
    assert (request["name"], request["args"], request["kwargs"]) == (apps.add.name, [1, 2], {})
    assert (request["hostname"], request["acknowledged"], request["delivery_info"]["priority"]) == (ONE, False, 3)
    result.revoke()
    elsewhere.revoke()
    wait_until(lambda: result.id not in str(inspected(app, "scheduled")), what="it is revoked")


def test_inspect_stats(app: Celery, one: WorkerProcess) -> None:
    answers = inspected(app, "stats")
    assert answers[ONE]["pid"] == one.pid
    assert answers[ONE]["broker"]["transport"] == "kathikon"
    assert answers[ONE]["pool"]["max-concurrency"] == 1
    assert answers[TWO]["autoscaler"]["max"] == 3
    assert PASSWORD not in str(answers)


def test_stats_count_the_tasks(app: Celery) -> None:
    name = "tests.support.apps.echo"
    before = inspected(app, "stats")[ONE]["total"].get(name, 0)
    for result in [apps.echo.delay(number) for number in range(3)]:
        result.get(timeout=60)
    assert inspected(app, "stats")[ONE]["total"][name] == before + 3


# --- celery control


def test_control_add_consumer(app: Celery, jobs: Jobs) -> None:
    queue = "a new queue: ü"
    result = apps.add.apply_async((2, 3), queue=queue)
    assert controlled(app, "add_consumer", queue, to=TWO) == {TWO: {"ok": f"add consumer {queue}"}}
    assert result.get(timeout=60) == 5
    controlled(app, "add_consumer", "sports", "news", "topic", "sports.#", to=TWO)
    wait_until(lambda: "sports" in queues(app, TWO), what="the queue is consumed")
    assert apps.add.apply_async((3, 3), exchange="news", routing_key="sports.today").get(timeout=60) == 6
    controlled(app, "cancel_consumer", queue, to=TWO)
    controlled(app, "cancel_consumer", "sports", to=TWO)


def test_control_cancel_consumer(app: Celery, jobs: Jobs) -> None:
    controlled(app, "cancel_consumer", "default", to=ONE)
    wait_until(lambda: queues(app, ONE) == [], what="the queue is left")
    result = apps.add.delay(2, 3)
    assert apps.add.apply_async((2, 2), queue="other").get(timeout=60) == 4
    assert jobs.of(result).state is State.AVAILABLE
    controlled(app, "add_consumer", "default", to=ONE)
    assert result.get(timeout=60) == 5


def test_control_autoscale(app: Celery) -> None:
    answers = controlled(app, "autoscale", "2", "2")
    assert answers[TWO] == {"ok": "autoscale now max=2 min=2"}
    assert "Autoscale not enabled" in answers[ONE]["error"]
    wait_until(lambda: len(processes(app, TWO)) == 2, what="two processes")
    assert controlled(app, "autoscale", "1", "1", to=TWO) == {TWO: {"ok": "autoscale now max=1 min=1"}}
    wait_until(lambda: len(processes(app, TWO)) == 1, what="one process")
    controlled(app, "autoscale", "3", "1", to=TWO)


def test_control_enable_events(app: Celery) -> None:
    controlled(app, "disable_events")
    with listening(app) as events:
        assert set(controlled(app, "enable_events")) == {ONE, TWO}
        result = apps.add.delay(1, 1)
        assert [event["uuid"] for event in events.wait("task-succeeded")] == [result.id]
    assert controlled(app, "enable_events")[ONE] == {"ok": "task events already enabled"}


def test_control_disable_events(app: Celery) -> None:
    controlled(app, "enable_events")
    assert controlled(app, "disable_events") == {worker: {"ok": "task events disabled"} for worker in (ONE, TWO)}
    with listening(app) as events:
        apps.add.delay(1, 1).get(timeout=60)
        wait_until(lambda: inspected(app, "active")[ONE] == [], what="the worker has heard of its end")
        controlled(app, "enable_events")
        result = apps.add.delay(1, 1)
        assert {event["uuid"] for event in events.wait("task-succeeded")} == {result.id}
    controlled(app, "disable_events")


def test_control_heartbeat(app: Celery) -> None:
    with listening(app) as events:
        # It has no answer, for which the command line would wait.
        app.control.broadcast("heartbeat")
        # The beats that workers send by themselves have another frequency.
        wait_until(
            lambda: {event["hostname"] for event in events.of("worker-heartbeat") if event["freq"] == 5} == {ONE, TWO},
            what="both hearts",
        )


def test_control_election(app: Celery) -> None:
    # It needs the gossip between workers, which Celery has on RabbitMQ and Redis only: the command is refused.
    arguments = {"id": "an election", "topic": "task"}
    replies = app.control.broadcast("election", arguments, [ONE, TWO], reply=True, timeout=60)
    assert all("Gossip" in answer["error"] for reply in replies for answer in reply.values())
    assert inspected(app, "ping") == {ONE: {"ok": "pong"}, TWO: {"ok": "pong"}}


def test_control_pool_grow_and_pool_shrink(app: Celery, jobs: Jobs, journal: Journal, gate: Path) -> None:
    answers = controlled(app, "pool_grow", "1")
    assert answers[ONE] == {"ok": "pool will grow"}
    assert "not supported with autoscale" in answers[TWO]["error"]
    # Celery's pool starts a process when it next looks after itself, every five seconds.
    results = [apps.wait_for_file.delay(str(gate)) for _ in range(2)]
    for result in results:
        jobs.wait(result, State.RUNNING)
    assert len(processes(app, ONE)) == 2
    gate.touch()
    for result in results:
        result.get(timeout=60)
    # A process is busy until the worker has heard of its result.
    shrunk = wait_until(lambda: "ok" in controlled(app, "pool_shrink", "1", to=ONE)[ONE], what="an idle process")
    assert shrunk
    wait_until(lambda: len(processes(app, ONE)) == 1, what="one process")
    for result in [apps.start_and_end.delay(journal.path, str(number)) for number in range(4)]:
        result.get(timeout=60)
    assert journal.most_at_once() == 1


def test_control_pool_restart(app: Celery) -> None:
    before = processes(app, ONE)
    answers = controlled(app, "pool_restart")
    assert answers[ONE] == {"ok": "reload started"}
    assert "Pool restarts not enabled" in answers[TWO]["error"]
    wait_until(lambda: not before & processes(app, ONE), what="other processes")
    assert apps.add.delay(2, 2).get(timeout=60) == 4


def test_control_rate_limit(app: Celery) -> None:
    task = "tests.support.apps.echo"
    assert controlled(app, "rate_limit", task, "100/s")[ONE] == {"ok": "new rate limit set successfully"}
    assert f"{task} [rate_limit=100/s]" in inspected(app, "registered", "rate_limit")[ONE]
    assert apps.echo.delay(1).get(timeout=60) == [[1], {}]
    assert "Invalid rate limit" in controlled(app, "rate_limit", task, "often")[ONE]["error"]
    assert controlled(app, "rate_limit", "tests.unknown", "1/s")[TWO] == {"error": "unknown task"}
    assert controlled(app, "rate_limit", task, "0")[ONE]["ok"]


def test_control_revoke(app: Celery, jobs: Jobs, gate: Path) -> None:
    running = apps.wait_for_file.delay(str(gate))
    jobs.wait(running, State.RUNNING)
    waiting = [apps.add.delay(number, 1) for number in range(2)]
    answers = controlled(app, "revoke", *(result.id for result in waiting))
    assert all("flagged as revoked" in answer["ok"] for answer in answers.values())
    for result in waiting:
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)
        jobs.wait(result, State.CANCELLED)
    assert jobs.of(running).state is State.RUNNING


def test_control_revoke_by_stamped_headers(app: Celery, jobs: Jobs, gate: Path) -> None:
    def send(customer: str, **options: Any) -> Any:
        return apps.wait_for_file.apply_async((str(gate),), stamped_headers=["customer"], customer=customer, **options)

    running = send("acme")
    jobs.wait(running, State.RUNNING)
    waiting, other = send("acme"), send("others")
    assert "flagged as revoked" in controlled(app, "revoke_by_stamped_headers", "customer=acme")[ONE]["ok"]
    assert jobs.of(running).state is State.RUNNING
    app.control.revoke_by_stamped_headers({"customer": ["acme"]}, terminate=True)
    assert jobs.wait(running, State.CANCELLED).reason == "terminated"
    jobs.wait(waiting, State.CANCELLED)
    gate.touch()
    assert other.get(timeout=60) == "done"


def test_control_terminate(app: Celery, jobs: Jobs, gate: Path) -> None:
    result = apps.wait_for_file.delay(str(gate))
    jobs.wait(result, State.RUNNING)
    answers = controlled(app, "terminate", "SIGKILL", result.id)
    assert answers == {ONE: {"ok": f"terminate: {result.id}"}, TWO: {"ok": "terminate: tasks unknown"}}
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)
    jobs.wait(result, State.CANCELLED)
    assert apps.add.delay(1, 1).get(timeout=60) == 2


def test_control_time_limit(app: Celery) -> None:
    task = "tests.support.apps.sleep"
    assert controlled(app, "time_limit", task, "0.2", "30")[ONE] == {"ok": "time limits set successfully"}
    assert (
        f"{task} [soft_time_limit=0.2 time_limit=30.0]"
        in inspected(app, "registered", "soft_time_limit", "time_limit")[ONE]
    )
    assert controlled(app, "time_limit", "tests.unknown", "1", "1")[ONE] == {"error": "unknown task"}
    app.control.time_limit(task, reply=True, timeout=20, destination=[ONE, TWO])


def test_control_shutdown(app: Celery, shared_workers: Workers, shared_database_url: str, tmp_path: Path) -> None:
    three = shared_workers(name="three", pool="solo", args=["-Q", "nobody's"])
    everybody = f"{ONE},{TWO},{three.hostname}"
    code, output = CeleryProgram(shared_database_url, tmp_path, "status", "-t", "20", "-d", everybody).run()
    assert (code, "3 nodes online." in output) == (0, True), output
    app.control.shutdown(destination=[three.hostname])
    assert three.wait() == 0
    assert "Got shutdown from remote" in three.log
    # It gives them a second, which on a busy machine may not do.
    wait_until(lambda: "2 nodes online." in invoke(app, status).output, what="two nodes")


# --- to whom, and for how long


def test_a_command_goes_to_everybody_or_to_whom_it_names(app: Celery) -> None:
    pong = {"ok": "pong"}
    assert app.control.inspect(timeout=20, limit=2).ping() == {ONE: pong, TWO: pong}
    assert app.control.ping(destination=[TWO], timeout=60) == [{TWO: pong}]
    assert app.control.ping(pattern="on*", matcher="glob", timeout=20, limit=1) == [{ONE: pong}]


def test_as_many_answers_as_are_wanted_end_the_wait(app: Celery) -> None:
    started = monotonic()
    assert len(app.control.ping(timeout=600, limit=2)) == 2
    assert len(app.control.ping(timeout=600, destination=[ONE, TWO])) == 2
    assert monotonic() - started < 600


def test_nobody_answers_within_the_timeout(app: Celery) -> None:
    started = monotonic()
    assert app.control.ping(destination=["nobody@test"], timeout=0.3) == []
    assert monotonic() - started >= 0.3
    result = invoke(app, status, "--timeout", "0.3", "--destination", "nobody@test")
    assert result.exit_code == 69
    assert "No nodes replied within time constraint" in result.output


# --- celery purge, celery list bindings


def test_purge(app: Celery, jobs: Jobs) -> None:
    results = [apps.add.apply_async((number, 1), queue="not consumed") for number in range(3)]
    kept = apps.add.apply_async((1, 1), queue="not purged")
    output = run(app, purge, "--force", "--queues", "not consumed,not purged", "--exclude-queues", "not purged")
    assert "Purged 3 messages from 1 known task queue." in output
    assert [jobs.storage.fetch(result.id) for result in results] == [None] * 3
    assert jobs.of(kept).state is State.AVAILABLE
    assert "No messages purged from 1 queue." in run(app, purge, "--force", "--queues", "not consumed")
    # Before Celery 5.7, a queue to which an app has sent is one of its own.
    assert app.control.purge() == (0 if celery.VERSION >= (5, 7) else 1)


def test_list_bindings(app: Celery) -> None:
    bindings = [line.split() for line in run(app, list_, "bindings").splitlines()]
    assert ["default", "default", "default"] in bindings
    assert ["one@test.celery.pidbox", "celery.pidbox"] in bindings
