"""Waiting for the results of real workers, through everything that Celery offers for it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, group
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import GroupResult, ResultSet
from sqlalchemy import select

from kathikon_celery.job import Job
from kathikon_celery.results import desk as desks
from kathikon_celery.results import waiting
from kathikon_celery.storage import Storage, tables
from kathikon_celery.storage.names import key
from kathikon_celery.worker.embedded import EmbeddedWorker
from tests.integration.conftest import Workers, client_of
from tests.support import apps
from tests.support.statements import counted
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

#: Seconds between two looks of a client: what comes long before was called.
NEVER = 60.0


@pytest.fixture(scope="module")
def worker(shared_workers: Workers) -> WorkerProcess:
    return shared_workers(concurrency=2)


@pytest.fixture
def app(shared_database_url: str, worker: WorkerProcess) -> Iterator[Celery]:
    """A client that is woken, or times out."""
    with client_of(shared_database_url, kathikon_poll_interval=NEVER) as app:
        yield app


def nobody_waits(app: Celery) -> bool:
    database = Storage.for_app(app).database
    with database.read() as connection:
        return not connection.execute(select(tables.waits)).all() and not desks.desk_of(database)._waits


def test_get_is_woken(app: Celery) -> None:
    for number in range(20):
        assert apps.add.delay(number, 1).get(timeout=50) == number + 1
    with pytest.raises(ValueError, match="as asked"):
        apps.fail.delay().get(timeout=50)
    assert isinstance(apps.fail.delay().get(timeout=50, propagate=False), ValueError)
    assert nobody_waits(app)


def test_the_last_result_that_another_thread_hands_over_at_any_moment_is_not_lost(app: Celery) -> None:
    """Whoever leads hands over the results of all: here as soon as this thread has taken the one before it."""
    results = [apps.add.delay(1, 1), apps.add.delay(2, 2)]
    wait_until(lambda: all(one.status == "SUCCESS" for one in results), 60)
    backend = results[0].backend
    backend._cache.clear()
    take, held = waiting.Wait.take, []

    def take_one(self: waiting.Wait, timeout: float) -> list[Job]:
        held.extend(take(self, timeout))
        if len(held) == 2:
            last = held.pop()
            self.open[key(last.id)] = last.id
            desk = self._desk
            assert desk is not None
            desk._by_key[key(last.id)] = [self]
            desk._hand_over(replace(last, id=key(last.id)))
        taken, held[:] = list(held), []
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting.Wait, "take", take_one)
        assert sorted(meta["result"] for _, meta in backend.get_many([one.id for one in results])) == [2, 4]


def test_a_task_that_is_revoked_and_one_that_is_rejected(app: Celery) -> None:
    with client_of(app.conf.kathikon_database_url):
        result = apps.add.apply_async((1, 1), countdown=120)
        threading.Timer(0.2, result.revoke).start()
        assert type(result.get(timeout=50, propagate=False)).__name__ == "TaskRevokedError"


def test_get_in_vain(app: Celery, tmp_path: Path) -> None:
    result = apps.wait_for_file.delay(str(tmp_path / "file"))
    calls: list[None] = []
    for timeout in (0, 0.05):
        with pytest.raises(ResultTimeout):
            result.get(timeout=timeout, interval=0.01, on_interval=lambda: calls.append(None))
    with pytest.raises(ResultTimeout):
        ResultSet([result, apps.add.delay(1, 1)]).get(timeout=0.05)
    assert calls
    wait_until(lambda: nobody_waits(app))
    (tmp_path / "file").touch()
    assert result.get(timeout=50) == "done"
    assert result.get(timeout=0) == "done"


def test_callbacks(app: Celery, tmp_path: Path) -> None:
    heard: list[Any] = []
    result = apps.progress.delay(str(tmp_path / "file"))

    def on_message(meta: dict[str, Any]) -> None:
        heard.append((meta["status"], meta["result"]))
        if meta["status"] == "PROGRESS":
            (tmp_path / "file").touch()

    assert result.get(timeout=50, on_message=on_message, callback=lambda *args: heard.append(args)) == "done"
    assert heard[-3:] == [("PROGRESS", {"done": 1, "of": 2}), ("SUCCESS", "done"), (result.id, "done")]


def test_an_error_of_a_parent_is_raised_to_who_waits_for_the_child(app: Celery) -> None:
    result = chain(apps.fail.si(), apps.add.si(1, 1)).apply_async()
    with pytest.raises(ValueError, match="as asked"):
        result.get(timeout=50, interval=0.05)
    wait_until(lambda: nobody_waits(app))


def test_an_error_in_a_callback_leaves_nobody_alone(app: Celery, tmp_path: Path) -> None:
    result = apps.wait_for_file.delay(str(tmp_path / "file"))

    def fail() -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool:
        interrupted = pool.submit(result.get, timeout=50, interval=0.01, on_interval=fail)
        waiter = pool.submit(app.AsyncResult(result.id).get, timeout=50)
        with pytest.raises(KeyboardInterrupt):
            interrupted.result(60)
        (tmp_path / "file").touch()
        assert waiter.result(60) == "done"


def test_a_thousand_results_in_order(app: Celery) -> None:
    result = group(apps.add.s(number, 1) for number in range(1000)).apply_async()
    with counted("FROM kathikon_jobs", all_threads=True) as statements:
        assert result.get(timeout=120) == [number + 1 for number in range(1000)]
        assert result.successful()
        assert [one.state for one in result] == ["SUCCESS"] * 1000
    assert len(statements) < 150  # a bound for the slowest of machines
    with counted("FROM kathikon_jobs", all_threads=True) as statements:
        again = GroupResult(result.id, [app.AsyncResult(one.id) for one in result])
        assert again.join_native(timeout=50) == [number + 1 for number in range(1000)]
    assert len(statements) < 5
    assert nobody_waits(app)


def test_sets_of_results(app: Celery) -> None:
    one, two = apps.add.delay(1, 1), apps.add.delay(2, 2)
    called: list[Any] = []
    results = ResultSet([one, two, one])
    results.then(lambda ready: called.append(ready.results))
    assert dict(results.iter_native(timeout=50))[two.id]["result"] == 4
    assert called == [[one, two, one]]
    assert ResultSet([two, one]).get(timeout=50) == ResultSet([two, one]).join(timeout=50) == [4, 2]
    assert ResultSet([two, one]).get(timeout=50, callback=lambda *args: called.append(args)) is None
    assert sorted(called[1:]) == sorted([(one.id, 2), (two.id, 4)])
    with pytest.raises(ValueError, match="as asked"):
        ResultSet([two, apps.fail.delay()]).get(timeout=50)
    assert ResultSet([]).get(timeout=50) == []
    nested = group(apps.add.si(1, 1), group(apps.add.si(2, 2), apps.add.si(3, 3))).apply_async()
    assert nested.get(timeout=50) == group(apps.add.si(1, 1), apps.add.si(2, 2), apps.add.si(3, 3)).apply().get()


def test_groups_in_a_group(app: Celery) -> None:
    parts = [group(apps.add.si(number, 1) for number in range(5)).apply_async() for _ in range(3)]
    assert GroupResult("g", [parts[0], *parts[1:]]).get(timeout=50) == [[1, 2, 3, 4, 5]] * 3


def test_many_threads(app: Celery, tmp_path: Path) -> None:
    result = apps.wait_for_file.delay(str(tmp_path / "file"))
    with ThreadPoolExecutor(50) as pool:
        waiters = [pool.submit(app.AsyncResult(result.id).get, timeout=50) for _ in range(25)]

        def add(number: int) -> int:
            return app.send_task(apps.add.name, (number, 1)).get(timeout=50)  # type: ignore[no-any-return]

        others = [pool.submit(add, number) for number in range(25)]
        assert [other.result(60) for other in others] == [number + 1 for number in range(25)]
        (tmp_path / "file").touch()
        assert {waiter.result(60) for waiter in waiters} == {"done"}
    assert nobody_waits(app)


WAITER = """
import sys
from tests.support import apps
app = apps.create_app("waiter", kathikon_database_url=sys.argv[1])
app.AsyncResult(sys.argv[2]).get(timeout=50, interval=0.01, on_interval=lambda: print("waits", flush=True))
"""


def test_who_is_killed_while_he_waits_is_no_matter(app: Celery, tmp_path: Path, shared_database_url: str) -> None:
    result = apps.wait_for_file.delay(str(tmp_path / "file"))
    command = [sys.executable, "-c", WAITER, shared_database_url, result.id]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.kill()
    (tmp_path / "file").touch()
    assert result.get(timeout=50) == "done"
    assert apps.add.delay(1, 1).get(timeout=50) == 2
    assert nobody_waits(app)


def test_nothing_is_kept_of_what_was_waited_for(app: Celery) -> None:
    result = group(apps.add.s(number, 1) for number in range(300)).apply_async()
    assert len(result.get(timeout=50)) == 300
    with pytest.raises(ResultTimeout):
        app.AsyncResult("unknown").get(timeout=0.01)
    kept = [weakref.ref(one) for one in result]
    del result
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]
    # Not isinstance(), which a lazy object such as Django's settings answers by an error.
    assert not [one for one in gc.get_objects() if issubclass(type(one), waiting.Wait)]
    desk = desks.desk_of(Storage.for_app(app).database)
    assert (desk._waits, desk._by_key, desk._entered, desk._ended) == ({}, {}, set(), set())


def test_in_the_process_of_the_worker(database_url: str) -> None:
    with client_of(database_url, kathikon_poll_interval=NEVER) as app, EmbeddedWorker(app, concurrency=2):
        assert [apps.add.delay(number, 1).get(timeout=50) for number in range(5)] == [1, 2, 3, 4, 5]
        assert group(apps.add.s(1, number) for number in range(10)).apply_async().get(timeout=50) == list(range(1, 11))
