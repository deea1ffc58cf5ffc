"""What the intake does when the database, or the consumer, takes its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from inspect import GEN_CLOSED, getgeneratorstate
from threading import Thread
from time import monotonic
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Connection, select

from kathikon_celery.consume import claiming, idle_state, ledger, loop, recovery, transaction
from kathikon_celery.consume import intake as intake_module
from kathikon_celery.consume.delivery import Delivery
from kathikon_celery.consume.intake import Intake
from kathikon_celery.consume.pool import NoPool
from kathikon_celery.job import State
from kathikon_celery.storage import claim
from kathikon_celery.storage.dialects.returning import changing_held
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.tables import messages, nodes
from tests.integration.conftest import Jobs
from tests.support import apps
from tests.support.waiting import wait_until


class Clock:
    """The clock of the intake; a test moves it on."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.stopped: float | None = None

    def __call__(self) -> float:
        return monotonic() + self.ahead if self.stopped is None else self.stopped

    def stop(self) -> None:
        """From now on no time passes: what the intake has claimed does not wait, however long the test takes."""
        self.stopped = self()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (claiming, idle_state, intake_module, ledger, loop, recovery, transaction):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock


class FakePool(NoPool):
    """A pool of which a test says how many slots it has, and whether all are in use."""

    def __init__(self, slots: int, full: bool = True) -> None:
        self.number, self.full = slots, full

    def slots(self) -> int:
        return self.number

    def is_full(self) -> bool:
        return self.full


@pytest.fixture
def intake(client: Celery, jobs: Jobs, clock: Clock) -> Iterator[Intake]:
    """The intake of a worker that has one slot."""
    intake = Intake(jobs.storage)
    intake.pool = FakePool(slots=1)
    yield intake
    intake.stop()


def until_looked(intake: Intake, clock: Clock) -> None:
    began = clock()
    intake.look()
    wait_until(lambda: intake._loop.last_success > began)


def test_a_claim_whose_commit_takes_long_is_handed_out(
    client: Celery, jobs: Jobs, intake: Intake, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = jobs.storage.database
    once = database.once

    @contextmanager
    def slow(durable: bool = False) -> Iterator[Connection]:
        with once(durable) as connection:
            yield connection
        if clock.stopped is None and jobs.of(result).state is State.CLAIMED:
            clock.ahead += 60
            clock.stop()

    result = apps.add.delay(1, 1)
    monkeypatch.setattr(database, "once", slow)
    got: list[Delivery] = []
    intake.subscribe("default", False, got.append, lambda: 1)
    assert intake.wait(60)
    assert clock.ahead
    assert intake.pump() == 1
    assert jobs.of(result).attempts == 1


@pytest.mark.parametrize("full", [True, False], ids=["full", "free"])
def test_what_waits_for_long_is_given_back_when_the_pool_is_full(
    client: Celery, jobs: Jobs, intake: Intake, clock: Clock, full: bool
) -> None:
    intake.pool = FakePool(slots=1, full=full)
    result = apps.add.delay(1, 1)
    intake.subscribe("default", False, lambda delivery: None, lambda: 1)
    assert intake.wait(60)  # and nobody pumps: the consumer is busy
    claimed = jobs.of(result)
    clock.ahead += 60
    if full:
        # Given back, and perhaps claimed anew.
        wait_until(lambda: jobs.of(result).fence > claimed.fence)
    else:
        for _ in range(2):  # the look that is under way may have asked the clock before
            until_looked(intake, clock)
        assert (jobs.of(result).state, jobs.of(result).fence) == (State.CLAIMED, claimed.fence)


def test_a_message_that_is_acknowledged_is_gone(client: Celery, jobs: Jobs, intake: Intake) -> None:
    """Its report is none of a job, even where it is all that there is to write."""
    got: list[Delivery] = []
    with client.connection_for_write() as connection, connection.SimpleQueue("messages") as queue:
        intake.subscribe("messages", False, got.append, lambda: 10)
        queue.put("hello")
        wait_until(lambda: intake.pump() or got)
        intake.acknowledge(got[0].tag)
        with jobs.storage.database.read() as reading:
            wait_until(lambda: not reading.execute(select(messages.c.seq).where(messages.c.queue == "messages")).all())


@pytest.mark.postgresql
def test_a_job_before_the_front_is_found(client: Celery, jobs: Jobs, intake: Intake) -> None:
    """What a look sees the claim gets, though it has learned to begin elsewhere."""
    if not jobs.storage.database.dialect.keeps_old_rows:
        pytest.skip("SQLite keeps no old rows: a queue has no front")
    got: list[Delivery] = []
    intake.subscribe("default", False, got.append, lambda: 10)
    (subscription,) = intake.subscriptions.every()
    wait_until(lambda: intake._idle.will_be_woken)
    ahead = datetime.now(timezone.utc) + timedelta(hours=1)
    subscription.front.looked([(0, ahead)], True, 1e6)
    apps.add.delay(1, 1)
    wait_until(lambda: intake.pump() or got)


@pytest.mark.postgresql
def test_a_worker_with_a_slot_to_spare_is_called_while_it_works(client: Celery, jobs: Jobs, intake: Intake) -> None:
    """Its row says so from its claim on; when it has no slot left, it does not."""
    database = jobs.storage.database
    if not database.dialect.wakes_by_name:
        pytest.skip("SQLite calls whoever sleeps")
    got: list[Delivery] = []
    intake.pool = FakePool(slots=2)
    intake.subscribe("default", False, got.append, lambda: 10)

    def waiting() -> object:
        with database.read() as connection:
            return connection.execute(select(nodes.c.waiting).where(nodes.c.id == intake.own_node.id)).scalar_one()

    wait_until(lambda: intake._idle.will_be_woken)
    for number, waits_for in enumerate([["default"], None], 1):
        apps.add.delay(1, 1)
        wait_until(lambda number=number: intake.pump() or len(got) == number)
        wait_until(lambda waits_for=waits_for: waiting() == waits_for)
    intake.acknowledge(got[0].tag)
    wait_until(lambda: waiting() == ["default"])
    apps.add.delay(1, 1)
    wait_until(lambda: intake.pump() or len(got) == 3)


def test_an_idle_worker_compiles_what_its_first_jobs_ask_for(
    client: Celery, jobs: Jobs, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes longer than to run a job."""
    got: list[Delivery] = []
    # Not full: else what this test is slow to take is given back, by a statement of its own.
    intake.pool = FakePool(slots=2, full=False)
    intake.subscribe("default", False, got.append, lambda: 10)
    wait_until(lambda: getgeneratorstate(intake._loop._unprepared) == GEN_CLOSED)
    compiled: list[str] = []
    compile_it = prepared._Prepared.__init__
    # After a new connection, as this test may open one.
    repeat = changing_held(jobs.storage.database.dialect, claim._CLAIMED_AGAIN, False, ())

    def compile_seen(self: prepared._Prepared, statement: Any, *args: Any) -> None:
        compile_it(self, statement, *args)
        if statement is not repeat:
            compiled.append(self.text)

    monkeypatch.setattr(prepared._Prepared, "__init__", compile_seen)
    for number in (1, 2):
        result = apps.add.delay(1, 1)
        wait_until(lambda number=number: intake.pump() or len(got) == number)
        intake.acknowledge(got[-1].tag)
        wait_until(lambda result=result: jobs.of(result).state is State.COMPLETED)
    assert any("INSERT" in text for text in compiled)
    assert not [text for text in compiled if "'claimed'" in text or "'completed', node_id" in text]


def test_who_is_rung_finds_the_intake_free(client: Celery, jobs: Jobs, intake: Intake) -> None:
    """To ring lets other threads run: those that report the end of a task must not wait for it."""
    intake.pool = FakePool(slots=3)
    for _ in range(3):
        apps.add.delay(1, 1)
    got: list[Delivery] = []
    intake.subscribe("default", False, got.append, lambda: 1)
    wait_until(lambda: intake.pump() or got)
    free: list[bool] = []

    def ring() -> None:
        other = Thread(target=intake.in_hand, daemon=True)
        other.start()
        other.join(10)
        free.append(not other.is_alive())

    wait_until(lambda: intake.subscriptions.get("default").waiting)
    intake._ledger.on_ready = ring
    intake.finish(got[0].tag)
    assert free[0]


def test_what_a_node_slept_on_is_closed_when_it_is_another_node(client: Celery, intake: Intake) -> None:
    intake.subscribe("default", False, lambda delivery: None, lambda: 1)
    node, slept_on = intake.own_node, intake._ledger.wakeup
    assert slept_on is not None
    node._register_again(node.id)
    wait_until(lambda: slept_on._receiver.fileno() == -1, what="its sockets are closed")
