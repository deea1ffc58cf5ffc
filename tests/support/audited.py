"""A storage backend of an application's own, which writes down every step of every job."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from kathikon_celery.job import Hold, Job
from kathikon_celery.storage.settle import TaskEnd
from kathikon_celery.storage.sql import SQLBackend
from tests.support.apps import append_line

#: Names the file in the environment.
FILE = "AUDIT_FILE"


def note(step: str, *names: object) -> None:
    """Write down that *names* took a *step*: ids of jobs, or numbers of their rows."""
    for name in names:
        append_line(os.environ[FILE], f"{step} {name}")


class AuditedBackend(SQLBackend):
    def insert(self, job: Job, hold: Hold | None = None, soon: bool = True) -> bool:
        published = super().insert(job, hold, soon)
        if published:
            note("published", job.id)
        return published

    def insert_many(self, jobs: Sequence[Job]) -> None:
        super().insert_many(jobs)
        note("published", *(job.id for job in jobs))

    def _claimed(self, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            note("claimed", f"{job.id} {job.seq}")
        return jobs

    def claim_jobs(self, *args: Any, **kwargs: Any) -> list[Job]:
        return self._claimed(super().claim_jobs(*args, **kwargs))

    def claim_told(self, *args: Any) -> list[Job]:
        return self._claimed(super().claim_told(*args))

    def complete_and_claim(
        self, connection: Connection, holds: Sequence[Hold], *args: Any, **kwargs: Any
    ) -> tuple[int, list[Job]]:
        number, jobs = super().complete_and_claim(connection, holds, *args, **kwargs)
        note("ended", *(hold.seq for hold in holds))
        return number, self._claimed(jobs)

    def completed(self, connection: Connection, holds: Sequence[Hold]) -> int:
        note("ended", *(hold.seq for hold in holds))
        return super().completed(connection, holds)

    def completed_with(self, connection: Connection, ends: Mapping[Hold, Mapping[str, str | None]]) -> int:
        note("ended", *(hold.seq for hold in ends))
        return super().completed_with(connection, ends)

    def ended(self, connection: Connection, hold: Hold, *args: Any, **kwargs: Any) -> int:
        note("ended", hold.seq)
        return super().ended(connection, hold, *args, **kwargs)

    def settle(self, ending: TaskEnd, bodies: Mapping[str, TaskEnd], on_disk: bool = False) -> bool:
        is_ours = super().settle(ending, bodies, on_disk)
        if is_ours:
            every = [ending, *bodies.values()]
            note("published", *(job.id for one in every for job in one.jobs))
            note("ended", *(end.hold.seq for one in every for end in one.ends if end.hold is not None))
        return is_ours
