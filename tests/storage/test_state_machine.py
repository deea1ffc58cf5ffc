"""Each pair of states through ``Storage.update``: one that the machine knows works, any other changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from kathikon_celery.job import HELD, TERMINAL, TRANSITIONS, WAITING, State, TransitionError
from kathikon_celery.storage import Storage
from tests.storage.actors import Worker, new_job, the_job

PAIRS = [pair for pair in product(State, State) if pair[0] is not pair[1]]
ALLOWED = [(old, new) for old, new in PAIRS if new in TRANSITIONS[old]]
FORBIDDEN = [(old, new) for old, new in PAIRS if new not in TRANSITIONS[old]]


@pytest.fixture
def in_state(storage: Storage, worker: Worker, set_row: Callable[..., None]) -> Callable[[State], None]:
    def make(state: State) -> None:
        storage.insert(new_job())
        set_row(
            state=state.value,
            node_id=worker.id if state in HELD else None,
            ended_at=the_job(storage).inserted_at if state in TERMINAL else None,
        )

    return make


@pytest.mark.parametrize(("old", "new"), ALLOWED)
def test_allowed(storage: Storage, worker: Worker, in_state: Callable[[State], None], old: State, new: State) -> None:
    in_state(old)
    job = the_job(storage)
    job.state, job.node_id = new, worker.id
    storage.update(job)
    assert job == the_job(storage)
    assert job.state is new
    assert (job.ended_at is not None) == (new in TERMINAL)
    assert (job.node_id is not None) == (new in HELD)
    claimable = [one.id for one in worker.claim()]
    assert claimable == (["job"] if new is State.AVAILABLE else [])
    if new in WAITING:
        assert storage.next_due() is not None


@pytest.mark.parametrize(("old", "new"), FORBIDDEN)
def test_forbidden(storage: Storage, in_state: Callable[[State], None], old: State, new: State) -> None:
    in_state(old)
    before, job = the_job(storage), the_job(storage)
    job.state, job.result, job.priority = new, "changed", 99
    with pytest.raises(TransitionError, match=f"'job' cannot go from {old} to {new}; from {old} it may go to "):
        storage.update(job)
    assert the_job(storage) == before


@pytest.mark.parametrize("state", State)
def test_without_a_step_the_fields_are_written(
    storage: Storage, in_state: Callable[[State], None], state: State
) -> None:
    in_state(state)
    job = the_job(storage)
    job.priority, job.errors = 5, [{"at": "now", "attempt": 1, "reason": "x"}]
    fence = job.fence
    storage.update(job)
    assert (job.priority, job.errors, job.fence) == (5, [{"at": "now", "attempt": 1, "reason": "x"}], fence)
    assert the_job(storage) == job
