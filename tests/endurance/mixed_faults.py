"""Minutes of mixed work on three workers of three pools, with a random fault every few seconds."""

import random
import signal
import time
from collections import Counter

import psutil
from sqlalchemy import NullPool, create_engine, text

from tests.endurance.faults import FAULTS, account, consuming, do, is_possible, wait_until_all_have_ended
from tests.endurance.harness import Figures, Run, Worker, main

POOLS = ("prefork", "threads", "gevent")
OTHERS = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")


def mixed_faults(
    run: Run,
    *,
    minutes: float = 10.0,
    every: float = 10.0,
    rate: float = 30.0,
    seconds: float = 0.03,
    lease: float = 3.0,
) -> Figures:
    """A prefork, a threads and a gevent worker (-c 2) run jobs sent at a `rate`; one random fault `every` so often.

    The faults are those of `faults`; every fourth job has early acknowledgement. A worker that ends is replaced. A
    fourth worker, of the prefork pool, is never stopped or ended: `memory` (MB with its children), `descriptors` and
    the database's `connections` are measured after a fifth of the time and at the end. All other figures are those of
    `faults`.
    """
    run.environ["KATHIKON_LEASE"] = str(lease)
    (watched,) = run.start_ready()
    alive = {pool: run.start_ready(pool=pool)[0] for pool in POOLS}
    count = int(minutes * 60 * rate)
    run.send(count, seconds=seconds, rate=rate, once=4)
    done: Counter[str] = Counter()
    begin, early = time.monotonic(), None
    while (passed := time.monotonic() - begin) < minutes * 60:
        if early is None and passed > minutes * 12:
            early = _held(run, watched)
        time.sleep(every)
        pool, fault = random.choice(POOLS), random.choice(FAULTS)
        if not is_possible(fault, pool, run.broker):
            continue
        done[fault] += 1
        victim = alive[pool]
        with run.disturbance(None if fault == "cut" else victim):
            do(fault, run, victim)
        if fault in ("kill", "warm", "cold"):
            (alive[pool],) = run.start_ready(pool=pool)
        elif fault == "hang":
            time.sleep(lease * 1.5)
            victim.signal(signal.SIGCONT)
    run.sent()
    wait_until_all_have_ended(run)
    workers = [watched, *alive.values()]
    late = _held(run, watched)
    figures = {**account(run, range(count)), "consuming": consuming(run, workers, 2), "alive": len(workers)}
    return figures | {"faults": dict(done), "early": early, "late": late}


def _held(run: Run, worker: Worker) -> Figures:
    process = psutil.Process(worker.pid)
    every = [process, *process.children(recursive=True)]
    return {
        "memory": round(sum(one.memory_full_info().uss for one in every) / 2**20),
        "descriptors": process.num_fds(),
        "connections": _connections(run),
    }


def _connections(run: Run) -> int | None:
    if "sqlite" in run.broker:
        return None
    with create_engine(run.broker.partition("+")[2], poolclass=NullPool).connect() as connection:
        return int(connection.execute(OTHERS).scalar_one())


if __name__ == "__main__":
    main(mixed_faults)
