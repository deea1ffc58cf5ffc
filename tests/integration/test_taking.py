"""`limits.take`: limits outside of tasks, without a worker."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread

import pytest
from celery import Celery

from kathikon_celery.job import Job, State
from kathikon_celery.limits import Limit, LimitError, LimitReached, take
from kathikon_celery.storage import Storage, claim
from kathikon_celery.storage.limits import look
from tests.integration.conftest import client_of
from tests.storage.actors import Worker

ONE = Limit("account:{account}", concurrency=1)


@pytest.fixture
def app(database_url: str) -> Iterator[Celery]:
    with client_of(database_url) as app:
        yield app


@pytest.fixture
def storage(app: Celery) -> Storage:
    return Storage.for_app(app)


def test_one_at_a_time(storage: Storage) -> None:
    with take(ONE, account=7):
        with pytest.raises(LimitReached, match=r"limit 'account:7' has no room$"), take(ONE, account=7, timeout=0):
            pass
        with pytest.raises(LimitReached, match=r"no room within 0.05 s"), take(ONE, account=7, timeout=0.05):
            pass
        with take(ONE, account=8, timeout=0):
            pass
    with take(ONE, account=7, timeout=0):
        pass
    with storage.database.read() as connection:
        assert [room.in_use for room in look(connection, ["account:7", "account:8"])] == [0, 0]


def test_who_waits_gets_it_when_it_is_given_back(app: Celery) -> None:
    order, is_taken = [], Event()

    def other() -> None:
        with take(ONE, account=7, app=app):
            order.append("other")

    with take(ONE, account=7):
        thread = Thread(target=other)
        thread.start()
        assert not is_taken.wait(0.1)
        order.append("first")
    thread.join(timeout=60)
    assert order == ["first", "other"]


def test_with_jobs(storage: Storage) -> None:
    worker = Worker(storage)
    storage.insert(Job(id="job", task="proj.task", limits=(ONE.use_of("account:7"),)))
    (job,) = worker.claim()
    with pytest.raises(LimitReached), take(ONE, account=7, timeout=0):
        pass
    worker.complete(job)
    with take(ONE, account=7, timeout=0):
        storage.insert(Job(id="waits", task="proj.task", limits=(ONE.use_of("account:7"),)))
        with storage.database.once() as connection:
            assert not claim.claim(storage.database, connection, "default", 1, worker.id)
    found = storage.fetch("waits")
    assert found is not None
    assert found.state is State.AVAILABLE


def test_a_rate(storage: Storage) -> None:
    limit = Limit("api", rate="2/h", burst=2)
    for _ in range(2):
        with take(limit, timeout=0):
            pass
    with pytest.raises(LimitReached), take(limit, timeout=1):  # the next one comes later, so there is no use in waiting
        pass


def test_after_an_error_it_is_given_back(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), take(ONE, account=7):
        raise ZeroDivisionError
    with take(ONE, account=7, timeout=0):
        pass


def test_what_is_wrong() -> None:
    with pytest.raises(LimitError, match="account"), take(ONE, timeout=0):
        pass
    said = "timeout is a number of seconds from 0, or None, not 'x'"
    with pytest.raises(LimitError, match=said), take(ONE, account=1, timeout="x"):  # type: ignore[arg-type]
        pass
