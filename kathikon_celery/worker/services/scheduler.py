"""The scheduler sends each tick of each schedule once: the row is advanced in the transaction that inserts the job."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from kathikon_celery import frameworks
from kathikon_celery.job import TERMINAL
from kathikon_celery.schedules import entries, sending, ticking, timetable
from kathikon_celery.schedules.entries import Entry
from kathikon_celery.schedules.timetable import Following
from kathikon_celery.storage import reading, revoking, schedules
from kathikon_celery.storage.idle_query import Questions
from kathikon_celery.storage.schedules import Schedule
from kathikon_celery.worker.services.service import Service

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Connection

logger = logging.getLogger(__name__)

#: Schedules that one transaction handles.
CHUNK = 50
#: Seconds after which a schedule that could not be sent, or that waits for its job before, is looked at again.
AGAIN = 1.0
#: The longest pause between two looks: an idle worker asks with its idle query, and is called when a schedule changes.
LONGEST = 5.0


class Scheduler(Service):
    """Sleeps until the next tick. Every worker has one; a tick is sent by whichever comes first."""

    heeds_calls = True

    def __init__(self, *, app: Celery, storage: Any, interval: float = LONGEST) -> None:
        super().__init__(storage=storage, interval=interval)
        self._app = app
        self._entries: dict[str, Entry] | None = None
        self._follower = frameworks.follower(app, storage)

    def questions(self) -> Questions:
        if self._entries is None or self._follower is not None:  # which is to look at each step
            return {}
        return {"next_tick": schedules.of_own(self._entries)}

    def spare(self, answers: Mapping[str, Any]) -> float:
        due: float | None = answers["next_tick"]
        return self.interval if due is None else min(self.interval, due)

    def step(self) -> float:
        if self._entries is None:
            bad: dict[str, str] = {}
            own = entries.of(self._app, bad)
            self._reconcile(own)
            self._entries = own  # only now: a database that is away is asked again
            for name, why in bad.items():
                logger.error("Kathikon: beat_schedule[%r] is not sent: %s", name, why)
        if self._follower is not None:
            self._follower.look()
        with self.storage.database.read() as connection:
            left = schedules.next_tick(connection, self._entries)
        while left is not None and left <= 0 and not self._stopping:
            left = self._send(self._entries)
        return self.interval if left is None else min(self.interval, max(left, 0.001))

    def _reconcile(self, own: Mapping[str, Entry]) -> None:
        if not own:
            return
        database = self.storage.database

        def write(again: bool) -> None:
            with database.write(durable=True) as connection:
                database.dialect.take_turns(connection)
                entries.reconcile(connection, own, reading.present(connection))
                database.dialect.ring(connection)

        database.patiently(write, patient=False)

    def _send(self, own: Mapping[str, Entry]) -> float | None:
        """Send what is due; return the seconds until the next tick."""
        with self.storage.database.write(durable=True) as connection:
            due = schedules.due(connection, own, CHUNK)
            now = reading.present(connection)
            sent = [self._send_one(connection, one, own.get(one.name), now) for one in due]
            # Other workers have locked what is due: perhaps they end without having sent it.
            left = schedules.next_tick(connection, own, later=not due)
            if not due:
                left = min(AGAIN / 10, left or AGAIN)
        if self._follower is not None:
            self._follower.sent(zip(due, sent, strict=True), now)
        return left

    def _send_one(self, connection: Connection, one: Schedule, entry: Entry | None, now: datetime) -> int:
        """Send the due ticks of *one*; return how many were sent."""
        try:
            following = self._following(one, entry)
            if one.tick_at is None:
                tick = ticking.first(one, following, now)
                schedules.change(connection, one.name, {"tick_at": tick, "next_at": ticking.with_jitter(one, tick)})
                return 0
            ticks = ticking.decide(one, following, now)
            if ticks.send and one.overlap != "allow" and self._is_open(connection, one):
                if one.overlap == "queue":
                    schedules.change(connection, one.name, {"next_at": now + timedelta(seconds=AGAIN)})
                    return 0
                if one.overlap == "cancel":
                    revoking.revoke_in(self.storage.database, connection, [one.last_job or ""])
                else:
                    ticks = ticking.Ticks([], ticks.skipped + len(ticks.send), ticks.tick_at)
            with connection.begin_nested():
                jobs = [
                    sending.send(self._app, connection, one, entry, tick, now, sending.job_id(one.name, tick))
                    for tick in ticks.send
                ]
        except Exception as error:
            logger.exception("Kathikon: schedule %r cannot be sent; trying again in %g s", one.name, 60 * AGAIN)
            later = {"problem": repr(error)[:1000], "next_at": now + timedelta(seconds=60 * AGAIN)}
            schedules.change(connection, one.name, later)
            return 0
        values: dict[str, Any] = {
            "tick_at": ticks.tick_at,
            "next_at": ticking.with_jitter(one, ticks.tick_at),
            "skipped": one.skipped + ticks.skipped,
            "problem": None,
        }
        if jobs:
            values |= {
                "runs": one.runs + len(jobs),
                "last_tick": ticks.send[-1],
                "last_sent": now,
                "last_job": jobs[-1],
            }
        schedules.change(connection, one.name, values)
        return len(jobs)

    def _following(self, one: Schedule, entry: Entry | None) -> Following:
        if entry is not None and entry.row.timing == one.timing and entry.row.zone == one.zone:
            return entry.following
        following = timetable.read(one.timing, timetable.zone_of(one.zone))
        if following is None:
            raise ValueError("only the code that made this schedule can compute its ticks")
        return following

    def _is_open(self, connection: Connection, one: Schedule) -> bool:
        job = reading.fetch(connection, one.last_job) if one.last_job else None
        return job is not None and job.state not in TERMINAL
