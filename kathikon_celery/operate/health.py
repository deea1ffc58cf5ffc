"""Health, for probes: database, schema, workers, and the age of ready jobs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import timedelta

from kathikon_celery.operate.schedules import Schedules
from kathikon_celery.settings import shown
from kathikon_celery.storage import Storage, schema, status
from kathikon_celery.storage.errors import in_words


@dataclass
class Health:
    """What a probe found. Its `str` says it in words.

    >>> print(check(Storage.for_app(app, setup=False)))
    Well: postgresql+psycopg://app:***@db/jobs, schema 0008, 2 workers, no job is ready.

    Arguments:
        database: its URL, without the password.
        version: of the schema; `None`: there are no tables, or the database was not reached.
        workers: living workers that consume queues.
        oldest: seconds for which the oldest ready job waits that is not paused; `None`: none waits.
        problems: what is wrong, in words; empty: nothing.
    """

    database: str
    version: str | None = None
    workers: int = 0
    oldest: float | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(f"Problem: {problem}" for problem in self.problems)
        oldest = "no job is ready" if self.oldest is None else f"the oldest ready job waits for {self.oldest:.1f} s"
        return f"Well: {self.database}, schema {self.version}, {self.workers} workers, {oldest}."


def check(
    storage: Storage,
    min_workers: int = 0,
    max_age: timedelta | None = None,
    queues: Collection[str] = (),
    max_lag: timedelta | None = None,
) -> Health:
    """Look at the database, and return what is found. Changes nothing, and makes no tables. It raises nothing.

    >>> health = check(Storage.for_app(app, setup=False), min_workers=1, max_age=timedelta(minutes=5))
    >>> health.problems
    ['0 workers are alive, of 1 that should be']

    Arguments:
        storage: the storage to look at.
        min_workers: fewer living workers are a problem.
        max_age: a job that is ready for longer, and not paused, is a problem.
        queues: look at the jobs of these queues only; empty: of all.
        max_lag: a schedule whose tick is late by more is a problem.
    """
    health = Health(shown(storage.database.url))
    try:
        with storage.database.read() as connection:
            health.version = schema.current(connection)
            if health.version is None:
                health.problems.append(f"{health.database} has no tables yet")
            elif health.version != schema.HEAD:
                health.problems.append(
                    f"the tables of {health.database} have version {health.version}, this code has {schema.HEAD}"
                )
            if health.version is None or health.version < schema.HEAD:
                return health
            found = status.status(connection)
        late = Schedules(storage, None, "").late(max_lag) if max_lag is not None else []
    except Exception as error:
        health.problems.append(f"{health.database} cannot be read: {in_words(error)}")
        return health
    health.problems += late
    health.workers = found.workers
    if found.workers < min_workers:
        health.problems.append(f"{found.workers} workers are alive, of {min_workers} that should be")
    ages = {
        one.name: one.oldest
        for one in found.queues
        if one.oldest is not None and one.paused is None and (not queues or one.name in queues)
    }
    health.oldest = max(ages.values(), default=None)
    if max_age is not None:
        health.problems += [
            f"a job of queue {name!r} is ready for {age:.1f} s, longer than {max_age.total_seconds():g} s"
            for name, age in sorted(ages.items())
            if age > max_age.total_seconds()
        ]
    return health
