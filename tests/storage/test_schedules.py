"""Which schedules a worker sends, and when it looks again."""

from __future__ import annotations

from datetime import timedelta

import pytest
from celery import Celery

from kathikon_celery.schedules import entries
from kathikon_celery.storage import Storage, reading, schedules
from kathikon_celery.storage.schedules import Schedule
from kathikon_celery.worker.services.scheduler import Scheduler


def test_the_next_tick_behind_those_that_are_due(storage: Storage) -> None:
    """A worker that finds all due rows locked by others sleeps until that one, not for longer."""
    with storage.database.write() as connection:
        present = reading.present(connection)
        for name, seconds in (("due", -5), ("soon", 30), ("later", 90)):
            moment = present + timedelta(seconds=seconds)
            schedules.add(connection, Schedule(name=name, task="t", timing='{"every": 1}', next_at=moment))
        schedules.add(connection, Schedule(name="never", task="t", timing='{"every": 1}'))
        schedules.add(connection, Schedule(name="code", task="t", timing="code", source="code", next_at=present))
        overdue = schedules.next_tick(connection, ())
        following = schedules.next_tick(connection, (), later=True)
        assert overdue is not None
        assert following is not None
        assert (round(overdue), round(following)) == (-5, 30)
        assert {one.name for one in schedules.due(connection, (), 10)} == {"due"}
        assert {one.name for one in schedules.due(connection, ("code",), 10)} == {"due", "code"}
        assert schedules.next_tick(connection, (), later=True) is not None
        schedules.remove(connection, "soon")
        schedules.remove(connection, "later")
        assert schedules.next_tick(connection, (), later=True) is None


def test_entries_become_rows_although_the_first_try_fails(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Celery("proj", set_as_current=False)
    app.conf.beat_schedule = {"hourly": {"task": "proj.x", "schedule": 3600}}
    scheduler = Scheduler(app=app, storage=storage)
    with monkeypatch.context() as broken:
        broken.setattr(entries, "reconcile", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scheduler.step()
    scheduler.step()
    with storage.database.read() as connection:
        assert schedules.fetch(connection, "hourly") is not None
