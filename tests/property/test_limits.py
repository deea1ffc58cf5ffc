"""Any sequence of claims and ends under limits; and any moments at which tokens of a rate are taken."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run

from kathikon_celery.job import HELD, TERMINAL, Job, State, Use
from kathikon_celery.storage import Storage, limits
from kathikon_celery.storage.rates import Rate
from tests.storage.actors import Worker, new_job

#: The limits' concurrency.
MOST = {"a:1": 1, "a:2": 1, "b:1": 2, "b:2": 3, "all": 4}
QUEUES = ["default", "other"]

keys = st.lists(st.sampled_from(sorted(MOST)), max_size=3, unique=True)
workers = st.integers(0, 2)
queues = st.sampled_from(["default", *QUEUES])


class LimitsMachine(RuleBasedStateMachine):
    """Publishers, and workers that report, give back and die; they tell nobody of the room that they make, at times."""

    storage: Storage

    @initialize()
    def set_up(self) -> None:
        self.storage.reset()
        self.workers = [Worker(self.storage) for _ in range(3)]
        self.published = 0
        self.held: list[tuple[Worker, Job]] = []

    def offer(self, *found: Job) -> None:
        limits.offer(self.storage.database, limits.keys_of(found))

    def new(self, names: list[str], queue: str, weight: int, priority: int, job_id: str | None = None) -> Job:
        self.published += 1
        uses = tuple(Use(name, name[0], weight, MOST[name]) for name in names)
        return new_job(job_id or str(self.published), limits=uses, queue=queue, priority=priority)

    # --- publishers

    @rule(names=keys, queue=queues, weight=st.sampled_from([1, 1, 1, 2, 6]), number=st.integers(1, 4))
    def publish(self, names: list[str], queue: str, weight: int, number: int) -> None:
        self.storage.insert_many([self.new(names, queue, weight, number % 2) for _ in range(number)])

    @rule(names=keys, queue=queues, which=st.integers(0, 20))
    def publish_again(self, names: list[str], queue: str, which: int) -> None:
        """Somebody publishes a known id, also of a job that is held."""
        if which < self.published:
            self.storage.insert(self.new(names, queue, 1, 0, str(self.published - which)))

    # --- workers

    @rule(worker=workers, queue=queues, at_most=st.integers(1, 5))
    def claim(self, worker: int, queue: str, at_most: int) -> None:
        self.held += [(self.workers[worker], job) for job in self.workers[worker].claim(at_most, queue)]

    @rule(which=st.integers(0, 9), how=st.sampled_from(["complete", "die", "back", "retry"]), tells=st.booleans())
    def leave(self, which: int, how: str, tells: bool) -> None:
        if not self.held:
            return
        worker, job = self.held.pop(which % len(self.held))
        if how == "complete":
            worker.complete(job)
        elif how == "die":
            worker.end(job, State.DEAD)
        elif how == "back":
            worker.give_back(job)
        else:
            worker.publish_again(job, limits=job.limits, queue=job.queue)
        if tells:
            self.offer(job)

    @rule(worker=workers)
    def crash(self, worker: int) -> None:
        dead = self.workers[worker]
        dead.die()
        self.held = [(by, job) for by, job in self.held if by is not dead]
        self.workers[worker] = Worker(self.storage)

    @rule(which=st.integers(0, 9))
    def revoke(self, which: int) -> None:
        waiting = [job.id for job in self.storage.all() if job.state in (State.BLOCKED, State.AVAILABLE)]
        if waiting:
            self.storage.backend.revoke([waiting[which % len(waiting)]])

    @rule()
    def sweep(self) -> None:
        self.storage.sweep()

    # --- what holds

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        if not hasattr(self, "workers"):
            return
        used, jobs = Counter[str](), Counter[str]()
        for job in self.storage.all():
            if job.state in HELD:
                for use in job.limits:
                    used[use.key] += use.weight
                    jobs[use.key] += 1
        # A job of more weight than the limit has runs alone.
        assert all(weight <= MOST[key] or jobs[key] == 1 for key, weight in used.items())

    def teardown(self) -> None:
        """When workers have ended what they hold, and somebody sweeps, the rest is run: each round ends some jobs."""
        if not hasattr(self, "workers"):
            return
        for worker, job in self.held:
            worker.complete(job)
        for worker in self.workers:
            worker.die()
        last = Worker(self.storage)
        self.storage.sweep()
        left = [job for job in self.storage.all() if job.state not in TERMINAL]
        while left:
            found = [job for queue in QUEUES for job in last.claim(100, queue)]
            assert found, left
            last.complete(*found)
            self.offer(*found)
            left = [job for job in self.storage.all() if job.state not in TERMINAL]


def test_no_limit_is_exceeded_and_every_job_ends(storage: Storage) -> None:
    machine: Any = type("Machine", (LimitsMachine,), {"storage": storage})
    share = 0.6 if storage.database.dialect.name == "sqlite" else 0.2
    run(machine, settings=settings(max_examples=max(1, round(settings().max_examples * share)), stateful_step_count=30))


rates = st.builds(
    lambda number, per, share: Rate(number, per, max(1, round(number * share))),
    st.integers(1, 40),
    st.sampled_from([0.5, 1.0, 10.0, 60.0, 3600.0]),
    st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)
#: Pauses between two looks, in steps between tokens.
pauses = st.lists(st.one_of(st.floats(0, 3), st.floats(0, 0.05), st.just(50.0)), min_size=1, max_size=150)


def taken_at(rate: Rate, moments: list[float]) -> list[float]:
    """Take all there is at each of the moments."""
    state, found = None, []
    for at in moments:
        number = rate.tokens(state, at)
        if number:
            state = rate.taken(state, at, number)
            found += [at] * number
    return found


@given(rates, pauses)
def test_no_window_has_more_than_the_number(rate: Rate, waits: list[float]) -> None:
    at, moments = 1.8e9, []
    for wait in waits:
        at += wait * rate.step
        moments.append(at)
    starts = taken_at(rate, moments)
    for begin in range(len(starts)):
        within = bisect_right(starts, starts[begin] + rate.per) - begin
        assert within <= rate.number


@given(
    st.integers(1, 60), st.sampled_from([0.5, 1.0, 10.0, 60.0]), st.lists(st.floats(0, 1), min_size=200, max_size=200)
)
def test_tokens_that_are_taken_soon_use_the_rate(number: int, per: float, shares: list[float]) -> None:
    rate = Rate(number, per)
    at, state, taken = 1.8e9, None, 0
    began = at
    for share in shares:
        at = max(at, rate.next_at(state, at)) + share * rate.slack * 0.99
        found = rate.tokens(state, at)
        assert found >= 1
        state, taken = rate.taken(state, at, found), taken + found
    # The first token was there at the beginning.
    assert (taken - 1) / (at - began) >= 0.95 * number / per


@given(rates, st.floats(0, 100), st.integers(1, 5))
def test_the_moment_of_the_next_token_is_exact(rate: Rate, later: float, number: int) -> None:
    state = rate.taken(None, 1.8e9, rate.burst)
    number = min(number, rate.burst)
    at = rate.next_at(state, 1.8e9 + later, number)
    assert rate.tokens(state, at + 1e-5) >= number
    if at > 1.8e9 + later + 1e-3:
        assert rate.tokens(state, at - 1e-3) < number
