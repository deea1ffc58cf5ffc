"""A shop takes orders while its processes are killed: is there one receipt, and one move of stock, for each order?"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from tests.endurance.harness import Figures, Run, main
from tests.support.shops import Shop
from tests.support.workers import WorkerProcess

#: Seconds without any change after which a broker of others is taken to be done: two of its visibility timeouts.
QUIET = 30.0


def shop(
    run: Run,
    *,
    project: str = "django_shop",
    orders: int = 1000,
    every: float = 0.5,
    pool: str = "prefork",
    database: str = "sqlite:///{dir}/shop.db",
) -> Figures:
    """Take so many orders, and every so many seconds kill (``kill -9``) a producer, a worker, or a process of its pool.

    The project is one of ``examples/``: ``django_shop`` or ``fastapi_shop``. With another broker than ours its orders
    are in `database`, and its tasks are sent with Celery's ``delay_on_commit`` (only ``django_shop``).
    """
    if not run.ours and project != "django_shop":
        raise ValueError(f"project = {project!r} has no delay_on_commit, which is Django's; use django_shop")
    url = run.broker.partition("+")[2] if run.ours else database.replace("{dir}", str(run.directory))
    on_redis = {"DJANGO_SETTINGS_MODULE": "tests.endurance.redis_settings", "SHOP_BROKER": run.broker}
    place = Shop(project, url, run.directory, {} if run.ours else on_redis)
    place.create()
    with _crew(run, place, pool) as crew:
        while place.orders() < orders:
            time.sleep(random.uniform(0.5, 1.5) * every)
            crew.kill()
            crew.tend()
        crew.producers_wanted = 0
        is_finished = crew.work_off()
    dead = sum(row.state == "dead" for row in run.rows().values())
    return {**place.books(), **crew.killed, "dead": dead, "is_finished": is_finished}


class Crew:
    """Two producers and two workers of a shop."""

    def __init__(self, run: Run, place: Shop, pool: str) -> None:
        self.killed = {"producers_killed": 0, "workers_killed": 0, "children_killed": 0}
        self.producers_wanted = 2
        self._run, self._place, self._pool, self._started = run, place, pool, 0
        self._producers: list[subprocess.Popen[bytes]] = []
        self._workers: list[WorkerProcess] = []

    def tend(self) -> None:
        """Replace whoever is gone."""
        self._producers = [one for one in self._producers if one.poll() is None]
        while len(self._producers) < self.producers_wanted:
            self._producers.append(self._place.start(*self._place.producer(self._run.ours)))
        self._workers = [one for one in self._workers if one.running]
        while len(self._workers) < 2:
            self._started += 1
            self._workers.append(self._place.worker(f"shop-{self._started}", self._pool).start(ready_timeout=None))

    def kill(self) -> None:
        """Kill a process: half of the time a producer. A worker that is not ready yet is spared."""
        kind = random.choice(("producers_killed", "producers_killed", "workers_killed", "children_killed"))
        worker = random.choice(self._workers)
        if kind == "producers_killed":
            victims = [one.pid for one in self._producers if one.poll() is None]
        elif " ready." not in worker.log:
            return
        elif kind == "workers_killed":
            worker.kill9()
            self.killed[kind] += 1
            return
        else:
            victims = [one.pid for one in psutil.Process(worker.pid).children()]
        if victims:
            with suppress(ProcessLookupError):
                os.kill(random.choice(victims), signal.SIGKILL)
                self.killed[kind] += 1

    def work_off(self) -> bool:
        """End the producers, and wait until no job is left, or with another broker until nothing changes any more."""
        for one in self._producers:
            one.kill()
            one.wait()
        self._producers.clear()
        last, patience = -1, self._run.patience if self._run.ours else QUIET
        deadline = 0.0
        while True:
            self.tend()
            books = self._place.books()
            done = books["receipts"] + books["moves"]
            is_complete = self._run.ours and done >= 2 * books["orders"]
            if is_complete and all(row.ended_at is not None for row in self._run.rows().values()):
                return True
            if done != last:
                last, deadline = done, time.monotonic() + patience
            elif time.monotonic() > deadline:
                return not self._run.ours
            time.sleep(0.1)

    def close(self) -> None:
        """Kill all."""
        for one in self._producers:
            one.kill()
            one.wait()
        for worker in self._workers:
            worker.kill9()


@contextmanager
def _crew(run: Run, place: Shop, pool: str) -> Iterator[Crew]:
    crew = Crew(run, place, pool)
    try:
        crew.tend()
        yield crew
    finally:
        crew.close()


if __name__ == "__main__":
    main(shop)
