"""``python -m benchmarks.profile``: where the time of a drained job goes, on each of Kathikon's databases.

Processor time comes from the operating system, statements from PostgreSQL's pg_stat_statements, where that is loaded,
and what the worker's main thread does from py-spy, in a run of its own.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from benchmarks.run import Run, rate
from benchmarks.scenarios import OURS
from benchmarks.systems import System, reachable
from kathikon_celery.storage import Storage

#: What the worker's main thread is doing when one of these functions is the innermost of them on its stack.
STEPS = {
    "poll": "waits",
    "finish": "reports to the intake",
    "acknowledge": "reports to the intake",
    "schedule_writes": "writes into a process's pipe",
    "send_waiting": "chooses a process for each job",
    "execute_using_pool": "hands requests to billiard",
    "on_result_readable": "reads results and tells their requests",
    "_on_bell": "makes requests of messages",
}
_PY_SPY = str(Path(sys.executable).with_name("py-spy"))
_RESET = "SELECT pg_stat_statements_reset()"
_STATEMENTS = """
SELECT calls, 1000 * total_exec_time AS spent, wal_bytes, regexp_replace(query, '\\s+', ' ', 'g') AS query
FROM pg_stat_statements JOIN pg_database ON pg_database.oid = dbid
WHERE datname = current_database() ORDER BY spent DESC LIMIT 4
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--number", type=int, default=20_000, help="tasks in a run (default: 20000)")
    parser.add_argument("--system", default=OURS, help="only systems whose names begin so")
    options = parser.parse_args()
    for system in reachable([options.system]):
        print(f"\n{system.name}, microseconds a job")
        for line in (*costs(system, options.number), *steps(system, options.number)):
            print(line)


def costs(system: System, number: int) -> list[str]:
    """Processor time of each part, and of each statement, in microseconds a job."""
    with Run(system, number) as run:
        storage = Storage.for_app(run.app())
        storage.setup()
        run.client("send_in_bulk", number)
        counted = storage.database.dialect.name == "postgresql" and _ask(storage, _RESET)
        worker = _begun(run)
        before, left = _spent(worker), max(1, run.starts().count(0.0))
        starts = run.wait(number)
        spent = {part: seconds - before.get(part, 0.0) for part, seconds in _spent(worker).items()}
        lines = [f"{1e6 * seconds / left:8.1f}  {part}" for part, seconds in spent.items()]
        for calls, microseconds, log, query in _ask(storage, _STATEMENTS) if counted else []:
            each = f"{1000 * calls / number:.1f} calls per 1,000 jobs, {float(log) / number:.0f} bytes of WAL a job"
            lines.append(f"{microseconds / number:8.1f}  {each}: {query[:70]}")
        return [f"{rate(starts):8.0f}  jobs a second", *lines]


def _begun(run: Run) -> psutil.Process:
    """The worker, as soon as it runs tasks."""
    worker = run.start_worker()
    run.wait(1)
    return psutil.Process(worker.pid)


def _spent(worker: psutil.Process) -> dict[str, float]:
    """The moment, and the processor seconds of a worker's parts and of PostgreSQL on this machine."""
    threads = {thread.id: thread.user_time + thread.system_time for thread in worker.threads()}
    server = [one for one in psutil.process_iter(["name"]) if (one.info["name"] or "").startswith("postgres")]
    return {
        "by the clock": time.monotonic(),
        "processor, main thread": threads.pop(worker.pid),
        "processor, other threads": sum(threads.values()),
        "processor, processes": sum(map(_seconds, worker.children())),
        "processor, PostgreSQL": sum(map(_seconds, server)),
    }


def _seconds(process: psutil.Process) -> float:
    try:
        return sum(process.cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


def _ask(storage: Storage, question: str) -> list[tuple[int, float, float, str]]:
    try:
        with storage.database.write() as connection:
            connection.execute(text("CREATE EXTENSION IF NOT EXISTS pg_stat_statements"))
            return [tuple(row) for row in connection.execute(text(question))]
    except DBAPIError as error:
        print(f"no statements: {error.orig}".strip())
        return []


def steps(system: System, number: int) -> list[str]:
    """What the worker's main thread is doing, in percent of the samples."""
    with Run(system, number) as run:
        worker = run.start_worker()
        run.warm_up()
        raw = run.folder / "stacks"
        what = ["record", "--pid", str(worker.pid), "--idle", "--threads", "--format", "raw", "--output", str(raw)]
        try:
            spy = subprocess.Popen(
                [_PY_SPY, *what, "--duration", "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except FileNotFoundError:
            return [f'no {_PY_SPY}: install the extra "benchmarks"']
        assert spy.stdout is not None
        spy.stdout.readline()  # the sampling has begun, or cannot begin
        run.client("send_in_bulk", number)
        run.wait(number)
        spy.send_signal(signal.SIGINT)  # py-spy writes what it has
        _, said = spy.communicate()
        if not raw.exists():
            return [f"py-spy: {said.decode().strip()}"]
        counted: Counter[str] = Counter()
        for line in raw.read_text().splitlines():
            stack, samples = line.rsplit(" ", 1)
            frames = stack.split(";")
            if f"({worker.pid})" in frames[0] or "MainThread" in frames[0]:
                names = [frame.split(" ")[0].split(".")[-1] for frame in reversed(frames)]
                counted[next((STEPS[name] for name in names if name in STEPS), "the loop itself")] += int(samples)
        whole = counted.total()
        return [f"{100 * samples / whole:7.1f}%  main thread: {step}" for step, samples in counted.most_common()]


if __name__ == "__main__":
    main()
