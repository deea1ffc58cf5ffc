"""One kind of fault, done to workers of one pool again and again, with an account of every job.

    python -m tests.endurance.faults --fault cold --pool gevent --broker 'kathikon+{database}'
    python -m tests.endurance.faults --fault all --pool all

The second form runs each fault on each pool and both databases, and prints a table.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from itertools import product

import psutil
from sqlalchemy import NullPool, create_engine, text

from kathikon_celery.job import TERMINAL, Job, State
from tests.endurance.harness import Figures, Run, Worker, main

POOLS = ("prefork", "threads", "gevent", "solo")
FAULTS = ("child", "kill", "hang", "warm", "cold", "cut")
BROKERS = ("kathikon+sqlite:///{dir}/kathikon.db", "kathikon+{database}")
TERMINATE = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND datname = current_database()"
)


def is_possible(fault: str, pool: str, broker: str) -> bool:
    """Only one pool has processes that can be killed, and only a server has connections that can be cut."""
    return (fault != "child" or pool == "prefork") and (fault != "cut" or "sqlite" not in broker)


def faults(
    run: Run,
    *,
    fault: str = "warm",
    pool: str = "prefork",
    jobs: int = 600,
    seconds: float = 0.1,
    times: int = 4,
    every: float = 2.0,
    lease: float = 3.0,
) -> Figures:
    """Two workers (-c 2) of a `pool` run jobs, every fourth with early acknowledgement; do a `fault` every so often.

    The faults: `child` kills a process of the pool and `kill` a whole worker (kill -9); `hang` stops a worker for
    longer than its lease; `warm` and `cold` shut a worker down; `cut` ends all connections of the database. For each
    worker that ends, another one is started.

    `lost` jobs were acknowledged to the producer and have not ended. `false_ends` are completed without an end.
    `ended_twice` ran twice to their end, `once_twice` began twice in spite of early acknowledgement; of those, `dead`
    had begun and `dead_unbegun` had not. `crashes` were counted. `consuming` of `alive` workers run jobs at the end.
    """
    run.environ["KATHIKON_LEASE"] = str(lease)
    concurrency = 1 if pool == "solo" else 2
    alive = run.start_ready(count=2, concurrency=concurrency, pool=pool)
    run.send(jobs, seconds=seconds, once=4)  # more than they can run until the last fault
    run.expect("jobs run", lambda: len(run.journal.ended) > concurrency)
    hanging: list[Worker] = []
    for _ in range(times):
        time.sleep(every)
        victim = random.choice(alive)
        with run.disturbance(None if fault == "cut" else victim):
            do(fault, run, victim)
        if fault in ("kill", "warm", "cold"):
            alive.remove(victim)
            alive += run.start_ready(concurrency=concurrency, pool=pool)
        elif fault == "hang" and victim not in hanging:
            hanging.append(victim)
            time.sleep(lease * 1.5)
            victim.signal(signal.SIGCONT)
            hanging.remove(victim)
    run.sent()
    wait_until_all_have_ended(run)
    codes = [worker.wait(150) for worker in run.workers if fault in ("warm", "cold") and worker not in alive]
    run_jobs = consuming(run, alive, concurrency)
    return {**account(run, range(jobs)), "consuming": run_jobs, "alive": len(alive), "exits": sorted(set(codes))}


def do(fault: str, run: Run, victim: Worker) -> None:
    """Do the *fault* to the worker, or to the database."""
    if fault == "child":
        if children := psutil.Process(victim.pid).children():
            os.kill(random.choice(children).pid, signal.SIGKILL)
    elif fault == "kill":
        victim.kill9()
    elif fault == "hang":
        with run.nobody_writes():
            victim.signal(signal.SIGSTOP)
    elif fault == "cut":
        with create_engine(run.broker.partition("+")[2], poolclass=NullPool).connect() as connection:
            connection.execute(TERMINATE)
    else:
        victim.process.send_signal(signal.SIGTERM if fault == "warm" else signal.SIGQUIT)


def wait_until_all_have_ended(run: Run) -> None:
    """Wait until every row says so, or nothing happens any more."""
    began = time.monotonic()
    while any(job.state not in TERMINAL for job in run.rows().values()) and time.monotonic() < began + run.patience:
        time.sleep(0.2)


def consuming(run: Run, alive: list[Worker], concurrency: int) -> int:
    """Return how many of the workers that are alive run jobs, if there are some for all."""
    ours: set[int] = set()
    wanted = {worker.index for worker in alive}
    for _ in range(10):
        probes = run.send(4 * concurrency, seconds=0.3)
        run.wait(lambda probes=probes: run.journal.ended.keys() >= set(probes))  # type: ignore[misc]
        ours |= {attempt.worker for job in probes for attempt in run.journal.attempts[job]} & wanted
        if ours == wanted:
            break
    return len(ours)


def account(run: Run, numbers: range) -> Figures:
    """Return what became of the jobs with these *numbers*."""
    run.journal.read()
    attempts, rows = run.journal.attempts, {_number(job): job for job in run.rows().values()}
    sent = [number for number in numbers if number in run.journal.sent]
    once = {number for number in sent if number % 4 == 0}
    dead = {number for number in sent if rows[number].state is State.DEAD}
    ends = Counter({number: sum(one.ended is not None for one in attempts[number]) for number in sent})
    return {
        "sent": len(sent),
        "refused": len(run.journal.refused),
        "lost": sum(not ends[number] and number not in once & dead for number in sent),
        "false_ends": sum(rows[number].state is State.COMPLETED and not ends[number] for number in sent),
        "begun_twice": sum(len(attempts[number]) > 1 for number in sent),
        "ended_twice": sum(ends[number] > 1 for number in sent),
        "once_twice": sum(len(attempts[number]) > 1 for number in once),
        "dead": sum(bool(attempts[number]) for number in dead),
        "dead_unbegun": sum(not attempts[number] for number in dead),
        "crashes": sum(rows[number].crashes for number in sent),
    }


def _number(job: Job) -> int:
    return int(json.loads(job.body)[0][0])


def table() -> None:
    """Run all faults on all pools and databases, and print a line of Markdown for each."""
    columns: list[str] = []
    for broker, pool, fault in product(BROKERS, POOLS, FAULTS):
        if not is_possible(fault, pool, broker):
            continue
        name = f"| {'SQLite' if 'sqlite' in broker else 'PostgreSQL'} | {pool} | {fault} |"
        try:
            with Run(broker) as run:
                figures = faults(run, fault=fault, pool=pool)
        except (AssertionError, TimeoutError) as error:
            print(name, str(error).splitlines()[0], "|", flush=True)
            continue
        if not columns:
            columns = [*figures]
            print("| database | pool | fault |", " | ".join(columns), "|")
            print("|" + " --- |" * (len(columns) + 3))
        print(name, " | ".join(str(figures[column]) for column in columns), "|", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--fault", "all", "--pool", "all"]:
        table()
    else:
        main(faults)
