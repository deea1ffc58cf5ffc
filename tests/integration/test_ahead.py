"""The second job in a busy process's pipe, in a pool of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from celery.worker import state
from kombu.asynchronous import Hub
from kombu.asynchronous.semaphore import LaxBoundedSemaphore

from kathikon_celery.worker.prefork.pool import FastPool
from tests.support.waiting import wait_until
from tests.support.workers import ROOT


def run(path: Path, name: str, text: str = "") -> tuple[int, str]:
    """Say in a file of *path* which process has begun *name*, and end when there is the file ``name.go``."""
    with (path / "begun").open("a") as begun:
        begun.write(f"{name}\n")
    while not (path / f"{name}.go").exists():
        sleep(0.005)
    return os.getpid(), name + text


class Pool:
    """The processes and the event loop that they are fed by, which runs while something is awaited."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.accepted: dict[str, int] = {}
        self.ended: dict[str, tuple[int, str]] = {}
        self.failed: dict[str, Any] = {}
        self.hub = Hub()
        self.places = LaxBoundedSemaphore(options["processes"])
        self.pool = FastPool(threads=False, enable_timeouts=True, semaphore=self.places, **options)
        self.pool.register_with_event_loop(self.hub)
        self.until_up(options["processes"])

    def give(self, name: str, text: str = "", **options: Any) -> Any:
        """As Celery does, which asks the semaphore first."""
        given: list[Any] = []

        def give() -> None:
            job = self.pool.apply_async(
                run, (self.path, name, text),
                callback=lambda result: self.ended.update({name: result}),
                error_callback=lambda error: self.failed.update({name: error}),
                accept_callback=lambda pid, *_: self.accepted.update({name: pid}),
                waitforslot=False, correlation_id=name, **options,
            )  # fmt: skip
            given.append(job)

        assert self.places.acquire(give), "no place is free"
        return given[0]

    def let_go(self, *names: str) -> None:
        for name in names:
            (self.path / f"{name}.go").touch()

    def turn(self) -> None:
        self.hub.call_later(0.01, int)
        self.hub.run_once()

    def until(self, condition: Callable[[], object], what: str) -> None:
        wait_until(lambda: self.turn() or condition(), what=what, interval=0)

    def until_up(self, processes: int) -> None:
        self.until(lambda: len(self.pool._all_inqueues) == processes, f"{processes} processes up")

    def begin(self, *names: str, **options: Any) -> None:
        """Fill the processes."""
        for name in names:
            self.give(name, **options)
        self.until(lambda: set(names) <= set(self.accepted), f"{names} accepted")

    def send_behind(self, name: str, text: str = "") -> Any:
        """Give a job while all processes are busy; the one it waits in is its job's."""
        job = self.give(name, text)
        self.until(lambda: job._write_to, f"{name} sent")
        assert name not in self.accepted
        return job

    def begun(self) -> list[str]:
        return (self.path / "begun").read_text().split()

    def close(self) -> None:
        self.pool.terminate()
        self.pool.join()
        self.hub.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    started = []

    def start(**options: Any) -> Pool:
        started.append(Pool(tmp_path, **options))
        return started[-1]

    yield start
    for pool in started:
        pool.close()


def test_a_process_has_its_next_job_before_it_has_told_of_the_last(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.begin("first")
    pool.send_behind("second")
    assert not pool.places.acquire(int)  # two for each process, and no more
    pool.let_go("first", "second")
    # The pool takes no part in it.
    wait_until(lambda: pool.begun() == ["first", "second"], what="the second one begun")
    assert not pool.ended
    pool.until(lambda: len(pool.ended) == 2, "both told of")


def test_a_job_moves_to_the_process_that_is_free_first(start: Callable[..., Pool]) -> None:
    pool = start(processes=2)
    pool.begin("one", "two")
    job = pool.send_behind("third")
    free, busy = ("one", "two") if job._write_to.pid == pool.accepted["two"] else ("two", "one")
    pool.let_go(free, "third")
    pool.until(lambda: "third" in pool.ended, "the third job ended")
    assert pool.ended["third"][0] == pool.accepted[free]
    # The process that had it finds it, and runs what comes next.
    pool.begin("fourth")
    pool.let_go(busy, "fourth")
    pool.until(lambda: len(pool.ended) == 4, "all ended")
    assert sorted(pool.begun()) == ["fourth", "one", "third", "two"]
    pool.until(lambda: pool.places.value == 4, "all places free")


def test_a_job_that_was_given_back_does_not_run(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.begin("first")
    job = pool.send_behind("second")
    left: list[str] = []
    assert pool.pool.give_back(job, lambda: left.append("second"))
    assert not pool.pool.give_back(job, lambda: left.append("twice"))
    pool.until(lambda: left == ["second"], "that it was given back is known")
    assert not pool.places.acquire(int)  # its place is taken until the process has skipped it
    pool.places._waiting.clear()
    pool.let_go("first", "second", "third")
    pool.until(lambda: pool.places.value == 2, "both places free")
    pool.begin("third")
    pool.until(lambda: "third" in pool.ended, "the third job ended")
    assert pool.begun() == ["first", "third"]


def test_nothing_is_sent_before_a_job_that_was_given_back_is_out_of_the_way(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.begin("first")
    second = pool.send_behind("second")
    third, pipe = pool.pool.apply_async(run, (pool.path, "third"), waitforslot=False), second._write_to.inqW_fd
    assert pool.pool.give_back(second, int)
    pool.pool.on_job_ready(0, None, None, pipe)  # what the process says of both may come apart
    assert pipe not in pool.pool._busy_workers
    pool.pool.on_poll_start()
    assert third._write_to is None
    pool.pool._busy_workers.add(pipe)  # or it was thought to have begun the second one
    pool.pool.on_job_skipped(pipe)
    pool.pool._ahead.send(second._write_to, second, False, pytest.fail)  # which the intake has just taken back
    pool.pool.on_poll_start()
    assert third._write_to is second._write_to
    assert not pool.pool.take_back(third)  # it is not behind another one


def test_a_job_that_has_begun_is_not_given_back(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.begin("first")
    job = pool.send_behind("second")
    pool.let_go("first")
    wait_until(lambda: pool.begun() == ["first", "second"], what="the second one begun")
    assert not pool.pool.take_back(job)  # though the pool has not yet heard of it
    pool.let_go("second")
    pool.until(lambda: "second" in pool.ended, "the second job ended")
    assert not pool.pool.take_back(job)


def test_the_job_behind_one_whose_process_is_killed(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.begin("first")
    pool.send_behind("second")
    pool.let_go("second")
    os.kill(pool.accepted["first"], signal.SIGKILL)
    pool.until(lambda: "second" in pool.ended and "first" in pool.failed, "the second job ended in another process")
    assert pool.accepted["second"] != pool.accepted["first"]
    assert pool.begun() == ["first", "second"]
    pool.until(lambda: pool.places.value == 2, "all places free")


def test_a_job_that_was_given_back_is_not_sent_anew_when_its_process_is_killed(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.begin("first")
    job = pool.send_behind("second")
    os.kill(pool.accepted["first"], signal.SIGKILL)
    wait_until(lambda: not pool.pool._pool[0]._is_alive(), what="the process ended")
    assert pool.pool.give_back(job, int)
    pool.pool.maintain_pool()  # before the main thread has heard that it was given back
    pool.let_go("second", "third")
    pool.until(lambda: pool.places.value == 2, "both places free")
    pool.begin("third")
    pool.until(lambda: "third" in pool.ended, "the third job ended")
    assert pool.begun() == ["first", "third"]


def test_a_job_that_was_given_back_is_not_read_by_the_next_process(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.begin("first")
    job = pool.send_behind("second")
    assert pool.pool.give_back(job, int)
    os.kill(pool.accepted["first"], signal.SIGKILL)
    pool.until(lambda: "first" in pool.failed, "the loss told of")
    pool.begin("third")
    pool.send_behind("fourth")
    pool.let_go("second", "third", "fourth")
    pool.until(lambda: len(pool.ended) == 2, "both ended")
    assert pool.begun() == ["first", "third", "fourth"]
    pool.until(lambda: pool.places.value == 2, "all places free")


@pytest.mark.parametrize("size", [5_000, 1_000_000])
def test_a_large_job_waits_for_a_process_and_can_be_given_back(start: Callable[..., Pool], size: int) -> None:
    """To write it may take as long as the task that runs: then neither the pool nor a consumer could end meanwhile."""
    pool = start(processes=1)
    pool.begin("first")
    second = pool.give("second", "x" * size)
    pool.turn()
    assert second._write_to is None
    assert not pool.places.acquire(int)
    pool.places._waiting.clear()
    assert pool.pool.give_back(second, int)
    pool.until(lambda: pool.places.value == 1, "its place free")
    third = pool.give("third", "x" * size)
    pool.let_go("first", "third")
    pool.until(lambda: "third" in pool.ended, "the third job ended")
    assert pool.ended["third"] == (pool.accepted["first"], "third" + "x" * size)
    assert not pool.pool.take_back(third)
    assert pool.begun() == ["first", "third"]


def test_a_consumer_that_begins_anew_keeps_what_has_begun_and_nothing_else(start: Callable[..., Pool]) -> None:
    pool = start(processes=2)
    pool.begin("one", "two")
    for name in ("three", "four"):
        pool.send_behind(name)
    pool.let_go("one")
    wait_until(lambda: len(pool.begun()) == 3, what="a third one begun")
    [third] = set(pool.begun()) - {"one", "two"}
    assert third not in pool.accepted  # which the pool has not heard
    pool.places.clear()
    pool.pool.flush()
    pool.let_go("two", "three", "four", "five")
    pool.until(lambda: set(pool.ended) == {"one", "two", third}, "three ended")
    pool.begin("five")
    pool.until(lambda: "five" in pool.ended, "the next one ended")
    assert sorted(pool.begun()) == sorted(["one", "two", third, "five"])


@pytest.mark.parametrize("option", ["maxtasksperchild", "max_memory_per_child"])
def test_a_process_that_may_end_after_its_job_is_sent_one_at_a_time(start: Callable[..., Pool], option: str) -> None:
    pool = start(processes=1, **{option: 1_000_000})
    pool.begin("first")
    assert not pool.places.acquire(int)


def test_processes_that_are_not_forked(tmp_path: Path) -> None:
    """They are told of their permits by another way; macOS has them by default."""
    command = [sys.executable, "-m", "tests.integration.spawned_pool", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == ("['first', 'second']\n", 0), done.stderr


def test_a_pool_that_is_not_fair_takes_nothing_back(start: Callable[..., Pool]) -> None:
    pool = start(processes=1, sched_strategy="fcfs")
    job = pool.give("first")
    assert not pool.pool.give_back(job, pytest.fail)
    pool.let_go("first")
    pool.until(lambda: "first" in pool.ended, "the job ended")
    assert pool.places.value == 1


@pytest.mark.parametrize("is_over", [False, True])
@pytest.mark.parametrize("limit", ["soft_timeout", "timeout", "terminate"])
def test_what_ends_a_job_does_not_end_the_next_one(start: Callable[..., Pool], limit: str, is_over: bool) -> None:
    pool = start(processes=1)
    # The timer of a limit is set when a job is accepted, and here it never rings by itself.
    pool.begin("first", **({} if limit == "terminate" else {limit: 1000.0}))
    pool.send_behind("second")
    if is_over:  # but the pool has not yet heard of it
        pool.let_go("first")
        wait_until(lambda: pool.begun() == ["first", "second"], what="the second one begun")
    [first] = [job for job in pool.pool._cache.values() if job.correlation_id == "first"]
    if limit == "soft_timeout":
        pool.pool._on_soft_timeout(first._job, 1000.0, None, pool.hub)
    elif limit == "timeout":
        pool.pool._on_hard_timeout(first._job)
    else:
        pool.pool.terminate_job(pool.accepted["first"], signal.SIGTERM)
    pool.let_go("second")
    pool.until(lambda: "second" in pool.ended and len(pool.ended) + len(pool.failed) == 2, "both told of")
    assert ("first" in pool.ended) == is_over
    assert pool.begun() == ["first", "second"]
    pool.until(lambda: pool.places.value == 2, "all places free")


@dataclass
class Request:
    """What the pool asks of Celery's request."""

    job: Any
    is_revoked: bool
    expires: Any = None
    stamped_headers: Sequence[str] = ()
    asked: int = 0

    def _apply_result(self) -> Any:
        return self.job

    def revoked(self) -> bool:
        self.asked += 1
        return self.is_revoked


LAPSES = [{"expires": datetime(3000, 1, 1, tzinfo=timezone.utc)}, {"stamped_headers": ["batch"]}]


@pytest.mark.parametrize("is_revoked", [False, True])
@pytest.mark.parametrize("lapses", LAPSES, ids=["expires", "stamped"])
def test_what_may_lapse_is_looked_at_when_a_process_is_free(
    start: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, lapses: dict[str, Any], is_revoked: bool
) -> None:
    pool = start(processes=1)
    pool.begin("first")
    job = pool.give("second")
    request = Request(job, is_revoked, **lapses)
    monkeypatch.setitem(state.requests, "second", request)
    pool.turn()
    assert (job._write_to, request.asked) == (None, 0)
    pool.let_go("first", "second")
    pool.until(lambda: request.asked and pool.places.value == 2, "all places free")
    assert pool.begun() == ["first"] if is_revoked else ["first", "second"]
    assert not pool.pool._cache


def test_a_consumer_that_begins_anew_when_a_process_has_died(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    [process] = pool.pool._pool
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not process._is_alive(), what="the process ended")
    lost = pool.give("lost")
    pool.pool.on_poll_start()
    assert lost._write_to is process  # the pool does not know yet
    pool.places.clear()
    pool.pool.flush()
    assert not pool.pool._cache
    pool.begin("next")


def test_a_process_that_dies_before_it_has_read_what_it_was_sent_when_the_consumer_began_anew(
    start: Callable[..., Pool],
) -> None:
    pool = start(processes=1)
    [process] = pool.pool._pool
    os.kill(process.pid, signal.SIGSTOP)
    sent = pool.give("sent")
    pool.pool.on_poll_start()
    assert sent._write_to is process
    pool.places.clear()
    pool.pool.flush()
    pool.let_go("sent")
    os.kill(process.pid, signal.SIGKILL)
    pool.until(lambda: "sent" in pool.ended, "the job ended in another process")
    assert pool.begun() == ["sent"]


def test_a_consumer_that_begins_anew_forgets_what_was_given_back(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.begin("first")
    left: list[str] = []
    assert pool.pool.give_back(pool.send_behind("second"), lambda: left.append("second"))
    pool.places.clear()
    pool.pool.flush()
    assert left == ["second"]
    assert [job.correlation_id for job in pool.pool._cache.values()] == ["first"]


def test_a_pool_grows_and_shrinks(start: Callable[..., Pool]) -> None:
    pool = start(processes=1)
    pool.pool.grow(1)
    assert pool.places.value == 4
    pool.until_up(2)
    pool.begin("one", "two")
    pool.send_behind("three")
    pool.send_behind("four")
    pool.let_go("one", "two", "three", "four")
    pool.until(lambda: len(pool.ended) == 4, "all ended")
    pool.pool.shrink(1)
    assert pool.places.initial_value == 2
