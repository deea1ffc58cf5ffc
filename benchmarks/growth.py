"""How the cost of a job grows: with the table's length and age, with long transactions, and with the workers.

Only Kathikon is measured here, through its own storage; what the rivals do is not to be seen from outside.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread

from sqlalchemy import String, cast, insert, literal, null, select, text, true
from sqlalchemy.engine import Connection

from benchmarks.run import Run, rate
from benchmarks.systems import System
from kathikon_celery.job import Job, State
from kathikon_celery.storage import Storage, finish, prune
from kathikon_celery.storage.clock import now
from kathikon_celery.storage.nodes import register
from kathikon_celery.storage.tables import jobs, nodes

#: Rows that one statement makes, and jobs that are finished together.
ROWS, CHUNK = 50_000, 1000


def backlog(system: System, number: int, times: int = 200) -> float:
    """The rate of a drain with *times* as many jobs ready in other queues, and as many finished, over one without."""
    return _beside(system, number, lambda storage: fill(storage, times * number))


def old_table(system: System, number: int, times: int = 100) -> float:
    """The rate of a drain after *times* as many jobs went through the table, over that of a fresh one."""
    return _beside(system, number, lambda storage: _pass_through(storage, times * number))


def long_transaction(system: System, number: int, times: int = 20) -> float:
    """The same, while another session has held a transaction open since before those jobs."""

    def prepare(storage: Storage) -> None:
        reader = held_open.enter_context(closing(storage.database.detached()))
        cursor = reader.cursor()
        cursor.execute("BEGIN")
        cursor.execute("SELECT count(*) FROM kathikon_jobs")
        cursor.fetchall()
        if storage.database.dialect.name == "postgresql":
            cursor.execute("SELECT pg_current_xact_id()")  # an old transaction that writes is what vacuum waits for
        _pass_through(storage, times * number)

    with ExitStack() as held_open:
        return _beside(system, number, prepare)


def _beside(system: System, number: int, prepare: Callable[[Storage], None]) -> float:
    rates = []
    for is_prepared in (False, True):
        with Run(system, number) as run:
            storage = Storage.for_app(run.app())
            storage.setup()
            storage.clear_jobs()
            if is_prepared:
                prepare(storage)
            run.client("send", number, "nothing")
            run.start_worker()
            rates.append(rate(run.wait(number)))
            storage.clear_jobs()
    return rates[1] / rates[0]


def fill(storage: Storage, number: int) -> None:
    """*number* ready jobs in another queue, *number* finished ones, all made from one."""
    storage.insert(Job(id="filling", queue="elsewhere", body="[[1], {}, {}]"))
    is_model = jobs.c.id == "filling"
    copied = [column for column in jobs.columns if column.name not in ("seq", "id", "state", "ended_at")]
    for state in (State.AVAILABLE, State.COMPLETED):
        for start in range(0, number, ROWS):
            numbers = select(literal(start).label("i")).cte("numbers", recursive=True)
            numbers = numbers.union_all(select(numbers.c.i + 1).where(numbers.c.i < min(start + ROWS, number) - 1))
            ended = null() if state is State.AVAILABLE else now(numbers.c.i * -0.001)  # one after the other
            identity = literal(f"{state.value}-").concat(cast(numbers.c.i, String))
            rows = select(identity, literal(state.value), ended, *copied).join(numbers, true()).where(is_model)
            names = ["id", "state", "ended_at", *(column.name for column in copied)]
            with storage.database.write() as connection:
                connection.execute(insert(jobs).from_select(names, rows))


def _pass_through(storage: Storage, number: int) -> None:
    """Insert, claim, finish and delete *number* jobs, a thousand at a time, with the statements that workers use."""
    node = register(storage.database, "benchmarks", "benchmarks", os.getpid(), 0.0, 3600.0)
    for start in range(0, number, CHUNK):
        storage.insert_many([Job(id=f"passing-{n}", queue="passing") for n in range(start, start + CHUNK)])
        holds = [job.hold for job in storage.claim("passing", CHUNK, node)]
        with storage.database.write() as connection:
            finish.started(storage.database, connection, holds)
        with storage.database.write() as connection:
            finish.completed(storage.database, connection, holds)
        prune.prune(storage.database, {State.COMPLETED: 0.0}, CHUNK)


@dataclass
class Load:
    """What PostgreSQL counted while a number of workers drained a queue, per job."""

    transactions: float = 0.0
    #: Samples, one each 20 ms and session, in which a session waited for another one's lock.
    lock_waits: int = 0
    calls: int = 0
    samples: int = 0
    _done: Event = field(default_factory=Event)


@contextmanager
def _watched(storage: Storage) -> Iterator[Load]:
    load = Load()
    listener = storage.database.detached()
    listener.autocommit = True
    with storage.database.read() as connection:
        channels = ["kathikon", *(f"kathikon_{node}" for node in connection.scalars(select(nodes.c.id)))]
        before = _transactions(connection)
    for channel in channels:
        listener.execute(f'LISTEN "{channel}"')

    def watch() -> None:
        with storage.database.read() as connection:
            while not load._done.wait(0.02):
                load.samples += 1
                load.lock_waits += connection.scalar(_WAITING)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield load
    finally:
        load._done.set()
        watcher.join()
        load.calls = sum(1 for _ in listener.notifies(timeout=0.5))
        listener.close()
        time.sleep(1.5)  # PostgreSQL's sessions report their statistics once a second
        with storage.database.read() as connection:
            load.transactions = _transactions(connection) - before - load.samples


_WAITING = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")


def _transactions(connection: Connection) -> int:
    counted = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
    return int(connection.scalar(text(counted)) or 0)


def workers(system: System, number: int, processes: int, figure: str) -> float:
    """One *figure* of a queue that is drained by so many worker processes."""
    with Run(system, number) as run:
        storage = Storage.for_app(run.app())
        storage.setup()
        for _ in range(processes):
            run.start_worker("solo", 1)
        run.warm_up()
        with _watched(storage) as load:
            run.client("send_in_bulk", number)
            run.wait(number)
        if figure == "transactions":
            return load.transactions / number
        return 1000 * (load.lock_waits if figure == "lock waits" else load.calls) / number
