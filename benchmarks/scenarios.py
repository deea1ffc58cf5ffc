"""What is measured: one function a scenario, which returns one figure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import growth, limits
from benchmarks.run import Run, rate
from benchmarks.systems import System


@dataclass(frozen=True)
class Scenario:
    """A figure, its unit, whether more of it is better, and how many tasks it takes, in full and in small."""

    name: str
    unit: str
    more_is_better: bool
    number: int
    small: int
    measure: Callable[[System, int], float]
    #: What the names of the systems begin with that it is for.
    only: str = ""


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def enqueue(system: System, number: int) -> float:
    """One ``delay()`` after the other."""
    with Run(system, number) as run:
        calls = run.client("send", number, "nothing")[1:]  # the first one connects
        return len(calls) / (calls[-1][1] - calls[0][0])


def in_bulk(system: System, number: int) -> float:
    """The same within ``bulk()``, which only Kathikon has."""
    with Run(system, number) as run:
        ((began, ended),) = run.client("send_in_bulk", number)
        return number / (ended - began)


def drain(
    system: System, number: int, task: str = "nothing", pool: str = "prefork", concurrency: int = 2, **settings: Any
) -> float:
    """A worker starts on a full queue."""
    with Run(system, number, **settings) as run:
        run.client("send", number, task)
        run.start_worker(pool, concurrency)
        return rate(run.wait(number))


def limited(system: System, number: int, task: str) -> float:
    """The rate of a drain of jobs with limits, over that of jobs without."""
    return drain(system, number, task) / drain(system, number)


def steady(system: System, number: int) -> float:
    """Client and worker at the same time."""
    with Run(system, number) as run:
        run.start_worker()
        run.warm_up()
        calls = run.client("send", number, "nothing")
        return number / (max(run.wait(number)) - calls[0][0])


def pickup(system: System, number: int, percent: int) -> float:
    """From before ``delay()`` to the task's start, on an idle worker."""
    with Run(system, number) as run:
        run.start_worker()
        run.warm_up()
        calls = run.client("trickle", number)
        waited = [start - began for start, (began, _) in zip(run.wait(number), calls, strict=True)]
        return 1000 * _percentile(waited[1:], percent)


def round_trip(system: System, number: int) -> float:
    """``delay()`` and ``get()``."""
    with Run(system, number) as run:
        run.start_worker()
        run.warm_up()
        return 1000 * _percentile([ended - began for began, ended in run.client("round_trips", number)[1:]], 50)


def lateness(system: System, number: int) -> float:
    """Countdowns: from the due time to the start."""
    with Run(system, number) as run:
        run.start_worker()
        run.warm_up()
        due = run.client("countdowns", number)
        return 1000 * _percentile(
            [start - moment for start, (moment, _) in zip(run.wait(number), due, strict=True)], 99
        )


def idle(system: System, seconds: int) -> float:
    """What a worker costs that has nothing to do."""
    with Run(system, 1) as run:
        run.start_worker()
        run.warm_up()
        time.sleep(2)
        began, before = time.monotonic(), run.cpu()
        time.sleep(seconds)
        return 100 * (run.cpu() - before) / (time.monotonic() - began)


def fairness(system: System, number: int) -> float:
    """Two workers of two processes, long tasks: from the first start to the last, in tasks' lengths."""
    length = 1.0
    with Run(system, number) as run:
        for _ in range(2):
            run.start_worker()
        run.warm_up()
        time.sleep(2)
        run.client("naps", number, str(length))
        starts = run.wait(number)
        return (max(starts) - min(starts)) / length


OURS = "kathikon"

ALL = [
    Scenario("enqueue", "delay()/s", True, 5000, 50, enqueue),
    Scenario("enqueue in bulk", "delay()/s", True, 20000, 50, in_bulk),
    Scenario("drain", "jobs/s", True, 5000, 50, drain),
    Scenario("drain, prefetch 1", "jobs/s", True, 5000, 50, partial(drain, worker_prefetch_multiplier=1)),
    Scenario("drain, results", "jobs/s", True, 5000, 50, partial(drain, task="value")),
    Scenario("drain, threads", "jobs/s", True, 5000, 50, partial(drain, pool="threads", concurrency=8)),
    Scenario("drain, solo", "jobs/s", True, 5000, 50, partial(drain, pool="solo", concurrency=1)),
    Scenario("steady", "jobs/s", True, 5000, 50, steady),
    Scenario("pickup, p50", "ms", False, 100, 5, partial(pickup, percent=50)),
    Scenario("pickup, p99", "ms", False, 100, 5, partial(pickup, percent=99)),
    Scenario("delay() + get(), p50", "ms", False, 200, 5, round_trip),
    Scenario("countdown, p99 late", "ms", False, 200, 5, lateness),
    Scenario("idle worker", "% of a core", False, 15, 1, idle),
    Scenario("long tasks, spread", "task lengths", False, 8, 4, fairness),
    Scenario("drain with a backlog", "of the rate without", True, 5000, 20, growth.backlog, only=OURS),
    Scenario("drain, old table", "of the rate when new", True, 5000, 20, growth.old_table, only=OURS),
    Scenario("drain, long transaction", "of the rate without", True, 5000, 20, growth.long_transaction, only=OURS),
    Scenario("drain, one limit of 50", "of the rate without", True, 5000, 50, partial(limited, task="hot"), only=OURS),
    Scenario("drain, 1,000 keys", "of the rate without", True, 5000, 50, partial(limited, task="keyed"), only=OURS),
    *(
        Scenario(
            f"claims, 10,000 keys, {claimers} claimers",
            "times as long, p50",
            False,
            100_000,
            1000,
            partial(limits.blocked, claimers=claimers),
            only=OURS,
        )
        for claimers in (1, 2, 4)
    ),
    *(
        Scenario(
            f"{figure}, {processes} workers",
            "a job" if figure == "transactions" else "per 1,000 jobs",
            False,
            10_000,
            50,
            partial(growth.workers, processes=processes, figure=figure),
            only="kathikon, PostgreSQL",
        )
        for figure in ("transactions", "lock waits", "calls")
        for processes in (1, 4, 16)
    ),
]
