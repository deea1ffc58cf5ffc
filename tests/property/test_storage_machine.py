"""Any sequence of what publishers and workers do, against a model that fits on a page.

After each step the table holds what the model says: no job is lost, none is held by two, and no report
that came too late is believed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from sqlalchemy import update

from kathikon_celery.job import HELD, TERMINAL, TRANSITIONS, WAITING, Job, State, TransitionError
from kathikon_celery.storage import MovedOn, Storage
from kathikon_celery.storage.tables import jobs as table
from tests.storage.actors import Worker, new_job, the_job

IDS = ["a", "b", "c", "d", "e"]
QUEUES = ["default", "other"]
WORKERS = 3
MAX_ATTEMPTS = 2
HOUR = timedelta(hours=1)

ids = st.sampled_from(IDS)
queues = st.sampled_from(["default", *QUEUES])
recent = st.integers(0, 9)
workers = st.integers(0, WORKERS - 1)
priorities = st.sampled_from([-(2**63), -1, 0, 0, 5, 2**63 - 1])


@dataclass
class Row:
    """What the model knows of a job."""

    queue: str
    priority: int
    state: State
    publication: int = field(compare=False)
    fence: int = 0
    attempts: int = 0
    crashes: int = 0
    acked: bool = False
    #: The id of the node that holds it.
    holder: int | None = None
    #: Whether its due time has come.
    due: bool = False


@dataclass
class Model:
    rows: dict[str, Row] = field(default_factory=dict)

    def publish(self, job: Job, waits: State | None) -> None:
        old = self.rows.get(job.id)
        if old is not None and old.publication == job.publication:
            return
        new = Row(job.queue, job.priority, waits or State.AVAILABLE, job.publication)
        if old is not None:
            new.fence = old.fence + 1
            if old.state not in TERMINAL:
                new.attempts, new.crashes = old.attempts, old.crashes
        self.rows[job.id] = new

    def holds(self, job: Job) -> Row | None:
        """The row, if *job*, as it was claimed, still holds it."""
        row = self.rows.get(job.id)
        if row is None or row.state not in HELD:
            return None
        return row if (row.fence, row.holder) == (job.fence, job.node_id) else None

    def give_back(self, row: Row, crashed: bool) -> None:
        row.crashes += crashed
        lost = crashed and (row.acked or row.crashes >= MAX_ATTEMPTS)
        row.state = State.DEAD if lost else State.AVAILABLE
        row.fence, row.holder, row.acked = row.fence + 1, None, False


def has_claimed(machine: StorageMachine) -> bool:
    return bool(machine.claimed)


class StorageMachine(RuleBasedStateMachine):
    """Publishers, and workers that report in time or too late, and die."""

    storage: Storage
    #: The jobs that were claimed so far, as they were then. Most is tried with one that is still held.
    claimed: list[Job]

    @initialize()
    def set_up(self) -> None:
        self.storage.reset()
        self.model = Model()
        self.workers = [Worker(self.storage) for _ in range(WORKERS)]
        self.published: list[Job] = []
        self.claimed = []
        for job_id in IDS:
            self._publish(new_job(job_id, max_attempts=MAX_ATTEMPTS), None)

    def _publish(self, job: Job, waits: State | None) -> None:
        self.storage.insert(job)
        self.published.append(job)
        self._note(job, waits)

    def _note(self, job: Job, waits: State | None) -> None:
        is_new = job.id not in self.model.rows
        self.model.publish(job, waits)
        if is_new:  # a new row begins with any fence
            self.model.rows[job.id].fence = the_job(self.storage, job.id).fence

    # --- publishers

    @rule(job_id=ids, queue=queues, priority=priorities, waits=st.sampled_from([None, None, *sorted(WAITING)]))
    def publish(self, job_id: str, queue: str, priority: int, waits: State | None) -> None:
        due = {"scheduled_at": datetime.now(timezone.utc) + HOUR, "state": waits} if waits else {}
        job = new_job(job_id, queue=queue, priority=priority, max_attempts=MAX_ATTEMPTS, **due)
        self._publish(job, waits)

    @rule(which=st.integers(0, 3))
    def publish_once_more(self, which: int) -> None:
        """As a producer does that lost the answer to its commit."""
        if len(self.published) <= which:
            return
        job = self.published[-1 - which]
        self.storage.insert(job)
        self._note(job, job.state if job.scheduled_at else None)

    # --- workers

    @rule(worker=workers, queue=queues, limit=st.integers(1, 4))
    def claim(self, worker: int, queue: str, limit: int) -> None:
        self._claim(worker, queue, limit)

    def _claim(self, worker: int, queue: str, limit: int) -> list[Job]:
        ready = [job for job in self.storage.all(queue) if job.state is State.AVAILABLE]
        ready.sort(key=lambda job: (-job.priority, job.available_at, job.seq))
        claimed = self.workers[worker].claim(limit, queue)
        assert [job.id for job in claimed] == [job.id for job in ready[:limit]]
        for job in claimed:
            row = self.model.rows[job.id]
            assert row.state is State.AVAILABLE
            row.state, row.holder = State.CLAIMED, self.workers[worker].id
            row.fence, row.attempts = row.fence + 1, row.attempts + 1
            job.node_id = row.holder
        self.claimed += claimed
        return claimed

    @rule(worker=workers, acked=st.booleans())
    def claim_and_start(self, worker: int, acked: bool) -> None:
        for job in self._claim(worker, "default", 2):
            assert self.workers[worker].start(job, acked=acked) == 1
            row = self.model.rows[job.id]
            row.state, row.acked = State.RUNNING, acked

    def _claimed(self, which: int) -> Job:
        held = [job for job in self.claimed if self.model.holds(job)]
        chosen = held if held and which < 6 else self.claimed
        return chosen[-1 - which % len(chosen)]

    @precondition(has_claimed)
    @rule(which=recent, worker=workers, acked=st.booleans())
    def start(self, which: int, worker: int, acked: bool) -> None:
        job = self._claimed(which)
        row = self.model.holds(job)
        starts = row is not None and row.state is State.CLAIMED
        assert self.workers[worker].start(job, acked=acked) == starts
        if row is not None and starts:
            row.state, row.acked = State.RUNNING, acked

    @precondition(has_claimed)
    @rule(which=recent, worker=workers)
    def complete(self, which: int, worker: int) -> None:
        job = self._claimed(which)
        row = self.model.holds(job)
        assert self.workers[worker].complete(job) == (row is not None)
        self._end(row, State.COMPLETED)

    @precondition(has_claimed)
    @rule(which=recent, worker=workers, state=st.sampled_from([State.DEAD, State.CANCELLED, State.DISCARDED]))
    def end(self, which: int, worker: int, state: State) -> None:
        job = self._claimed(which)
        row = self.model.holds(job)
        assert self.workers[worker].end(job, state) == (row is not None)
        self._end(row, state)

    @precondition(has_claimed)
    @rule(which=recent, worker=workers, state=st.sampled_from([State.COMPLETED, State.DEAD, None]))
    def store(self, which: int, worker: int, state: State | None) -> None:
        job = self._claimed(which)
        row = self.model.holds(job)
        assert self.workers[worker].store(job, state) == (row is not None)
        if state is not None:
            self._end(row, state)

    @staticmethod
    def _end(row: Row | None, state: State) -> None:
        if row is not None:
            row.state, row.holder = state, None

    @precondition(has_claimed)
    @rule(which=recent, worker=workers, crashed=st.booleans())
    def give_back(self, which: int, worker: int, crashed: bool) -> None:
        job = self._claimed(which)
        row = self.model.holds(job)
        assert self.workers[worker].give_back(job, crashed=crashed) == (row is not None)
        if row is not None:
            self.model.give_back(row, crashed)

    @precondition(has_claimed)
    @rule(which=recent, worker=workers)
    def retry(self, which: int, worker: int) -> None:
        job = self._claimed(which)
        row, now = self.model.holds(job), self.model.rows.get(job.id)
        if row is None and now is not None and now.fence == job.fence:
            return  # it has said of itself that it ended, and may publish itself again all the same
        again = new_job(job.id, queue=job.queue, priority=job.priority, max_attempts=MAX_ATTEMPTS)
        assert self.workers[worker].publish_as(job, again) == (row is not None)
        if row is not None:
            self.model.publish(again, None)

    @rule(worker=workers)
    def die(self, worker: int) -> None:
        dead = self.workers[worker]
        held = [row for row in self.model.rows.values() if row.holder == dead.id]
        assert dead.die() == len(held)
        for row in held:
            self.model.give_back(row, crashed=row.state is State.RUNNING)
        assert dead.claim(10, "default") == dead.claim(10, "other") == []
        self.workers[worker] = Worker(self.storage)

    # --- time, and people

    @rule(job_id=ids)
    def fall_due(self, job_id: str) -> None:
        row = self.model.rows.get(job_id)
        if row is not None and row.state in WAITING:
            row.due = True
            with self.storage.database.write() as connection:
                past = datetime.now(timezone.utc) - HOUR
                connection.execute(update(table).where(table.c.id == job_id).values(available_at=past))

    @rule()
    def promote(self) -> None:
        due = [row for row in self.model.rows.values() if row.due and row.state in WAITING]
        assert self.storage.promote_scheduled() == len(due)
        for row in due:
            row.state = State.AVAILABLE

    @rule(job_id=ids, state=st.sampled_from(list(State)))
    def update(self, job_id: str, state: State) -> None:
        """Somebody writes a job back in another state, as the state machine allows or not."""
        row, job = self.model.rows.get(job_id), self.storage.fetch(job_id)
        if row is None or job is None or state in HELD | WAITING or state is State.WAITING_FOR_CHILDREN:
            return
        old, job.state = row.state, state
        if state is not old and state not in TRANSITIONS[old]:
            with pytest.raises(TransitionError):
                self.storage.update(job)
            return
        self.storage.update(job)
        if state is old:
            return
        row.state, row.holder = state, None
        if state is State.AVAILABLE:
            row.fence, row.acked = row.fence + 1, False
            if old in TERMINAL:
                row.attempts = row.crashes = 0

    @precondition(has_claimed)
    @rule(which=recent)
    def update_too_late(self, which: int) -> None:
        job = self._claimed(which)
        row = self.model.rows.get(job.id)
        if row is not None and row.fence != job.fence:
            with pytest.raises(MovedOn):
                self.storage.update(job)

    @rule(job_id=ids)
    def delete(self, job_id: str) -> None:
        assert self.storage.delete(job_id) == (self.model.rows.pop(job_id, None) is not None)

    @rule(limit=st.integers(1, 3))
    def prune(self, limit: int) -> None:
        """A retention that ends in a moment to come: all that has ended is older."""
        ended = [job_id for job_id, row in self.model.rows.items() if row.state in TERMINAL]
        retention = dict.fromkeys(TERMINAL, -60.0)
        assert self.storage.backend.prune(retention, limit) == min(limit, len(ended))
        there = {job.id for job in self.storage.all()}
        for job_id in ended:
            if job_id not in there:
                del self.model.rows[job_id]

    @invariant()
    def table_and_model_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        shown = {
            job.id: Row(
                job.queue or "", job.priority, job.state, job.publication, job.fence, job.attempts, job.crashes,
                job.acked, job.node_id, self.model.rows[job.id].due if job.id in self.model.rows else False,
            )
            for job in self.storage.all()
        }  # fmt: skip
        assert shown == self.model.rows

    def teardown(self) -> None:
        """In the end each job that has not ended can still be done."""
        if not hasattr(self, "model"):
            return
        for worker in self.workers:
            worker.die()
        with self.storage.database.write() as connection:
            past = datetime.now(timezone.utc) - HOUR
            connection.execute(update(table).where(table.c.state.in_(list(WAITING))).values(available_at=past))
        self.storage.promote_scheduled()
        last = Worker(self.storage)
        for queue in QUEUES:
            if claimed := last.claim(100, queue):
                last.complete(*claimed)
        assert {job.id for job in self.storage.all()} == set(self.model.rows)
        assert {job.state for job in self.storage.all()} <= TERMINAL


def test_no_job_is_lost_and_none_is_held_twice(storage: Storage) -> None:
    machine: Any = type("Machine", (StorageMachine,), {"storage": storage})
    share = 1.0 if storage.database.dialect.name == "sqlite" else 0.3
    run(machine, settings=settings(max_examples=round(settings().max_examples * share), stateful_step_count=40))
