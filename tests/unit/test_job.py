"""The state machine in itself, and Kathikon's rules for a job."""

from __future__ import annotations

from datetime import datetime, timezone
from itertools import product

import pytest

from kathikon_celery.job import (
    HELD,
    LONGEST_REASON,
    TERMINAL,
    TRANSITIONS,
    WAITING,
    Job,
    State,
    TransitionError,
    backoff,
    check_transition,
    in_brief,
    sources,
)

PAIRS = list(product(State, State))


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(State)
    assert frozenset().union(*TRANSITIONS.values()) == set(State)


def test_kinds_of_states() -> None:
    assert {"completed", "dead", "cancelled", "discarded"} == TERMINAL
    assert {"claimed", "running"} == HELD
    assert {"scheduled", "retryable"} == WAITING


@pytest.mark.parametrize("state", State)
def test_of_a_state(state: State) -> None:
    """A job may be published again from anywhere; what has ended does nothing else, but that the dead are given up."""
    following = TRANSITIONS[state]
    assert following >= {State.AVAILABLE, State.BLOCKED, State.SCHEDULED, State.RETRYABLE}
    if state in TERMINAL:
        published = {State.AVAILABLE, State.BLOCKED, *WAITING}
        assert following - published == ({State.DISCARDED} if state is State.DEAD else set())
    else:
        assert following >= {State.CANCELLED, State.DISCARDED}
    assert (State.CLAIMED in following) == (state is State.AVAILABLE)
    assert (State.RUNNING in following) == (state is State.CLAIMED)
    assert (State.COMPLETED in following) == (state in HELD or state is State.WAITING_FOR_CHILDREN)
    assert (State.WAITING_FOR_CHILDREN in following) == (state in HELD)
    assert str(state) == state.value


def test_every_state_can_be_reached_and_left() -> None:
    reached = {State.AVAILABLE}
    while more := {new for old in reached for new in TRANSITIONS[old]} - reached:
        reached |= more
    assert reached == set(State)


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_check_and_sources_say_the_same(old: State, new: State) -> None:
    allowed = new in TRANSITIONS[old]
    assert (old in sources(new)) is allowed
    if allowed:
        check_transition("7", old, new)
    else:
        with pytest.raises(TransitionError) as caught:
            check_transition("7", old, new)
        known = ", ".join(sorted(TRANSITIONS[old]))
        assert str(caught.value) == f"job '7' cannot go from {old} to {new}; from {old} it may go to {known}"


def test_backoff() -> None:
    assert [backoff(attempt) for attempt in (1, 2, 3, 4)] == [5, 20, 45, 80]
    assert backoff(131) == 85805
    assert backoff(132) == backoff(10_000) == 86400
    assert isinstance(backoff(1), float)


def test_errors_in_brief() -> None:
    assert in_brief(ValueError("x")) == "ValueError('x')"
    assert in_brief("just words") == "just words"
    exactly, more = "x" * LONGEST_REASON, "x" * (LONGEST_REASON + 1)
    assert in_brief(exactly) == exactly
    assert in_brief(more) == "x" * (LONGEST_REASON - 1) + "…"


def test_when_it_ended() -> None:
    moment = datetime(2030, 1, 1, tzinfo=timezone.utc)
    times = {"completed_at": "completed", "failed_at": "dead", "cancelled_at": "cancelled", "discarded_at": "discarded"}
    for name, state in times.items():
        job = Job(id="1", state=State(state), ended_at=moment)
        assert {one for one in times if getattr(job, one) == moment} == {name}
        assert {one for one in times if getattr(job, one) is not None} == {name}


def test_the_last_error() -> None:
    errors = [{"at": "now", "attempt": number, "reason": f"reason {number}"} for number in (1, 2)]
    assert Job(id="1").last_error is None
    assert Job(id="1", reason="lost").last_error == "lost"
    assert Job(id="1", reason="lost", errors=errors).last_error == "reason 2"


def test_each_is_another_publication() -> None:
    one, other = Job(id="1"), Job(id="1")
    assert one.publication != other.publication
    assert one == other
    assert 0 <= one.publication < 2**63
