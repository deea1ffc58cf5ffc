"""A delivery is settled, and its slot comes back, whatever the task, Celery's callbacks or the database do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from celery import Celery, signature
from celery.result import AsyncResult
from sqlalchemy import NullPool, create_engine

from kathikon_celery import bulk
from kathikon_celery.job import Cause, State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from tests.integration.conftest import Jobs, Workers, client_of
from tests.support.workers import WorkerProcess

pytestmark = pytest.mark.each_pool

#: Where the task raises what -> the end of the job: cause, crashes, and a part of what `result.result` is.
LOST = (State.DEAD, Cause.LOST, 2, "WorkerLostError")
RETURNED = (State.COMPLETED, None, 0, "'returned'")
ENDS = {
    ("body", "SystemExit"): LOST,
    ("body", "KeyboardInterrupt"): LOST,
    ("body", "GeneratorExit"): (State.DEAD, Cause.RAISED, 0, "GeneratorExit"),
    ("body", "Own"): (State.DEAD, Cause.RAISED, 0, "Own"),
    ("body", "MemoryError"): (State.DEAD, Cause.RAISED, 0, "MemoryError"),
    ("body", "Mute"): (State.DEAD, Cause.RAISED, 0, "Mute"),
    ("body", "Unpicklable"): (State.DEAD, Cause.RAISED, 0, "Unpicklable"),
    ("before_start", "SystemExit"): LOST,
    ("before_start", "Own"): (State.DEAD, Cause.RAISED, 0, "Own"),
    ("on_success", "MemoryError"): RETURNED,
    ("on_success", "SystemExit"): RETURNED,
    ("on_failure", "RuntimeError"): (State.DEAD, Cause.RAISED, 0, "the task's own"),
    ("on_failure", "MemoryError"): (State.DEAD, Cause.RAISED, 0, "the task's own"),
    ("on_failure", "SystemExit"): (State.DEAD, Cause.RAISED, 0, "the task's own"),
    ("on_failure", "Own"): (State.DEAD, Cause.RAISED, 0, "the task's own"),
    ("on_retry", "RuntimeError"): (State.DEAD, Cause.RAISED, 0, "MaxRetriesExceeded"),
    ("on_retry", "SystemExit"): (State.DEAD, Cause.RAISED, 0, "MaxRetriesExceeded"),
    ("after_return", "MemoryError"): RETURNED,
    ("after_return", "SystemExit"): RETURNED,
    ("task_prerun", "SystemExit"): LOST,
    ("task_postrun", "Own"): RETURNED,
    ("task_failure", "SystemExit"): (State.DEAD, Cause.RAISED, 0, "the task's own"),
    ("early", "SystemExit"): (State.DEAD, Cause.LOST, 0, "WorkerLostError"),
    ("early", "Own"): (State.DEAD, Cause.RAISED, 0, "Own"),
    ("object", ""): (State.DEAD, Cause.RAISED, 0, "EncodeError"),
    ("refused", ""): (State.DEAD, Cause.RAISED, 0, "refused by a trigger"),
    ("body", "forbidden"): (State.DEAD, Cause.REFUSED, 0, "cannot store how the task ended"),
}
#: These cost a pool process each, and billiard some seconds until there is another.
LEAVES_OUT = {
    "prefork": {
        ("body", "SystemExit"), ("body", "KeyboardInterrupt"), ("before_start", "SystemExit"),
        ("on_success", "SystemExit"), ("on_retry", "SystemExit"), ("after_return", "SystemExit"),
        ("task_prerun", "SystemExit"), ("task_failure", "SystemExit"), ("early", "SystemExit"),
    },
}  # fmt: skip

#: The database refuses one result, and that another task has raised.
TRIGGERS = {
    "sqlite": [
        """CREATE TRIGGER IF NOT EXISTS refuses BEFORE UPDATE ON kathikon_jobs
        WHEN instr(NEW.result, 'refuse this') OR NEW.cause = 'raised' AND instr(NEW.body, 'forbidden')
        BEGIN SELECT RAISE(ABORT, 'refused by a trigger'); END"""
    ],
    "postgresql": [
        """CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION 'refused by a trigger'; END $$""",
        """CREATE OR REPLACE TRIGGER refuses BEFORE UPDATE ON kathikon_jobs FOR EACH ROW
        WHEN (strpos(NEW.result, 'refuse this') > 0 OR NEW.cause = 'raised' AND strpos(NEW.body, 'forbidden') > 0)
        EXECUTE FUNCTION refuse()""",
    ],
}


@pytest.fixture(scope="module", params=["prefork", "threads", "gevent", "solo"])
def pool(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def worker(shared_workers: Workers, pool: str) -> WorkerProcess:
    if pool == "gevent":
        pytest.importorskip("gevent")
    for earlier in shared_workers.started:
        earlier.kill9()
    return shared_workers(app="tests.support.bad_ends", pool=pool, name=pool, concurrency=1)


@pytest.fixture
def app(shared_database_url: str, worker: WorkerProcess) -> Iterator[Celery]:
    """A client, and a database with a trigger that refuses some rows."""
    engine = create_engine(shared_database_url, poolclass=NullPool)
    with closing(Storage(shared_database_url, Settings())) as storage:
        storage.setup()
    with engine.begin() as connection:
        for statement in TRIGGERS[engine.name]:
            connection.exec_driver_sql(statement)
    with client_of(shared_database_url, kathikon_max_attempts=2) as app:
        yield app


def test_each_end_is_written_and_the_only_slot_comes_back(
    app: Celery, jobs: Jobs, worker: WorkerProcess, pool: str
) -> None:
    wanted = {end: ENDS[end] for end in ENDS if end not in LEAVES_OUT.get(pool, ())}
    pid = worker.pid
    sent = {end: app.send_task("end_early" if end[0] == "early" else "end", end) for end in wanted}
    found = {}
    for end, result in sent.items():
        job = jobs.wait(result, State.DEAD, State.COMPLETED)
        found[end] = (job.state, job.cause, job.crashes, _result(result))
    assert {end: one for end, one in found.items() if not _fits(one, wanted[end])} == {}
    assert app.send_task("say", ("goes on",)).get(timeout=60) == "goes on"
    assert (worker.running, worker.pid) == (True, pid)


def test_the_errback_of_an_error_that_the_tracer_does_not_catch_is_sent(app: Celery, jobs: Jobs) -> None:
    for number in range(5):
        errback = signature("say", (number,), immutable=True).set(task_id=f"errback {number}")
        app.send_task("end", ("body", "Own"), link_error=errback)
        assert app.AsyncResult(errback.options["task_id"]).get(timeout=60) == number
        errback.freeze()


def test_a_refused_report_keeps_no_other_back(app: Celery, jobs: Jobs, worker: WorkerProcess) -> None:
    with bulk():
        sent = [app.send_task("say", (number,)) for number in range(40)]
        refused = app.send_task("say", ("refuse this",))
        forbidden = app.send_task("end", ("body", "forbidden"))
        sent += [app.send_task("say", (number,)) for number in range(40, 80)]
    assert [result.get(timeout=60) for result in sent] == list(range(80))
    assert jobs.wait(refused, State.DEAD).cause in (Cause.RAISED, Cause.REFUSED)
    assert jobs.wait(forbidden, State.DEAD).cause is Cause.REFUSED
    assert {jobs.wait(result, State.COMPLETED).attempts for result in sent} == {1}


def _result(result: AsyncResult) -> str:
    try:
        result.get(timeout=60, propagate=False)
    except Exception as error:
        return repr(error)
    return repr(result.result)


def _fits(found: tuple[object, ...], wanted: tuple[object, ...]) -> bool:
    return found[:3] == wanted[:3] and str(wanted[3]) in str(found[3])
