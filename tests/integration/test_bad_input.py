"""What a real worker does with rows, names and payloads that nobody should send; the rest goes on."""

from __future__ import annotations

import json
import pickle
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from celery.result import AsyncResult
from click.testing import CliRunner
from kombu import Exchange, Queue
from sqlalchemy import text, update

from kathikon_celery.cli import kathikon
from kathikon_celery.job import Job, State
from kathikon_celery.storage.tables import jobs as table
from tests.integration.conftest import Jobs, Workers
from tests.support import apps
from tests.support.workers import WorkerProcess

ADD = "tests.support.apps.add"


@pytest.fixture(scope="module")
def worker(shared_workers: Workers) -> WorkerProcess:
    return shared_workers(concurrency=2)


def envelope_of(job_id: str, **changes: Any) -> dict[str, Any]:
    """The envelope that a call of ``add`` has, with changes."""
    return {
        "headers": {"task": ADD, "id": job_id, "lang": "py", "argsrepr": "(1, 2)", "kwargsrepr": "{}"},
        "properties": {"correlation_id": job_id, "delivery_info": {"exchange": "", "routing_key": "default"}},
        "content-type": "application/json",
        "content-encoding": "utf-8",
    } | changes


BODY = '[[1, 2], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'

#: What the envelope is, or what is changed in a good one; the body; and what the reason must say.
CORRUPT = {
    "envelope-no-json": ("{no JSON", BODY, "envelope is no JSON"),
    "envelope-no-mapping": ("[1, 2]", BODY, "envelope"),
    "no-headers": ({"headers": None}, BODY, "headers"),
    "headers-no-mapping": ({"headers": ["task"]}, BODY, "headers"),
    "task-without-id": ({"headers": {"task": ADD}}, BODY, "id"),
    "properties-no-mapping": ({"properties": "none"}, BODY, "properties"),
    "delivery-info-no-mapping": ({"properties": {"delivery_info": 5}}, BODY, "delivery_info"),
    "body-no-base64": ({"base64": True}, "??", "base64"),
    "body-no-json": ({}, "{no JSON", "body"),
    "body-of-another-shape": ({}, "5", "body"),
    "body-empty": ({}, "", "body"),
    "unknown-content-type": ({"content-type": "application/x-nonsense"}, BODY, "application/x-nonsense"),
    "content-type-not-allowed": ({"content-type": "application/x-python-serialize"}, BODY, "pickle"),
    "timelimit-no-pair": ({"timelimit": 5}, BODY, "timelimit is 5"),
    "expires-no-time": ({"expires": [5]}, BODY, "expires"),
    "eta-no-time": ({"eta": "soon"}, BODY, "invalid ETA value 'soon'"),
    "unknown-compression": ({"compression": "squeeze"}, BODY, "squeeze"),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_row_is_dead_and_says_why(app: Celery, jobs: Jobs, worker: WorkerProcess, what: str) -> None:
    changes, body, said = CORRUPT[what]
    job_id = f"corrupt-{what}"
    if isinstance(changes, dict):
        envelope = envelope_of(job_id, **changes)
        for name in ("compression", "timelimit", "expires", "eta"):
            if name in changes:
                envelope["headers"][name] = envelope.pop(name)
        changes = json.dumps(envelope)
    jobs.storage.insert(Job(id=job_id, task=ADD, envelope=changes, body=body))
    sound = apps.add.delay(2, 2)
    dead = jobs.wait(AsyncResult(job_id, app=app), State.DEAD, State.COMPLETED)
    assert (dead.state, dead.envelope, dead.body) == (State.DEAD, changes, body)
    assert said in dead.reason
    assert sound.get(timeout=60) == 4
    with pytest.raises(Exception, match=r"^corrupt row: "):
        AsyncResult(job_id, app=app).get(timeout=60)
    assert worker.running


def unsendable() -> str:
    """A list of lists, so deep that JSON can be read and pickle cannot be written. How deep depends on Python."""
    for depth in range(500, 10_000, 250):
        text = "[" * depth + "]" * depth
        try:
            pickle.dumps(json.loads(text))
        except RecursionError:
            return text
    raise AssertionError("whatever JSON reads, pickle writes")


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_what_cannot_be_sent_to_a_process_of_the_pool_is_dead(
    app: Celery, jobs: Jobs, worker: WorkerProcess, early: bool
) -> None:
    """Celery's worker ends of it, and so would each that claims the job after it."""
    job_id, task = f"deep-{early}", "tests.support.apps.append_early" if early else ADD
    envelope = envelope_of(job_id)
    envelope["headers"]["task"] = task
    body = BODY.replace("[1, 2]", f"[1, {unsendable()}]")
    jobs.storage.insert(Job(id=job_id, task=task, envelope=json.dumps(envelope), body=body))
    sound = apps.add.delay(2, 2)
    dead = jobs.wait(AsyncResult(job_id, app=app), State.DEAD, State.COMPLETED)
    assert (dead.state, dead.attempts, dead.body) == (State.DEAD, 1, body)
    assert "RecursionError" in dead.reason
    assert sound.get(timeout=60) == 4
    with pytest.raises(Exception, match="RecursionError"):
        AsyncResult(job_id, app=app).get(timeout=60)
    assert worker.running


def test_rows_that_nobody_can_read_spoil_no_listing(app: Celery, jobs: Jobs, worker: WorkerProcess) -> None:
    later = {"countdown": 3600}
    asleep, erring = (apps.add.apply_async((1, 1), **later) for _ in range(2))
    with jobs.storage.database.write() as connection:
        connection.execute(update(table).where(table.c.id == asleep.id).values(state="asleep"))
        connection.execute(update(table).where(table.c.id == erring.id).values(errors="none"))
    listed = {job.id: job for job in jobs.storage.all()}
    for sent, said in ((asleep, "state is 'asleep'"), (erring, "errors is 'none'")):
        assert listed[sent.id].state is State.DEAD
        assert listed[sent.id].reason == f"corrupt row: {said}"
        assert said in str(sent.result)
    with pytest.raises(Exception, match="state is 'asleep'"):
        asleep.get(timeout=60)
    assert ("default", "asleep") in jobs.storage.counts()
    assert apps.add.delay(2, 2).get(timeout=60) == 4
    assert jobs.storage.delete([asleep.id, erring.id]) == 2


def test_sqlite_text_that_is_no_utf_8(app: Celery, jobs: Jobs, worker: WorkerProcess) -> None:
    if jobs.storage.database.dialect.name != "sqlite":
        return  # PostgreSQL keeps no such text
    for number, column in enumerate(("body", "envelope")):
        job_id = f"no-utf-8-{number}"
        later = datetime.now(timezone.utc) + timedelta(hours=1)
        envelope = json.dumps(envelope_of(job_id))
        jobs.storage.insert(Job(id=job_id, task=ADD, envelope=envelope, body=BODY, scheduled_at=later))
        spoiled = {column: text("CAST(x'fffe' AS TEXT)"), "state": "available"}
        with jobs.storage.database.write() as connection:
            connection.execute(update(table).where(table.c.id == job_id).values(spoiled))
        dead = jobs.wait(AsyncResult(job_id, app=app), State.DEAD, State.COMPLETED)
        assert (dead.state, getattr(dead, column)) == (State.DEAD, "\udcff\udcfe")
        assert column in dead.reason
    assert apps.add.delay(2, 2).get(timeout=60) == 4


NAMES = {
    "nul": "nul\0inside",
    "surrogate": "half \ud800 a pair",
    "emoji": "\N{SNAKE}\N{FAMILY}\U0001f9d1\u200d\U0001f680",
    "long": "z" * 10_000,
    "long-emoji": "\N{SNAKE}" * 10_000,
    "punctuation": " with:colons,commas;and\nnewlines\t'quotes\" %s %(x)s :bind * # . ",
    "digest": "#" + "0" * 40,
}


@pytest.mark.parametrize("what", NAMES)
def test_names_of_any_length_and_alphabet(app: Celery, jobs: Jobs, worker: WorkerProcess, what: str) -> None:
    name = NAMES[what]
    app.control.add_consumer(name, destination=[worker.hostname], reply=True)
    as_id = apps.add.apply_async((1, 1), task_id=name)
    as_queue = apps.echo.apply_async((name,), queue=name)
    as_unknown = app.send_task(name)
    assert as_id.get(timeout=60) == 2
    assert jobs.of(as_id).id == name
    assert as_queue.get(timeout=60) == [[name], {}]
    job = jobs.wait(as_queue, State.COMPLETED)
    assert job.queue == name
    assert jobs.storage.counts()[name, "completed"] == 1
    assert [one.id for one in jobs.storage.all(queue=name)] == [as_queue.id]
    unknown = jobs.wait(as_unknown, State.DEAD)
    assert unknown.reason.startswith("NotRegistered(")
    exchange = Exchange(f"exchange {name}", "topic")
    with app.connection_for_write() as connection:
        Queue(name, exchange, routing_key=f"key.{name}")(connection.default_channel).declare()
    routed = apps.add.apply_async((3, 3), exchange=exchange, routing_key=f"key.{name}")
    assert routed.get(timeout=60) == 6
    assert jobs.of(routed).queue == name
    app.control.cancel_consumer(name, destination=[worker.hostname], reply=True)
    shown = CliRunner().invoke(kathikon, ["counts"], obj=CLIContext(app=app, no_color=True, workdir=None))
    assert shown.exit_code == 0, shown.output
    assert "".join(one if one.isprintable() else repr(one)[1:-1] for one in name) in shown.output


def test_a_payload_of_50_mb(app: Celery, jobs: Jobs, worker: WorkerProcess) -> None:
    size = 50 * 2**20
    sent = apps.big_payload.apply_async(("y" * size, size))
    result = sent.get(timeout=60)
    assert len(result) == size
    assert set(result) == {"x"}
    assert len(jobs.wait(sent, State.COMPLETED).body) >= size
    assert worker.running
