"""Schedules sent by workers that are killed again and again."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from datetime import timedelta
from statistics import quantiles
from typing import Any

from celery import Celery

from kathikon_celery import Kathikon
from tests.endurance.harness import Figures, Run, main
from tests.support.workers import WorkerProcess

#: Seconds between the ticks of each entry.
ENTRIES = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 60.0)


def ticks(run: Run, *, minutes: float = 5.0, workers: int = 4, every: float = 5.0) -> Figures:
    """Ten schedules of one to sixty seconds; `kill -9` one of the workers `every` so often, and start another at once.

    `expected`: ticks from the first on to the last that was sent; `late`: seconds from a tick to the commit that sent
    its job, p50 and p99; `twice`: jobs that one tick has beyond its first.
    """
    url = run.broker.partition("+")[2]
    app = Celery("ticks", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.broker_url = run.broker
    hands = Kathikon(app).schedules
    for seconds in ENTRIES:
        hands.add(f"every-{seconds:g}", "tests.support.apps.echo", seconds, (seconds,), missed="all")
    begun = {row.name: row.tick_at for row in hands.every()}
    late: dict[tuple[str, Any], float] = {}

    def look() -> None:
        for row in hands.every():
            if row.last_tick is not None and row.last_sent is not None:
                late[row.name, row.last_tick] = (row.last_sent - row.last_tick).total_seconds()

    with ExitStack() as stack:

        def start(number: int) -> WorkerProcess:
            worker = WorkerProcess(url, directory=run.directory, name=f"worker{number}", concurrency=1)
            return stack.enter_context(worker)

        alive = [start(number) for number in range(workers)]
        until, kill_at, number = time.monotonic() + 60 * minutes, time.monotonic() + every, workers
        while (now := time.monotonic()) < until:
            if now >= kill_at:
                alive.pop(random.randrange(len(alive))).kill9()
                alive.append(start(number))
                number, kill_at = number + 1, now + every
            look()
            time.sleep(0.2)
        for seconds in ENTRIES:
            hands.pause(f"every-{seconds:g}")
        look()
    sent: dict[str, list[Any]] = {}
    for job in run.rows().values():
        if job.task == "tests.support.apps.echo":
            sent.setdefault(job.body, []).append(job)
    rows = hands.every()
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
        "late_p50_ms": round(1000 * cuts[49], 1),
        "late_p99_ms": round(1000 * cuts[98], 1),
        "problems": [row.problem for row in rows if row.problem],
    }


if __name__ == "__main__":
    main(ticks)
