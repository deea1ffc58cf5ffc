"""How many jobs are worth claiming ahead, by what was finished lately."""

from __future__ import annotations

import pytest

from kathikon_celery.consume import pace
from kathikon_celery.consume.pace import Pace

HORIZON = 0.05


class Clock:
    """Stands still between two steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pace, "monotonic", lambda: self.now)

    def finish(self, which: Pace, number: int, seconds: float) -> None:
        """*number* jobs, evenly within so many *seconds*."""
        for _ in range(number):
            self.now += seconds / number
            which.count()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("rate", [40, 1000, 7000])
def test_in_the_long_run_it_is_the_rate(clock: Clock, rate: int) -> None:
    one = Pace()
    clock.finish(one, rate * 5, 5.0)
    assert one.rate() == pytest.approx(rate, rel=0.1)
    assert one.ahead(HORIZON, 2) == pytest.approx(rate * HORIZON, rel=0.1)


@pytest.mark.parametrize("idle", [0.0, 5.0])
def test_a_beginning_is_seen_by_what_it_has_finished(clock: Clock, idle: float) -> None:
    one = Pace()
    if idle:
        clock.finish(one, 1000, 1.0)
        clock.now += idle
    clock.finish(one, 100, 0.05)
    assert one.rate() < 400
    assert one.ahead(HORIZON, 2) == pytest.approx(98, rel=0.1)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_long_tasks_that_end_together_are_no_beginning(clock: Clock, slots: int) -> None:
    one = Pace()
    for _ in range(10):
        clock.now += 2.0
        clock.finish(one, slots, 0.001)
        assert round(one.ahead(HORIZON, slots)) <= slots / 4


def test_nothing_is_ahead_where_nothing_was_finished(clock: Clock) -> None:
    one = Pace()
    assert one.ahead(HORIZON, 2) == 0
    clock.finish(one, 1000, 1.0)
    clock.now += 10.0
    assert round(one.ahead(HORIZON, 2)) == 0
