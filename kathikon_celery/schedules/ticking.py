"""Which ticks of a schedule are sent now, and when the next one is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from random import uniform

from kathikon_celery.schedules.timetable import Following
from kathikon_celery.storage.schedules import Schedule

#: What is sent of missed ticks.
MISSED = ("once", "skip", "all")
#: What happens at a tick whose job before has not ended.
OVERLAP = ("allow", "skip", "queue", "cancel")
#: Seconds by which a tick may be late and is not missed.
LATE = 10.0
#: Ticks that one step sends at most of one schedule.
MOST = 100
#: Missed ticks that are looked at; beyond, the timetable goes on from now.
MOST_MISSED = 100_000


@dataclass(frozen=True)
class Ticks:
    """What to do now.

    Arguments:
        send: the ticks to send.
        skipped: how many due ticks are not sent, without those after the schedule's end.
        tick_at: the next tick; `None`: there is none.
    """

    send: list[datetime]
    skipped: int
    tick_at: datetime | None


def decide(schedule: Schedule, following: Following, now: datetime) -> Ticks:
    """Return which of the due ticks of *schedule* are sent at *now*, and the next one."""
    due: list[datetime] = []
    tick = schedule.tick_at
    while tick is not None and tick <= now and len(due) < MOST_MISSED:
        due.append(tick)
        if schedule.missed == "all" and len(due) == MOST:
            tick = following(tick)
            break
        tick = following(tick)
    if tick is not None and tick <= now and len(due) == MOST_MISSED:
        tick = following(now)
    ages = [(now - one).total_seconds() for one in due]
    send = [one for one, age in zip(due, ages, strict=True) if age <= LATE]
    if schedule.missed == "all":
        send = [one for one, age in zip(due, ages, strict=True) if age <= max(schedule.grace, LATE)]
    elif schedule.missed == "once" and not send:
        send = [one for one, age in zip(due, ages, strict=True) if age <= schedule.grace][-1:]
    send = send[-MOST:]
    skipped = len(due) - len(send)
    if schedule.max_runs is not None:
        send = send[: max(0, schedule.max_runs - schedule.runs)]
        if schedule.runs + len(send) >= schedule.max_runs:
            tick = None
    if schedule.ends_at is not None:
        send = [one for one in send if one <= schedule.ends_at]
        if tick is not None and tick > schedule.ends_at:
            tick = None
    return Ticks(send, skipped, tick)


def first(schedule: Schedule, following: Following, now: datetime, since: datetime | None = None) -> datetime | None:
    """Return the first tick of a schedule that is new, changed or resumed: none that has passed.

    *since*: until then another scheduler has sent the ticks; those since then are missed.
    """
    after = min(now, since or now)
    if schedule.starts_at:
        after = max(after, schedule.starts_at - timedelta(microseconds=1))
    tick = following(after)
    is_over = tick is None or (schedule.ends_at is not None and tick > schedule.ends_at)
    return None if is_over or (schedule.max_runs is not None and schedule.runs >= schedule.max_runs) else tick


def with_jitter(schedule: Schedule, tick: datetime | None) -> datetime | None:
    """Return when *tick* is sent."""
    return None if tick is None else tick + timedelta(seconds=uniform(0.0, schedule.jitter))
