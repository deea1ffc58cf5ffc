"""Limits while workers are killed or stopped, measured from inside the tasks; and how fair the lines are."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import closing

from kathikon_celery.job import Job, Use
from kathikon_celery.storage import Storage, limits
from tests.endurance.harness import Figures, Run, main
from tests.endurance.journal import Attempt
from tests.storage.actors import Worker, new_job

#: How many jobs of all keys run at once.
IN_ALL = 10
KEYS = 50


def highest(spans: Iterable[tuple[float, float]]) -> int:
    """How many of these are open at once, at most."""
    most = now = 0
    for _, change in sorted(point for begin, end in spans for point in ((begin, 1), (end, -1))):
        now += change
        most = max(most, now)
    return most


def limits_hold(
    run: Run, *, jobs: int = 2000, workers: int = 3, every: float = 2.0, kills: int = 1000, stop: int = 0,
    fair: int = 0,
) -> Figures:  # fmt: skip
    """Jobs of 20 to 50 ms on 50 keys, one at a time each, ten in all; `kill -9` a worker (-c 4) every so often.

    `most_of_a_key` and `most_in_all` count the runs at once, those of killed processes until the kill. With `stop`, one
    worker is stopped once, past its lease of 3 s, instead: `overlaps` are runs of a key beside one of the stopped
    worker. With `fair`, there are no workers: see `fairness`.
    """
    if fair:
        return fairness(run)
    if stop:
        run.environ["KATHIKON_LEASE"] = "3"
        kills = 0
    run.environ["ENDURANCE_LIMITED"] = "1"
    ideal = sum(_seconds(number) for number in range(jobs)) / min(IN_ALL, 4 * workers)
    batch = run.send(jobs, limited=KEYS)
    run.sent()
    alive = run.start(count=workers, concurrency=4)
    run.expect("a job is started", lambda: bool(run.journal.attempts))
    begun, killed = time.monotonic(), 0
    ends: dict[int, float] = {}
    stopped: tuple[int, float, float] | None = None
    kill_at = begun + every
    idle_since, records = time.monotonic(), 0
    while True:
        run.journal.read()
        if not run.journal.unfinished():
            break
        now = time.monotonic()
        if run.journal.records != records:
            records, idle_since = run.journal.records, now
        if now > idle_since + run.patience:
            break
        if stop and stopped is None and now >= kill_at:
            with run.nobody_writes():
                alive[0].signal(signal.SIGSTOP)
                for child in _children(alive[0].pid):
                    os.kill(child, signal.SIGSTOP)
            stopped = (alive[0].index, time.monotonic(), 0.0)
        if stopped is not None and not stopped[2] and now >= stopped[1] + 6:
            for pid in (*_children(alive[0].pid), alive[0].pid):
                os.kill(pid, signal.SIGCONT)
            stopped = (*stopped[:2], time.monotonic())
        if killed < kills and now >= kill_at:
            victim = alive.pop(random.randrange(len(alive)))
            with run.disturbance(victim):
                victim.kill9()
            ends[victim.index] = time.monotonic()
            killed, kill_at = killed + 1, now + every
            alive += run.start(concurrency=4)
        time.sleep(0.02)
    finished = time.monotonic()
    spans: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    of_stopped: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for job in batch:
        for one in run.journal.attempts[job]:
            end = one.ended if one.ended is not None else ends.get(one.worker, finished)
            frozen = stopped is not None and _is_frozen(one, stopped)
            (of_stopped if frozen else spans)[job % KEYS].append((one.started, end))
    overlaps = sum(a[0] < b[1] and b[0] < a[1] for key, some in of_stopped.items() for a in some for b in spans[key])
    everything = [span for some in spans.values() for span in some]
    return {
        **run.figures(),
        "kills": killed,
        "most_of_a_key": max(highest(some) for some in spans.values()),
        "most_in_all": highest(everything),
        "runs_stopped": sum(map(len, of_stopped.values())),
        "overlaps": overlaps,
        "ideal_seconds": round(ideal, 2),
        "took_seconds": round(finished - begun, 2),
        "states": dict(Counter(job.state.value for job in run.rows().values())),
    }


def _children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _is_frozen(one: Attempt, stopped: tuple[int, float, float]) -> bool:
    worker, since, until = stopped
    return one.worker == worker and one.started < (until or float("inf")) and (one.ended or float("inf")) > since


def _seconds(number: int) -> float:
    return 0.02 + 0.03 * (number % 7) / 6


def fairness(run: Run) -> Figures:
    """One key with 50,000 jobs, then 99 keys with 10 each: two at a time of a key, fifty in all; claims of ten.

    `last_small_start`: which start was that of the last job of the 99 keys.
    """
    shared = Use("all", "all", concurrency=50)
    with closing(Storage(run.broker.partition("+")[2])) as storage:
        storage.setup()
        limits_of = [(Use(f"tenant:{number}", "tenant", concurrency=2), shared) for number in range(100)]
        storage.insert_many([new_job(f"large {number}", limits=limits_of[0]) for number in range(50_000)])
        small = [(key, number) for key in range(1, 100) for number in range(10)]
        storage.insert_many([new_job(f"small {key} {number}", limits=limits_of[key]) for key, number in small])
        worker, held = Worker(storage), list[Job]()
        starts = last = left = 0
        left = len(small)
        began = time.monotonic()
        while left and starts < 60_000:
            taken = worker.claim(10)
            for job in taken:
                starts += 1
                if job.id.startswith("small"):
                    left, last = left - 1, starts
            held += taken
            if len(held) >= 50 or not taken:
                ended, held = held[:10], held[10:]
                worker.complete(*ended)
                limits.offer(storage.database, limits.keys_of(ended))
        return {"last_small_start": last, "left": left, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main(limits_hold)
