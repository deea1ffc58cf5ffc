"""Due times: none before its time, none forgotten, the next one known; and times come back as they went in."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from kathikon_celery.job import State
from kathikon_celery.storage import Storage
from tests.storage.actors import Worker, new_job

UTC = timezone.utc
MARGIN = 30.0  # seconds between what is surely due and what is surely not, on any slow machine

_numbers = count()

#: Seconds from now, and a zone to say it in.
seconds = st.floats(-1e8, -0.001) | st.floats(MARGIN, 1e8)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
priorities = st.integers(-2, 2)
plans = st.lists(st.tuples(seconds, zones, priorities, st.booleans()), min_size=1, max_size=12)
examples = settings(max_examples=25)


@examples
@given(plans)
def test_promotion(storage: Storage, plan: list[tuple[float, timezone, int, bool]]) -> None:
    storage.reset()
    now = datetime.now(UTC)
    jobs = [
        new_job(
            f"{number:02}", priority=priority, scheduled_at=(now + timedelta(seconds=ahead)).astimezone(zone),
            state=State.RETRYABLE if again else State.AVAILABLE,
        )
        for number, (ahead, zone, priority, again) in enumerate(plan)
    ]  # fmt: skip
    storage.insert_many(jobs)
    later = sorted(ahead for ahead, *_ in plan if ahead > 0)
    stored = {job.id: job for job in storage.all()}
    for job, (ahead, _, _, again) in zip(jobs, plan, strict=True):
        waits = State.RETRYABLE if again else State.SCHEDULED
        assert stored[job.id].state is (waits if ahead > 0 else State.AVAILABLE)
        assert stored[job.id].scheduled_at == job.scheduled_at
    assert storage.promote_scheduled() == 0
    due = storage.next_due()
    if later:
        assert due is not None
        assert later[0] - MARGIN < due <= later[0] + 1
    else:
        assert due is None
    # A past due time is no merit: what is ready at once stands behind what was ready before.
    claimed = Worker(storage).claim(100)
    ready = [job for job in stored.values() if job.state is State.AVAILABLE]
    ready.sort(key=lambda job: (-job.priority, job.available_at, job.seq))
    assert [job.id for job in claimed] == [job.id for job in ready]


@examples
@given(st.lists(st.tuples(st.integers(1, 10**6), priorities), min_size=1, max_size=12))
def test_what_falls_due_is_promoted_all_together(storage: Storage, plan: list[tuple[int, int]]) -> None:
    """By priority, then by due time; not by the order in which it was published."""
    storage.reset()
    storage.insert_many(
        [
            new_job(f"{number:02}", priority=priority, scheduled_at=datetime.now(UTC) + timedelta(hours=1))
            for number, (_, priority) in enumerate(plan)
        ]
    )
    past = datetime.now(UTC) - timedelta(days=1)
    for job, (milliseconds, _) in zip(storage.all(), plan, strict=True):
        job.scheduled_at = past + timedelta(milliseconds=milliseconds)
        job.state = State.RETRYABLE
        storage.update(job)
    assert storage.next_due() < 0
    assert storage.promote_scheduled() == len(plan)
    assert storage.next_due() is None
    expected = sorted(range(len(plan)), key=lambda number: (-plan[number][1], plan[number][0], number))
    assert [int(job.id) for job in Worker(storage).claim(100)] == expected


@examples
@given(st.datetimes(datetime(1000, 1, 1), datetime(9998, 12, 31)), zones)  # noqa: DTZ001
def test_times_come_back_as_they_went_in(storage: Storage, moment: datetime, zone: timezone) -> None:
    moment = moment.replace(tzinfo=zone)
    job_id = str(next(_numbers))
    storage.insert(new_job(job_id, scheduled_at=moment, expires_at=moment))
    job = storage.fetch(job_id)
    assert job is not None
    assert (job.scheduled_at, job.expires_at) == (moment, moment)
    assert job.scheduled_at.utcoffset() == timedelta(0)
    storage.delete(job_id)
