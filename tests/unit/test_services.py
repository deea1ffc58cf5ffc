"""What spares a service its step: the answers that somebody else has got for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.storage import Storage, nodes
from kathikon_celery.storage.dialects.sqlite import SQLite
from kathikon_celery.worker.services import promoter
from kathikon_celery.worker.services.lifeline import Lifeline
from kathikon_celery.worker.services.promoter import Promoter
from kathikon_celery.worker.services.pruner import LIMITS_INTERVAL, REST, Pruner
from kathikon_celery.worker.services.service import Service
from tests.storage.actors import Worker, new_job
from tests.support.clocks import clock_replaced
from tests.support.waiting import wait_until


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with closing(Storage(f"sqlite:///{tmp_path / 'kathikon.db'}")) as storage:
        storage.setup()
        yield storage


class Stepping(Service):
    """Counts its steps; an answer spares them for the seconds that it says."""

    steps = 0

    def questions(self) -> Mapping[str, Mapping[str, Any]]:
        return {"question": {"parameter": 1}}

    def spare(self, answers: Mapping[str, Any]) -> float:
        return float(answers["seconds"])

    def step(self) -> float:
        self.steps += 1
        return self.interval


@contextmanager
def running(service: Stepping) -> Iterator[Callable[[int], int]]:
    service.start()
    try:
        yield lambda number: wait_until(lambda: service.steps if service.steps >= number else 0)
    finally:
        service.stop()


def test_it_asks_when_its_step_is_near(storage: Storage) -> None:
    service = Stepping(storage=storage, interval=60.0)
    with running(service) as until:
        until(1)
        wait_until(lambda: not service.asks(0.4))
        assert not service.asks(20.0)
        assert not service.asks(600.0)  # an answer would be old by then
        service.nudge()
        until(2)


def test_it_asks_once_a_step(storage: Storage) -> None:
    service = Stepping(storage=storage, interval=60.0)
    assert service.asks(0.4) == {"question": {"parameter": 1}}
    service.hear({"seconds": 60.0})
    assert not service.asks(0.4)


def test_an_answer_spares_the_step(storage: Storage) -> None:
    service = Stepping(storage=storage, interval=60.0)
    service.hear({"seconds": 60.0})
    with running(service) as until:
        wait_until(lambda: service.last_success)
        assert service.steps == 0
        service.nudge()
        assert until(1) == 1


def test_who_is_nudged_believes_no_older_answer(storage: Storage) -> None:
    service = Stepping(storage=storage, interval=60.0)
    service.hear({"seconds": 60.0})
    service.nudge()
    with running(service) as until:
        until(1)


def test_an_answer_that_is_too_old_spares_nothing(storage: Storage) -> None:
    service = Stepping(storage=storage, interval=60.0)
    service.hear({"seconds": 0.0})
    with running(service) as until:
        until(1)


@pytest.mark.parametrize(
    ("due", "seconds"), [(None, 1.0), (3600.0, 1.0), (0.25, 0.25), (0.0, 0.0), (-5.0, -5.0)], ids=str
)
def test_promoter(storage: Storage, due: float | None, seconds: float) -> None:
    assert Promoter(storage=storage, interval=1.0).spare({"next_due": due}) == seconds


def test_the_promoter_does_not_sleep_past_its_next_job(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> None:
    """When one call follows another it waits a little; not so when it wakes by itself, as the next job is due."""
    now, slept = 100.0, []
    monkeypatch.setattr(promoter, "monotonic", lambda: now)
    monkeypatch.setattr(promoter, "sleep", slept.append)
    monkeypatch.setattr(storage, "next_due", lambda: 0.0004)
    one = Promoter(storage=storage, interval=1.0)
    assert one.step() == promoter.TICK
    one._due, now = now + promoter.TICK, now + promoter.TICK
    assert one.step() == promoter.TICK
    assert slept == []
    one._due, now = now + 1.0, now + 0.002  # called
    one.step()
    assert slept == [pytest.approx(promoter.GAP - 0.002)]
    one._due = now + 0.001
    one.step()
    assert slept[1:] == [pytest.approx(0.001)]


@pytest.mark.parametrize(
    ("due", "promoted", "rests"),
    [(-0.0004, 1, True), (-0.0004, 0, False), (-1.0, 0, True)],
    ids=["promoted", "a moment too early", "locked"],
)
def test_when_the_promoter_rests(
    monkeypatch: pytest.MonkeyPatch, storage: Storage, due: float, promoted: int, rests: bool
) -> None:
    """What is due shortly after is promoted with more of its kind; what is locked is not asked for at once."""
    slept: list[float] = []
    monkeypatch.setattr(promoter, "monotonic", lambda: 100.0)
    monkeypatch.setattr(promoter, "sleep", slept.append)
    monkeypatch.setattr(storage, "next_due", lambda: due)
    monkeypatch.setattr(storage, "promote_scheduled", lambda: promoted)
    one = Promoter(storage=storage, interval=1.0)
    one.step()
    one._due = 100.0
    one.step()
    assert slept == [pytest.approx(promoter.GAP)] * rests


def test_pruner(storage: Storage) -> None:
    pruner = Pruner(storage=storage, interval=60.0)
    assert pruner.spare({"is_anything_old": True}) == 0.0
    for nothing in (False, None):
        assert 48.0 <= pruner.spare({"is_anything_old": nothing}) <= 72.0


def test_the_pruner_looks_at_limits_after_it_has_run_limited_jobs(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    present, left, looks = [10_000.0], [True], list[bool]()

    def prune() -> bool:
        looks.append(storage.database.has_limits_to_prune)
        return left[0]

    monkeypatch.setattr("kathikon_celery.worker.services.pruner.monotonic", lambda: present[0])
    monkeypatch.setattr(storage, "prune_limits", prune)
    pruner = Pruner(storage=storage, interval=60.0)
    monkeypatch.setattr(pruner, "_rest", lambda: 0.0)
    pruner.step()
    assert looks == []
    storage.database.has_limits_to_prune = True
    assert pruner.spare({"is_anything_old": False}) == 0.0
    pruner.step()
    assert looks == [False]
    assert pruner.spare({"is_anything_old": False}) > 0
    pruner.step()
    present[0] += 2 * LIMITS_INTERVAL
    left[0] = False
    pruner.step()
    assert len(looks) == 2
    present[0] += 2 * LIMITS_INTERVAL
    assert pruner.spare({"is_anything_old": False}) > 0


def test_nothing_is_deleted_by_a_clock_that_has_jumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wall, mono = [1.7e9], [1000.0]
    monkeypatch.setattr(SQLite, "on_connect", clock_replaced(lambda: wall[0]))
    monkeypatch.setattr("kathikon_celery.worker.services.pruner.monotonic", lambda: mono[0])
    year = 3.2e7
    with closing(Storage(f"sqlite:///{tmp_path / 'another.db'}")) as storage:
        storage.setup()
        storage.insert(new_job())
        worker = Worker(storage)
        worker.complete(worker.claim_one())
        pruner, pruned = Pruner(storage=storage, interval=60.0), lambda: storage.fetch("job") is None
        pruner.step()
        wall[0] += year
        assert 0 < pruner.step() <= 72
        wall[0] -= year  # a minute later
        pruner.step()
        assert not pruned()
        wall[0] += year
        pruner.step()
        mono[0] += REST + 1
        wall[0] += REST + 1
        pruner.step()
        assert pruned()  # the clock was right, or nobody has noticed


def test_an_answer_about_the_row_before_is_not_about_the_node_of_now(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables are replaced, and another thread registers this process, while its lease is being renewed."""
    presence = OwnNode(storage, "me")
    presence._register()
    reborn = []
    presence.on_reborn.append(lambda *ids: reborn.append(ids))

    def renewed_too_late(*_: object) -> bool:
        presence._replaced()
        presence._register_again(0)
        return False

    monkeypatch.setattr(nodes, "renew", renewed_too_late)
    presence._renew()
    assert reborn == [(0, presence.id)]
    assert not presence.is_due()


def test_lifeline_sees_for_itself_that_its_neighbours_run(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    presence = OwnNode(storage, "me")
    lifeline = Lifeline(storage=storage, presence=presence)
    spared = lambda is_amiss=False: lifeline.spare({"is_amiss": is_amiss, "renewals": renewals()})  # noqa: E731

    def renewals() -> str | None:
        with storage.database.read() as connection:
            return connection.execute(select(nodes.RENEWALS)).scalar()

    assert spared() == 1.0
    other = nodes.register(storage.database, "other", "here", 1, 0.0, 60.0).id
    runs = True
    monkeypatch.setattr("kathikon_celery.nodes.others.machine", lambda: "here")
    monkeypatch.setattr("kathikon_celery.nodes.others.is_running", lambda pid, started: runs)
    assert spared() == 0.0  # a new node
    lifeline.step()
    assert spared() == 1.0
    assert spared(is_amiss=True) == 0.0
    runs = False
    assert spared() == 0.0
    lifeline.step()
    with storage.database.read() as connection:
        assert other not in [node.id for node in nodes.others(connection, 0)]
    lifeline.step()
    assert spared() == 1.0
