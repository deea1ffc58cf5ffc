from __future__ import annotations

import pickle

import pytest

from kathikon_celery.job import Hold, Job, State
from kathikon_celery.results.carrier import LONGEST, Carried, Carrier, carry, written
from kathikon_celery.storage.settle import JobEnd, TaskEnd

HOLD = Hold(1, 2, 3)


def ending(hold: Hold | None = HOLD, state: State = State.COMPLETED, result: str = "1") -> TaskEnd:
    return TaskEnd(ends=[JobEnd(task_id="id", hold=hold, state=state, written={"result": result, "meta": None})])


def test_an_end_travels_with_its_own_job() -> None:
    with Carrier(HOLD) as carrier:
        assert carry(ending())
    assert carrier.end == ending().ends[0]


@pytest.mark.parametrize(
    "other",
    [
        ending(hold=Hold(1, 2, 4)),
        ending(hold=None),
        ending(state=State.DEAD),
        ending(result="x" * (LONGEST + 1)),
        TaskEnd(),
        TaskEnd(ends=ending().ends * 2),
        TaskEnd(ends=ending().ends, jobs=[Job(id="successor")]),
        TaskEnd(ends=ending().ends, after=[lambda: None]),
    ],
)
def test_what_is_written_where_it_is(other: TaskEnd) -> None:
    with Carrier(HOLD) as carrier:
        assert not carry(other)
    assert carrier.end is None


def test_without_hold_nothing_travels() -> None:
    with Carrier(None):
        assert not carry(ending(hold=None))


def test_nothing_travels_outside() -> None:
    assert not carry(ending())


def test_what_does_not_travel_is_known_to_be_written() -> None:
    with Carrier(HOLD, travels=False) as carrier:
        assert not carry(ending())
        written(ending(hold=Hold(1, 2, 4)))
        assert not carrier.is_written
        written(ending())
        assert carrier.is_written


def test_it_crosses_processes() -> None:
    carried = pickle.loads(pickle.dumps(Carried("'text'", {"result": "1"})))
    assert (carried, carried.written) == ("'text'", {"result": "1"})
