"""``python -m benchmarks.limits``: what claims cost when jobs wait for limits, against jobs without limits.

Claimers are processes that claim ten jobs, complete them, and let others out. A claim is measured with `admit`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.systems import System, url_of
from kathikon_celery.job import Job, Use
from kathikon_celery.storage import Storage, claim, finish, limits, nodes

#: Jobs in one claim.
TOGETHER = 10
_HOT = Use("hot", "hot", concurrency=50)


def _uses(kind: str, number: int, keys: int) -> tuple[Use, ...]:
    if kind == "keys":
        return (Use(f"key:{number % keys}", "key", concurrency=1),)
    return (_HOT,) if kind == "hot" else ()


def fill(storage: Storage, kind: str, number: int, keys: int) -> None:
    """Publish *number* jobs."""
    storage.reset()
    storage.insert_many([Job(id=str(one), limits=_uses(kind, one, keys)) for one in range(number)])


def claimer(url: str, seconds: float) -> None:
    """Claim and complete for so many seconds; print the number of jobs and the seconds of each claim."""
    with closing(Storage(url)) as storage:
        storage.setup()
        database = storage.database
        node = nodes.register(database, "claimer", "machine", 1, 0.0, 600.0).id
        number, took = 0, []
        until = time.monotonic() + seconds
        while (began := time.monotonic()) < until:
            with database.once() as connection:
                found = claim.claim(database, connection, "default", TOGETHER, node)
            if not found:
                continue
            took.append(time.monotonic() - began)
            with database.once() as connection:
                finish.completed(database, connection, [job.hold for job in found])
            if keys := limits.keys_of(found):
                limits.offer(database, keys)
            number += len(found)
        print(json.dumps([number, took]))


def blocked(system: System, number: int, claimers: int) -> float:
    """How many times as long the p50 of claims takes with *number* jobs on a tenth as many keys as without limits."""
    seconds = 2.0 if number > 10_000 else 0.2
    with TemporaryDirectory(prefix="benchmarks-") as folder:
        url = system.broker.format(folder=folder).removeprefix("kathikon+")
        medians = []
        for kind in ("none", "keys"):
            with closing(Storage(url)) as storage:
                storage.setup()
                fill(storage, kind, number, max(1, number // 10))
            _, took = _run(url, claimers, seconds)
            medians.append(took[len(took) // 2])
    return medians[1] / medians[0]


def _run(url: str, processes: int, seconds: float) -> tuple[int, list[float]]:
    """Return the number of jobs, and the seconds of each claim, in order."""
    command = [sys.executable, "-m", "benchmarks.limits", "--claimer", url, "--seconds", str(seconds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    said = [json.loads(one.communicate()[0]) for one in running]
    return sum(jobs for jobs, _ in said), sorted(one for _, some in said for one in some)


def measure(url: str, processes: int, seconds: float) -> str:
    """Return jobs a second, and p50 and p99 of a claim in milliseconds."""
    number, took = _run(url, processes, seconds)
    if not took:
        return "no claim"
    p50, p99 = (1000 * took[len(took) * percent // 100] for percent in (50, 99))
    return f"{number / seconds:8.0f} jobs/s, claim {p50:.2f} / {p99:.2f} ms"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--number", type=int, default=100_000, help="jobs (default: 100000)")
    parser.add_argument("--keys", type=int, default=10_000, help="keys of concurrency 1 (default: 10000)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: 2)")
    parser.add_argument("--database", default="", help="only this one: SQLite or PostgreSQL")
    parser.add_argument("--claimer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.claimer:
        claimer(options.claimer, options.seconds)
        return
    with TemporaryDirectory(prefix="benchmarks-") as folder:
        urls = {"SQLite": f"sqlite:///{Path(folder) / 'kathikon.db'}", "PostgreSQL": url_of("POSTGRESQL")}
        for name, url in urls.items():
            if options.database not in ("", name):
                continue
            with closing(Storage(url)) as storage:
                storage.setup()
                for kind in ("none", "keys", "hot"):
                    fill(storage, kind, options.number, options.keys)
                    for processes in (1, 2, 4):
                        print(f"{name}, {kind}, {processes}: {measure(url, processes, options.seconds)}", flush=True)


if __name__ == "__main__":
    main()
