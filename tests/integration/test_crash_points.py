"""A process is killed, or its connection lost, at each statement of an enqueue, and of a completion.

All of it is there, or nothing.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from celery import Celery, chain, chord
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from kathikon_celery import bulk, enqueue_in
from kathikon_celery.job import Job, State
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import TransactionRefused
from tests.support import apps
from tests.support.crash_points import kill_before, lose_at
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess


def send_one() -> None:
    apps.add.delay(1, 1)


def send_chain() -> None:
    chain(apps.add.s(1, 1), apps.add.s(1)).delay()


def send_chord() -> None:
    chord([apps.add.s(1, 1), apps.add.s(2, 2)])(apps.total.s())


def send_bulk() -> None:
    with bulk():
        for number in range(3):
            apps.add.delay(number, number)


@pytest.fixture
def engine(client: Celery, database_url: str) -> Iterator[Any]:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id INTEGER)"))
        connection.execute(text("CREATE TABLE effects (what TEXT)"))
    engine.dispose()
    yield engine
    engine.dispose()


def in_child(run: Callable[[], object]) -> int:
    """Run *run* in a child process; return its exit code, negative if a signal has ended the child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests may have left threads
        child = os.fork()
    if not child:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


#: What sends, and how many jobs and chords are in the tables then.
SENDS = pytest.mark.parametrize(
    ("send", "jobs", "chords"), [(send_one, 1, 0), (send_chain, 1, 0), (send_chord, 2, 1), (send_bulk, 3, 0)]
)


def order(session: Session, number: int, send: Callable[[], None]) -> None:
    """Insert an order and send what belongs to it, in the transaction of *session*."""
    session.execute(text("INSERT INTO orders (id) VALUES (:id)"), {"id": number})
    with enqueue_in(session):
        send()
    session.commit()


def there(storage: Storage) -> tuple[int, ...]:
    """Count the orders, the jobs and the chords."""
    with storage.database.read() as connection:
        return tuple(
            connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
            for table in ("orders", "kathikon_jobs", "kathikon_chords")
        )


@SENDS
def test_of_an_enqueue(
    client: Celery, engine: Any, database_url: str, send: Callable[[], None], jobs: int, chords: int
) -> None:
    apps.add.delay(0, 0)  # tables and queue are there
    storage = Storage.for_app(client)
    storage.clear_jobs()

    def attempt(number: int) -> None:
        with Session(create_engine(database_url)) as session:
            seen = kill_before(number, session.connection())
            order(session, number, send)
            assert seen() < number
            os.kill(os.getpid(), signal.SIGTERM)  # killed after all

    number, committed = 1, 0
    while (code := in_child(partial(attempt, number))) == -signal.SIGKILL:
        assert there(storage) in [(n, n * jobs, n * chords) for n in (committed, committed + 1)], number
        committed, number = there(storage)[0], number + 1
    assert code == -signal.SIGTERM
    assert there(storage) == (committed + 1, (committed + 1) * jobs, (committed + 1) * chords)
    assert number > 4  # INSERT of the order, at least one statement for the jobs, COMMIT, and what follows that


@SENDS
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_of_an_enqueue_whose_connection_is_lost(
    client: Celery, engine: Any, send: Callable[[], None], jobs: int, chords: int
) -> None:
    apps.add.delay(0, 0)
    storage = Storage.for_app(client)
    storage.clear_jobs()
    number, is_lost = 0, True
    while is_lost:
        before, number = there(storage)[0], number + 1
        with Session(create_engine(engine.url, poolclass=NullPool)) as session:
            seen = lose_at(number, session.connection())
            try:
                order(session, number, send)
            except (OperationalError, TransactionRefused):
                assert seen() >= number
            else:
                is_lost = seen() >= number
            after = there(storage)
        assert after in [(n, n * jobs, n * chords) for n in (before, before + 1)], number
    assert after[0] == before + 1
    assert number > 3


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_of_a_completion_whose_connection_is_lost(
    client: Celery, engine: Any, start_worker: Callable[..., WorkerProcess]
) -> None:
    """A statement of the body that loses the connection raises there, and Celery retries; the others run again."""
    jobs = run_all(client, "loses_at", start_worker)
    assert all(job.attempts > 1 for job in jobs[:5]), jobs
    assert any(job.crashes for job in jobs), jobs


def test_of_a_completion(client: Celery, engine: Any, start_worker: Callable[..., WorkerProcess]) -> None:
    jobs = run_all(client, "dies_at", start_worker)
    assert all(job.crashes for job in jobs[:5]), jobs


def run_all(client: Celery, task: str, start_worker: Callable[..., WorkerProcess]) -> list[Job]:
    """Run the *task* of `tests.support.shop` once for each statement at which something happens to its first run.

    A number beyond the last statement means one of a later task on the same connection.
    """
    storage, points = Storage.for_app(client), range(1, 19)
    start_worker(app="tests.support.shop")
    sent = {
        number: chain(
            client.signature(f"tests.support.shop.{task}", args=(number,), task_id=f"job {number}"),
            client.signature("tests.support.shop.same", task_id=f"after {number}"),
        ).delay()
        for number in points
    }

    def ended() -> bool:
        names = ("job", "sent by", "after")
        jobs = [storage.fetch(f"{name} {number}") for name in names for number in points]
        return all(job is not None and job.state == State.COMPLETED for job in jobs)

    wait_until(ended, 60, "the ends of all")
    assert [result.get(timeout=10) for result in sent.values()] == list(points)
    with storage.database.read() as connection:
        effects = connection.execute(text("SELECT what FROM effects")).scalars().all()
    assert sorted(map(int, effects)) == list(points)
    assert sum(storage.counts().values()) == 3 * len(points)
    return [job for number in points if (job := storage.fetch(f"job {number}"))]
