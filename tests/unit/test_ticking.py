"""Which ticks are sent, and when the next one is."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from celery.schedules import BaseSchedule, crontab, schedule, solar

from kathikon_celery.schedules import entries, ticking, timetable
from kathikon_celery.storage.schedules import Schedule

NOON = datetime(2026, 6, 1, 12, tzinfo=timezone.utc)
BERLIN = timetable.zone_of("Europe/Berlin")


def minutely(after: datetime) -> datetime:
    return after.replace(second=0, microsecond=0) + timedelta(minutes=1)


def decided(late: float, **fields: Any) -> tuple[list[int], int, datetime | None]:
    """The minutes that are sent, how many are skipped, and the next tick, so many seconds after the first due tick."""
    row = Schedule(name="x", task="t", timing="", tick_at=NOON, **fields)
    ticks = ticking.decide(row, minutely, NOON + timedelta(seconds=late))
    return [int((tick - NOON).total_seconds() // 60) for tick in ticks.send], ticks.skipped, ticks.tick_at


@pytest.mark.parametrize(
    ("late", "fields", "sent", "skipped", "then"),
    [
        (0, {}, [0], 0, 1),
        (0.5, {"missed": "skip"}, [0], 0, 1),
        (30, {"missed": "skip"}, [], 1, 1),
        (30, {}, [0], 0, 1),
        (125, {}, [2], 2, 3),
        (125, {"missed": "all"}, [0, 1, 2], 0, 3),
        (125, {"missed": "skip"}, [2], 2, 3),
        (155, {"missed": "skip"}, [], 3, 3),
        (155, {"grace": 20.0}, [], 3, 3),
        (155, {"missed": "all", "grace": 100.0}, [1, 2], 1, 3),
        (125, {"missed": "all", "max_runs": 5, "runs": 3}, [0, 1], 0, None),
        (125, {"missed": "all", "ends_at": NOON + timedelta(seconds=70)}, [0, 1], 0, None),
    ],
)
def test_what_is_sent(late: float, fields: dict[str, Any], sent: list[int], skipped: int, then: int | None) -> None:
    expected = None if then is None else NOON + timedelta(minutes=then)
    assert decided(late, **fields) == (sent, skipped, expected)


def test_a_long_time_is_made_up_for_in_parts() -> None:
    sent, skipped, following = decided(86400, missed="all", grace=1e6)
    assert (sent, skipped) == (list(range(100)), 0)
    assert following == NOON + timedelta(minutes=100)


def test_the_first_tick_has_not_passed() -> None:
    row = Schedule(name="x", task="t", timing="", starts_at=NOON + timedelta(hours=1))
    assert ticking.first(row, minutely, NOON) == NOON + timedelta(hours=1)
    row = Schedule(name="x", task="t", timing="", ends_at=NOON)
    assert ticking.first(row, minutely, NOON) is None


@pytest.mark.parametrize(
    "given",
    [
        10.0,
        timedelta(hours=1),
        crontab(minute="*/5", hour="8-18"),
        crontab(0, 0, day_of_month="31"),
        solar("sunset", 52, 13),
        schedule(3600, relative=True),
    ],
)
def test_a_timetable_is_the_same_after_a_row(given: Any) -> None:
    text, following = timetable.of(given, BERLIN)
    again = timetable.read(text, BERLIN)
    assert again is not None
    assert again(NOON) == following(NOON)
    assert following(NOON) > NOON  # type: ignore[operator]


@pytest.mark.parametrize("wrong", ["soon", None, -1, 0])
def test_what_is_no_schedule(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        timetable.of(wrong, BERLIN)


def test_wrong_texts_and_zones() -> None:
    with pytest.raises(ValueError, match="'nonsense' is no schedule"):
        timetable.read("nonsense", BERLIN)
    with pytest.raises(ValueError, match="there is no time zone 'Mars'"):
        timetable.zone_of("Mars")


class Own(BaseSchedule):  # type: ignore[misc]
    """A class of the application's that answers so."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer = answer

    def is_due(self, last_run_at: datetime) -> Any:
        """Answer, or raise."""
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "t", "schedule": Own(ZeroDivisionError("no"))},
        {"task": "t", "schedule": Own((False, "x"))},
        {"task": "t", "schedule": Own((False, float("nan")))},
        {"task": "t", "schedule": Own((True, -5))},
        {"task": "t", "schedule": 1e12},
        {"task": "t", "schedule": 1e-6},
        {"task": "t"},
        {"schedule": 5},
        {"task": "t", "schedule": 5, "colour": "red"},
        {"task": "t", "schedule": 5, "options": {"kathikon_overlep": "skip"}},
        {"task": "", "schedule": 5},
        5,
        None,
    ],
)
def test_a_wrong_entry_is_said_and_holds_no_other_back(wrong: Any) -> None:
    app = Celery("proj", set_as_current=False)
    app.conf.beat_schedule = {"wrong": wrong, "good": {"task": "t", "schedule": 5.0, "relative": True}}
    bad: dict[str, str] = {}
    found = entries.of(app, bad)
    assert "good" in found
    assert bad.keys() == {"wrong"}
    assert bad["wrong"]
    assert json.loads(found["good"].row.timing)["relative"] is True
    with pytest.raises(ValueError, match=r"beat_schedule\['wrong'\] cannot be used: "):
        entries.of(app)


@pytest.mark.parametrize("hours", [-100.5, -1, 0, 0.25, 1, 77.7])
def test_in_step(hours: float) -> None:
    since = NOON + timedelta(hours=hours)
    found = timetable.in_step('{"every": 3600}', NOON, since)
    assert since - timedelta(hours=1) < found <= since
    assert (found - NOON) % timedelta(hours=1) == timedelta(0)
