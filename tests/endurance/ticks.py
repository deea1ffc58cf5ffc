"""Schedules sent by workers that are killed again and again."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from statistics import quantiles
from typing import Any

from celery import Celery
from sqlalchemy.exc import OperationalError

from kathikon_celery import Kathikon
from kathikon_celery.storage import Storage, schedules
from kathikon_celery.storage.errors import StorageError
from kathikon_celery.storage.schedules import Schedule
from tests.endurance.harness import Figures, Run, main
from tests.support.workers import WorkerProcess
from tests.support.wrong_clock import clock_ahead

#: Seconds between the ticks of each entry.
ENTRIES = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 60.0)


def ticks(
    run: Run,
    *,
    minutes: float = 5.0,
    workers: int = 4,
    every: float = 5.0,
    wrong: int = 0,
    restarts: int = 0,
    others: int = 0,
) -> Figures:
    """Ten schedules of one to sixty seconds; `kill -9` one of the workers `every` so often, and start another at once.

    `wrong` of the workers have a clock that is an hour ahead or behind, which takes a C compiler; a database in a file
    has no clock but theirs. The database is restarted `restarts` times, which takes {database} in the broker. Beside
    the ten there are `others`, which are not due.

    `expected`: ticks from the first on to the last that was sent; `late`: seconds from a tick to the commit that sent
    its job, p50 and p99; `twice`: jobs that one tick has beyond its first.
    """
    url = run.broker.partition("+")[2]
    app = Celery("ticks", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.broker_url = run.broker
    hands = Kathikon(app).schedules
    names = [f"every-{seconds:g}" for seconds in ENTRIES]
    for name, seconds in zip(names, ENTRIES, strict=True):
        hands.add(name, "tests.support.apps.echo", seconds, (seconds,), missed="all")
    with Storage.for_app(app).database.write() as connection:
        later = datetime.now(timezone.utc) + timedelta(days=1)
        for number in range(others):
            row = Schedule(name=f"daily {number}", task="proj.daily", timing='{"every": 86400}', next_at=later)
            schedules.add(connection, row)
    begun = {name: hands.get(name).tick_at for name in names}
    late: dict[tuple[str, Any], float] = {}
    settled = datetime.max.replace(tzinfo=timezone.utc)

    def known() -> list[Schedule]:
        """The rows; none while the database is away."""
        try:
            return [hands.get(name) for name in names]
        except (StorageError, OperationalError):
            return []

    def look() -> None:
        for row in known():
            if row.last_tick is not None and row.last_sent is not None and row.last_tick > settled:
                late[row.name, row.last_tick] = (row.last_sent - row.last_tick).total_seconds()

    with ExitStack() as stack:

        def start(number: int, ahead: int) -> WorkerProcess:
            env = clock_ahead(run.directory, ahead) if ahead else {}
            worker = WorkerProcess(url, directory=run.directory, name=f"worker{number}", concurrency=1, env=env)
            return stack.enter_context(worker)

        hours = [(-1) ** number * (number < wrong) for number in range(workers)]
        alive = [(start(number, 3600 * hour), hour) for number, hour in enumerate(hours)]
        settled = datetime.now(timezone.utc) + timedelta(seconds=5)  # the first ticks were due before the workers were
        restart_at = [time.monotonic() + 60 * minutes * (one + 1) / (restarts + 1) for one in range(restarts)]
        until, kill_at, number = time.monotonic() + 60 * minutes, time.monotonic() + every, workers
        while (now := time.monotonic()) < until:
            if now >= kill_at:
                victim, hour = alive.pop(random.randrange(len(alive)))
                victim.kill9()
                alive.append((start(number, 3600 * hour), hour))
                number, kill_at = number + 1, now + every
            if restart_at and now >= restart_at[0]:
                restart_at.pop(0)
                run.database.restart("immediate")
            look()
            time.sleep(0.2)
        for name in names:
            hands.pause(name)
        look()
    sent: dict[str, list[Any]] = {}
    for job in run.rows().values():
        if job.task == "tests.support.apps.echo":
            sent.setdefault(job.body, []).append(job)
    rows = known()
    expected = 0
    for row in rows:
        if row.last_tick is not None and (first := begun[row.name]) is not None:
            seconds = timedelta(seconds=float(row.name.partition("-")[2]))
            expected += round((row.last_tick - first) / seconds) + 1
    cuts = quantiles(late.values(), n=100)
    return {
        "expected": expected,
        "sent": sum(row.runs for row in rows),
        "skipped": sum(row.skipped for row in rows),
        "twice": sum(map(len, sent.values())) - sum(row.runs for row in rows),
        "kills": number - workers,
        "restarts": restarts,
        "late_p50_ms": round(1000 * cuts[49], 1),
        "late_p99_ms": round(1000 * cuts[98], 1),
        "problems": [row.problem for row in rows if row.problem],
    }


if __name__ == "__main__":
    main(ticks)
