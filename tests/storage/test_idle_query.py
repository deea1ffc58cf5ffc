"""What an idle worker asks in one statement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from kathikon_celery.job import TERMINAL, State
from kathikon_celery.storage import Storage, chords, idle_query, messages, nodes, prune, results, topology
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.nodes import Holder
from tests.storage.actors import Worker, new_job
from tests.support.statements import counted
from tests.support.waiting import wait_until

AGE = 3600.0


class Asker:
    """Asks whatever it is told to."""

    def __init__(self, questions: idle_query.Questions) -> None:
        self.questions = questions
        self.answers: Mapping[str, Any] = {}

    def asks(self, within: float) -> idle_query.Questions:
        return self.questions

    def hear(self, answers: Mapping[str, Any]) -> None:
        self.answers = answers


def answer(storage: Storage, question: str, **parameters: Any) -> Any:
    asker = Asker({question: parameters})
    with storage.database.read() as connection:
        assert not idle_query.look(storage.database, connection, ["nowhere"], True, [(asker, asker.asks(1.0))])
    (found,) = asker.answers.items()
    assert found[0] == question
    return found[1]


def test_all_is_one_statement(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job())
    ages = prune.ages(dict.fromkeys(TERMINAL, AGE), group=AGE, chord=AGE, wait=AGE)
    askers = [
        Asker({"next_due": {}, "is_amiss": {"machine": "machine"}}), Asker({}), Asker({"is_anything_old": ages})
    ]  # fmt: skip
    with storage.database.read() as connection, counted() as statements:
        asked = [(asker, asker.asks(1.0)) for asker in askers]
        assert idle_query.look(storage.database, connection, ["default", "mails"], True, asked)
    assert len(statements) == 1
    assert [list(asker.answers) for asker in askers] == [["next_due", "is_amiss"], [], ["is_anything_old"]]
    assert not any(value for asker in askers for value in asker.answers.values())


def test_next_due(storage: Storage, set_row: Callable[..., None]) -> None:
    assert answer(storage, "next_due") is None
    storage.insert(new_job("2", scheduled_at=datetime.now(timezone.utc) + timedelta(hours=1)))
    assert answer(storage, "next_due") == pytest.approx(3600, abs=60)
    storage.insert(new_job("1", scheduled_at=datetime.now(timezone.utc) + timedelta(hours=1)))
    set_row("1", available_at=datetime.now(timezone.utc) - timedelta(hours=1))
    assert answer(storage, "next_due") == pytest.approx(-3600, abs=60)


class TestIsAmiss:
    @pytest.fixture(autouse=True)
    def _as_seen_by(self, storage: Storage, worker: Worker) -> None:
        self.storage, self.worker = storage, worker

    def is_amiss(self, machine: str = "machine") -> bool:
        return bool(answer(self.storage, "is_amiss", machine=machine))

    def test_nothing(self) -> None:
        assert not self.is_amiss()

    def test_a_free_lock_on_another_machine(self) -> None:
        holder = Holder(self.storage.database)
        assert not self.is_amiss()
        assert self.is_amiss(machine="elsewhere") is (self.storage.database.dialect.name == "postgresql")
        holder.hold(self.worker.id)
        assert not self.is_amiss(machine="elsewhere")
        holder.drop()

    def test_what_no_node_holds(self, set_row: Callable[..., None]) -> None:
        self.storage.insert(new_job())
        set_row(state="claimed", node_id=self.worker.id)
        assert not self.is_amiss()
        set_row(state="claimed", node_id=4711)
        assert self.is_amiss()

    def test_messages_that_no_node_holds(self) -> None:
        messages.put(self.storage.database, ["queue"], "{}", "")
        ghost = Worker(self.storage)
        ghost.die()
        assert ghost.take()
        assert self.is_amiss()

    @pytest.mark.parametrize("state", [State.DEAD, State.CANCELLED, State.DISCARDED])
    def test_an_end_of_which_nobody_was_told(self, state: State) -> None:
        self.storage.insert(new_job())
        job = self.worker.claim_one()
        assert not self.is_amiss()
        self.worker.end(job, state)
        assert self.is_amiss()

    def test_a_queue_that_is_not_used(self) -> None:
        topology.declare_queue(self.storage.database, "used", expires=3600.0)
        assert not self.is_amiss()
        topology.declare_queue(self.storage.database, "unused", expires=0.0)
        wait_until(self.is_amiss)  # SQLite's clock counts in milliseconds


def test_renewals(storage: Storage, worker: Worker, other: Worker) -> None:
    before = nodes.renewals_of(answer(storage, "renewals"))
    with storage.database.read() as connection:
        assert {node.id: node.renewal for node in nodes.others(connection, 0)} == before
    nodes.renew(storage.database, worker.row, 120)
    after = nodes.renewals_of(answer(storage, "renewals"))
    assert after.keys() == before.keys() == {worker.id, other.id}
    assert [node for node in after if after[node] != before[node]] == [worker.id]
    for one in (worker, other):
        one.die()
    assert nodes.renewals_of(answer(storage, "renewals")) == {}
    assert nodes.renewals_of("1=no moment, but,2=text") == {1: "no moment", 2: "text"}


class TestIsAnythingOld:
    @pytest.fixture(autouse=True)
    def _of(self, storage: Storage) -> None:
        self.storage = storage

    def is_anything_old(self, group: float | None = AGE, **retention: float | None) -> bool:
        kept = {state.value: retention.get(state.value, AGE) for state in TERMINAL}
        return bool(answer(self.storage, "is_anything_old", **prune.ages(kept, group=group, chord=group, wait=AGE)))

    @pytest.mark.parametrize("state", sorted(TERMINAL))
    def test_a_job_that_ended_long_ago(self, state: State, set_row: Callable[..., None]) -> None:
        self.storage.insert(new_job())
        set_row(state=state.value, ended_at=datetime.now(timezone.utc) - timedelta(seconds=AGE - 60))
        assert not self.is_anything_old()
        set_row(state=state.value, ended_at=datetime.now(timezone.utc) - timedelta(seconds=AGE + 60))
        assert self.is_anything_old()
        assert not self.is_anything_old(**{state.value: None})
        assert not self.is_anything_old(**{state.value: AGE + 120})

    def test_a_job_that_has_expired(self) -> None:
        self.storage.insert(new_job("1", expires_at=datetime.now(timezone.utc) + timedelta(seconds=60)))
        assert not self.is_anything_old()
        self.storage.insert(new_job("2", expires_at=datetime.now(timezone.utc) - timedelta(seconds=60)))
        assert self.is_anything_old()

    def test_a_message_that_has_expired(self, worker: Worker) -> None:
        messages.put(self.storage.database, ["queue"], "{}", "", ttl=60)
        assert not self.is_anything_old()
        messages.put(self.storage.database, ["queue"], "{}", "", ttl=0)
        wait_until(self.is_anything_old)

    @pytest.mark.parametrize(
        "make",
        [
            lambda database: results.save_group(database, "group", "[]"),
            lambda database: chords.open(database, "chord", [("part", 0)], None),
        ],
        ids=["group", "chord"],
    )
    def test_a_group_and_a_chord(self, make: Callable[[Database], None]) -> None:
        assert not self.is_anything_old(group=-1)
        make(self.storage.database)
        assert not self.is_anything_old()
        assert not self.is_anything_old(group=None)
        assert self.is_anything_old(group=-1)


class TestRenewal:
    def test_it_is_a_look_as_well(self, storage: Storage, worker: Worker) -> None:
        with counted() as statements:
            assert idle_query.renew(storage.database, ["default"], True, worker.row, 300) is False
        assert len(statements) == 1
        storage.insert(new_job())
        assert idle_query.renew(storage.database, ["default"], True, worker.row, 300) is True
        with storage.database.read() as connection:
            (node,) = nodes.others(connection, 0)
        assert node.lease == pytest.approx(300, abs=60)

    def test_who_was_taken_for_dead_learns_it(self, storage: Storage, worker: Worker) -> None:
        worker.die()
        assert idle_query.renew(storage.database, ["default"], True, worker.row, 30) is None
