"""The front of a queue: a claim looks from there on, and everywhere as often as that does not take too long."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from kathikon_celery.storage import Storage, scan_start
from kathikon_celery.storage.scan_start import ScanStart
from kathikon_celery.storage.tables import jobs
from tests.storage.actors import Worker, new_job

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
FOREVER = 1e6
SECOND = timedelta(seconds=1)


def narrow(*found: tuple[int, datetime]) -> ScanStart:
    """A front that has just looked everywhere, and shall not again."""
    made = ScanStart()
    made.looked(found, True, FOREVER)
    return made


class TestFront:
    def test_a_new_one_looks_everywhere(self) -> None:
        assert ScanStart().marks() == []

    def test_it_begins_where_each_priority_began(self) -> None:
        found = [(5, NOON), (5, NOON + SECOND), (0, NOON - SECOND), (0, NOON)]
        assert narrow(*found).marks() == [(5, NOON - scan_start.SLACK), (0, NOON - SECOND - scan_start.SLACK)]

    def test_what_is_found_moves_it(self) -> None:
        moved = narrow((5, NOON), (0, NOON))
        moved.looked([(0, NOON + SECOND)], False, 0.1)
        assert moved.marks() == [(5, NOON - scan_start.SLACK), (0, NOON + SECOND - scan_start.SLACK)]

    def test_it_looks_everywhere_as_soon_as_that_costs_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [1000.0]
        monkeypatch.setattr(scan_start, "monotonic", lambda: clock[0])
        slow = ScanStart()
        slow.looked([(0, NOON)], True, 0.1)
        clock[0] += 0.1 * scan_start.REST - 0.001
        assert slow.marks()
        slow.looked([(0, NOON)], False, 10.0)  # how long the others take is of no interest
        clock[0] += 0.002
        assert slow.marks() == []

    def test_and_after_some_seconds_whatever_it_costs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [1000.0]
        monkeypatch.setattr(scan_start, "monotonic", lambda: clock[0])
        stopped = narrow((0, NOON))
        clock[0] += scan_start.LONGEST_REST
        assert stopped.marks() == []

    def test_jobs_that_are_given_back(self) -> None:
        forgetful = narrow((0, NOON))
        forgetful.forget()
        assert forgetful.marks() == []

    def test_too_many_priorities_are_none(self) -> None:
        every = narrow(*((priority, NOON) for priority in range(scan_start.MOST + 1)))
        assert every.marks() == []
        every.looked([(0, NOON)], True, FOREVER)
        assert len(every.marks()) == 1


@pytest.mark.postgresql
class TestClaims:
    def test_in_the_order_of_the_queue_whatever_its_priorities(self, postgresql_storage: Storage) -> None:
        worker, start = Worker(postgresql_storage), datetime.now(timezone.utc)
        order = [9, 5, 5, 3, 0, 0, -1]
        postgresql_storage.insert_many([new_job(f"{n}", priority=order[n]) for n in (6, 4, 1, 0, 2, 3, 5)])
        known = narrow((5, start), (0, start))
        assert [job.id for n in (1, 3, 2, 5) for job in worker.claim(n, front=known)] == list("0123456")

    def test_what_is_ready_for_longer_is_found_when_it_looks_everywhere(self, postgresql_storage: Storage) -> None:
        worker, start = Worker(postgresql_storage), datetime.now(timezone.utc)
        postgresql_storage.insert_many([new_job("before"), new_job("just before"), new_job("after")])
        with postgresql_storage.database.write() as connection:
            for name, earlier in (("before", scan_start.SLACK + SECOND), ("just before", scan_start.SLACK / 2)):
                connection.execute(update(jobs).where(jobs.c.id == name).values(available_at=start - earlier))
        known = narrow((0, start))
        assert [job.id for job in worker.claim(10, front=known)] == ["just before", "after"]
        known.forget()
        assert [job.id for job in worker.claim(10, front=known)] == ["before"]

    def test_it_learns_from_each_claim(self, postgresql_storage: Storage) -> None:
        worker, known = Worker(postgresql_storage), narrow()
        postgresql_storage.insert_many([new_job("a"), new_job("b", priority=7)])
        assert known.marks() == []
        worker.claim(10, front=known)
        assert [priority for priority, _ in known.marks()] == [7, 0]

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(steps=st.lists(st.tuples(st.sampled_from([0, 0, 0, 5, -3, 9]), st.integers(0, 4)), max_size=12))
    def test_nothing_is_missed(self, postgresql_storage: Storage, steps: list[tuple[int, int]]) -> None:
        """What is published while it claims, of whatever priority, is claimed in the order of the queue."""
        postgresql_storage.reset()
        worker, known = Worker(postgresql_storage), ScanStart()
        known.looked([], True, FOREVER)
        waiting: list[tuple[int, int]] = []
        for number, (priority, claims) in enumerate(steps):
            postgresql_storage.insert(new_job(f"{number}", priority=priority))
            waiting = sorted([*waiting, (-priority, number)])
            claimed = worker.claim(claims, front=known)
            assert [job.id for job in claimed] == [f"{n}" for _, n in waiting[:claims]]
            waiting = waiting[claims:]


def test_a_database_that_keeps_no_old_rows_needs_none(tmp_path: Path) -> None:
    storage = Storage(f"sqlite:///{tmp_path}/kathikon.db")
    storage.setup()
    worker, known = Worker(storage), narrow((0, datetime.now(timezone.utc) + timedelta(days=1)))
    storage.insert(new_job())
    assert len(worker.claim(1, front=known)) == 1
