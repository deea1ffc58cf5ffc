"""A job's history: what its row says of its times and failures, and what the table of the history adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

from kathikon_celery.job import TERMINAL, Job
from kathikon_celery.storage import Storage, acts
from kathikon_celery.storage.acts import Event


def history(storage: Storage, job: Job) -> list[Event]:
    """Return what happened to *job*, oldest first."""
    with storage.database.read() as connection:
        noted = acts.history_of(connection, job.id)
    # A stable sort: of one moment (a millisecond on SQLite), a failure comes before the end that it leads to, and what
    # the history notes before what the row says of the latest claim, since each verb and rescue forgets a claim.
    events = [*_published(job), *_failures(job), *noted, *_latest_claim(job)]
    ends = [event.at for event in events if event.event in TERMINAL]
    for number, event in enumerate(events):
        # A failure is written just after the end that it leads to, in the same transaction.
        end = next((end for end in ends if end <= event.at <= end + _TRANSACTION), None)
        if event.event == "failed" and end is not None:
            events[number] = replace(event, at=end)
    return sorted(events, key=lambda event: event.at)


_TRANSACTION = timedelta(seconds=1)


def _published(job: Job) -> Iterator[Event]:
    if job.inserted_at is not None:
        yield Event(job.inserted_at, "published", f"rerun of {job.rerun_of}" if job.rerun_of else None)


def _failures(job: Job) -> Iterator[Event]:
    for error in job.errors:
        yield Event(datetime.fromisoformat(error["at"]), "failed", f"attempt {error['attempt']}: {error['reason']}")


def _latest_claim(job: Job) -> Iterator[Event]:
    for name, at in (("claimed", job.claimed_at), ("started", job.started_at), ("revoked", job.revoked_at)):
        if at is not None:
            yield Event(at, name)
    if job.state in TERMINAL and job.ended_at is not None:
        yield Event(job.ended_at, job.state.value, acts.why_ended(job), traceback=job.traceback)
