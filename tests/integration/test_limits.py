"""Limits, with real workers of two pools; what ran when is measured inside the tasks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from sqlalchemy import create_engine

from kathikon_celery import bulk, enqueue_in
from kathikon_celery.job import State
from kathikon_celery.limits import LimitError
from tests.integration.conftest import Jobs, Journal, Workers, client_of, on_one_database
from tests.support import limited
from tests.support.projects import Project
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess


@pytest.fixture(scope="module")
def fleet(shared_workers: Workers) -> list[WorkerProcess]:
    """Two workers, one of processes and one of threads."""
    conf = {"kathikon_prune_interval": 0.2}
    options: dict[str, Any] = {"app": "tests.support.limited", "concurrency": 4, "conf": conf}
    with ThreadPoolExecutor(2) as both:
        return list(both.map(lambda pool: shared_workers(pool=pool, name=pool, **options), ("prefork", "threads")))


@pytest.fixture
def app(shared_database_url: str) -> Iterator[Celery]:
    """A client that knows the limits of the workers."""
    with client_of(shared_database_url, **limited.CONF) as app:
        yield app


def runs(journal: Journal) -> list[tuple[str, float, float]]:
    """What ran, from when to when, by the lines of `limited.work`."""
    found: list[tuple[str, float, float]] = []
    open_: dict[str, list[float]] = {}
    for line in journal.lines:
        what, _, rest = line.partition(" ")
        name, _, moment = rest.rpartition(" ")
        if what == "start":
            open_.setdefault(name, []).append(float(moment))
        else:
            found.append((name, open_[name].pop(0), float(moment)))
    assert not any(open_.values())
    return found


def most(found: list[tuple[str, float, float]]) -> int:
    """How many ran at once, at most."""
    return max(sum(start <= moment < end for _, start, end in found) for _, moment, _ in found)


def most_in(moments: list[float], seconds: float) -> int:
    """How many of the *moments* are within one window."""
    return max(sum(first <= moment < first + seconds for moment in moments) for first in moments)


def claims(jobs: Jobs, results: list[Any]) -> list[float]:
    """When these jobs were claimed, by the database's clock."""
    return sorted(jobs.wait(one, State.COMPLETED).claimed_at.timestamp() for one in results)


@pytest.mark.usefixtures("fleet")
class TestTwoWorkers:
    def test_one_job_of_a_key_runs_at_a_time(self, app: Celery, journal: Journal) -> None:
        sent = [limited.charge.delay(journal.path, key) for _ in range(6) for key in "abc"]
        assert [one.get(timeout=60) for one in sent] == list("abc") * 6
        found = runs(journal)
        assert len(found) == 18
        for key in "abc":
            assert most([one for one in found if one[0] == f'"{key}"']) == 1
        assert most(found) <= 3

    def test_keys_do_not_wait_for_each_other(self, app: Celery, jobs: Jobs, journal: Journal, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        held = limited.hold.delay("x", journal.path, str(gate), "began")
        journal.wait(1)
        waiting = [limited.hold.delay("x", journal.path) for _ in range(30)]
        assert limited.hold.delay("y", journal.path).get(timeout=60) == ""
        assert {jobs.of(one).state for one in waiting} == {State.BLOCKED}
        assert {jobs.of(one).attempts for one in waiting} == {0}
        gate.touch()
        assert [one.get(timeout=60) for one in [held, *waiting]] == ["began"] + [""] * 30

    def test_a_job_waits_for_each_of_its_limits(self, app: Celery, journal: Journal) -> None:
        with bulk():
            sent = [limited.visit.delay(journal.path, key) for _ in range(4) for key in "abcd"]
        assert [one.get(timeout=60) for one in sent] == list("abcd") * 4
        found = runs(journal)
        assert most(found) <= 2
        for key in "abcd":
            assert most([one for one in found if one[0] == key]) == 1

    def test_keys_take_turns_in_the_line_of_a_rate(self, app: Celery, journal: Journal) -> None:
        with bulk():
            sent = [limited.take_turn.delay(journal.path, key) for key in "a" * 12 + "b" * 2]
        assert len([one.get(timeout=60) for one in sent]) == 14
        order = "".join(name for name, _, _ in sorted(runs(journal), key=lambda run: run[1]))
        assert "bb" not in order
        assert order.rindex("b") < 8

    def test_a_job_counts_for_its_weight(self, app: Celery, journal: Journal) -> None:
        sent = [limited.carry.delay(journal.path, size) for size in (2, 2, 2, 2, 4, 9, 1, 1, 1, 1, 3)]
        assert len([one.get(timeout=60) for one in sent]) == 11
        found = runs(journal)
        for _, moment, _ in found:
            at_once = [int(size) for size, start, end in found if start <= moment < end]
            assert sum(min(size, 4) for size in at_once) <= 4

    def test_more_weight_than_time_stops_no_worker(self, app: Celery, jobs: Jobs, journal: Journal) -> None:
        assert limited.heavy.delay(journal.path).get(timeout=60) == "heavy"
        waiting = limited.heavy.delay(journal.path)
        assert limited.charge.delay(journal.path, "after").get(timeout=60) == "after"
        assert jobs.of(waiting).state is State.BLOCKED
        waiting.revoke()

    def test_no_window_has_more_than_the_rate(self, app: Celery, jobs: Jobs, journal: Journal) -> None:
        """Of a limit, of Celery's rate limits for the fleet, and of a queue's."""
        with bulk():
            sent = [
                [limited.call.delay(journal.path, "limit") for _ in range(15)],
                [limited.celerys.delay(journal.path, "celery") for _ in range(15)],
                [limited.plain.apply_async((journal.path, "queue"), queue="slow") for _ in range(15)],
            ]
        names = ("limit", "celery", "queue")
        for name, results in zip(names, sent, strict=True):
            assert [one.get(timeout=60) for one in results] == [name] * 15
        for name, results in zip(names, sent, strict=True):
            assert most_in(claims(jobs, results), 1.0) <= 10
            # Inside the tasks: as late as a busy machine may have begun some of them.
            starts = [start for line, start, _ in runs(journal) if line == name]
            assert most_in(starts, 1.0) <= 14
            assert max(starts) - min(starts) > 1.0

    def test_a_queue_has_a_number_for_all_workers(self, app: Celery, journal: Journal) -> None:
        sent = [limited.plain.apply_async((journal.path, "job"), queue="narrow") for _ in range(10)]
        sent += [limited.charge.apply_async((journal.path, "a"), queue="narrow") for _ in range(3)]
        assert len([one.get(timeout=60) for one in sent]) == 13
        found = runs(journal)
        assert len(found) == 13
        assert most(found) <= 2
        assert most([one for one in found if one[0] == '"a"']) == 1

    def test_a_service_that_refuses_is_left_alone(self, app: Celery, jobs: Jobs, tmp_path: Path) -> None:
        tasks = (limited.refused, limited.refused_and_retried)
        journals = [Journal(tmp_path / task.name) for task in tasks]
        pairs = list(zip(tasks, journals, strict=True))
        sent = [[task.delay(journal.path, task.name) for _ in range(4)] for task, journal in pairs]
        for results, journal in zip(sent, journals, strict=True):
            assert [one.get(timeout=60) for one in results] == [0, 0, 0, 0]
            starts = sorted(start for _, start, _ in runs(journal))
            assert len(starts) == 5
            assert starts[1] - starts[0] >= 0.95
            found = [jobs.of(one) for one in results]
            assert sorted(job.attempts for job in found) == [1, 1, 1, 2]
            assert {job.crashes for job in found} == {0}

    def test_a_retry_frees_its_slot(self, app: Celery, jobs: Jobs, journal: Journal) -> None:
        first = limited.again.delay(journal.path, "a", 1)
        jobs.wait(first, State.RETRYABLE)
        second = limited.again.delay(journal.path, "a", 0)
        assert second.get(timeout=60) == 0
        assert first.get(timeout=60) == 1
        assert journal.lines == ["1 0", "0 0", "1 1"]

    def test_countdowns_and_moments_of_the_past(self, app: Celery, jobs: Jobs, journal: Journal) -> None:
        began = monotonic()
        sent = [limited.charge.apply_async((journal.path, "later"), countdown=1.0) for _ in range(3)]
        assert {jobs.of(one).state for one in sent} == {State.SCHEDULED}
        past = datetime.now(timezone.utc) - timedelta(days=1)
        assert limited.charge.apply_async((journal.path, "later"), eta=past).get(timeout=60) == "later"
        assert [one.get(timeout=60) for one in sent] == ["later"] * 3
        found = runs(journal)
        assert most(found) == 1
        assert len([start for _, start, _ in found if start - began > 0.95]) >= 3

    def test_canvas(self, app: Celery) -> None:
        assert chain(limited.add.s(1, 1), limited.add.s(2), limited.add.s(3)).delay().get(timeout=60) == 7
        assert group(limited.add.s(1, number) for number in range(6)).delay().get(timeout=60) == list(range(1, 7))
        many = chord([limited.add.s(1, number) for number in range(6)], limited.total.s())
        assert many.delay().get(timeout=60) == 21
        assert chain(group(limited.add.s(1, 1), limited.add.s(1, 2)), limited.total.s()).delay().get(timeout=60) == 5
        assert limited.handed_over.delay("me").get(timeout=60) == "me"
        linked = limited.add.apply_async((1, 1), link=limited.add.s(5))
        assert linked.get(timeout=60) == 2
        wait_until(lambda: linked.children and linked.children[0].get(timeout=60) == 7, what="the callback")

    def test_a_transaction(self, app: Celery, jobs: Jobs, journal: Journal, shared_database_url: str) -> None:
        url = shared_database_url.replace("postgresql://", "postgresql+psycopg://")
        engine = create_engine(url)
        with engine.connect() as connection:
            with enqueue_in(connection):
                lost = limited.charge.delay(journal.path, "t")
            connection.rollback()
            assert jobs.storage.fetch(lost.id) is None
            with enqueue_in(connection):
                sent = [limited.charge.delay(journal.path, "t") for _ in range(4)]
                sent += [limited.charge.apply_async((journal.path, "t"), countdown=0.1)]
            connection.commit()
        engine.dispose()
        assert [one.get(timeout=60) for one in sent] == ["t"] * 5
        assert most(runs(journal)) == 1

    def test_a_higher_priority_is_first(self, app: Celery, jobs: Jobs, journal: Journal, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        sent = [limited.hold.delay("p", journal.path, str(gate), "first")]
        journal.wait(1)
        for priority in (0, 5, 9, 5):
            call = ("p", journal.path, "", str(priority))
            sent.append(limited.hold.apply_async(call, priority=priority))
        gate.touch()
        assert len([one.get(timeout=60) for one in sent]) == 5
        # The first of the line has been let out already when a higher one comes.
        assert journal.lines[0] == "first"
        assert [line for line in journal.lines[1:] if line != "0"] == ["9", "5", "5"]

    def test_a_blocked_job_is_revoked(self, app: Celery, jobs: Jobs, journal: Journal, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        first = limited.hold.delay("r", journal.path, str(gate), "first")
        journal.wait(1)
        others = [limited.hold.delay("r", journal.path, "", str(number)) for number in range(3)]
        jobs.wait(others[1], State.BLOCKED)
        others[1].revoke()
        jobs.wait(others[1], State.CANCELLED)
        gate.touch()
        assert [one.get(timeout=60) for one in (first, others[0], others[2])] == ["first", "0", "2"]
        assert jobs.of(others[1]).state is State.CANCELLED
        assert "1" not in journal.lines

    def test_a_blocked_job_expires(self, app: Celery, jobs: Jobs, journal: Journal, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        first = limited.hold.delay("e", journal.path, str(gate), "first")
        journal.wait(1)
        late = limited.hold.apply_async(("e", journal.path, "", "late"), expires=0.3)
        jobs.wait(late, State.DISCARDED)
        gate.touch()
        assert first.get(timeout=60) == "first"
        assert journal.lines == ["first"]

    def test_options_of_tasks(self, app: Celery, jobs: Jobs, journal: Journal) -> None:
        sent = [limited.early.delay(journal.path, "a") for _ in range(3)]
        assert [one.get(timeout=60) for one in sent] == ["a"] * 3
        ignored = [limited.quiet.delay(journal.path, "b") for _ in range(3)]
        for one in ignored:
            jobs.wait(one, State.COMPLETED)
        found = runs(journal)
        for line in "ab":
            assert most([one for one in found if one[0] == line]) == 1

    def test_any_text_is_a_key(self, app: Celery) -> None:
        texts = ["x" * 5000, "ü\U0001f600" * 60, "a\0b", "{0}{x}", "%s", "", "\ud800", "#", "\n"]
        sent = [(limited.by_key.delay(text), limited.anything.delay(account=text)) for text in texts * 2]
        for text, (by_key, by_field) in zip(texts * 2, sent, strict=True):
            assert by_key.get(timeout=60) == [[text], {}]
            assert by_field.get(timeout=60) == [[], {"account": text}]

    def test_any_argument_is_a_key(self, app: Celery, tmp_path: Path) -> None:
        values = [None, 1, 1.5, True, [1, [2]], {"a": {"b": []}}, "x"]
        journals = [Journal(tmp_path / str(number)) for number in range(len(values))]
        pairs = list(zip(values, journals, strict=True))
        sent = [limited.charge.delay(journal.path, account=value) for value, journal in pairs * 2]
        assert [one.get(timeout=60) for one in sent] == values * 2
        assert {most(runs(journal)) for journal in journals} == {1}

    def test_ways_to_send(self, app: Celery, jobs: Jobs, journal: Journal) -> None:
        call: dict[str, Any] = {"args": (journal.path, "w")}
        sent = [limited.charge.apply_async(**call, compression="gzip")]
        sent.append(app.send_task(limited.charge.name, **call))
        sent.append(limited.charge.apply_async(kwargs={"path": journal.path, "account": "w"}))
        sent.append(limited.charge.s("w", seconds=0.1).apply_async((journal.path,)))
        assert [one.get(timeout=60) for one in sent] == ["w"] * 4
        assert most(runs(journal)) == 1
        assert {tuple(use.key for use in jobs.of(one).limits) for one in sent} == {("account:w",)}


def test_a_killed_worker_gives_its_slot_back(
    workers: Workers, client: Celery, jobs: Jobs, journal: Journal, tmp_path: Path
) -> None:
    first = workers(app="tests.support.limited", pool="prefork", concurrency=1)
    gate = tmp_path / "gate"
    held = limited.hold.delay("k", journal.path, str(gate), "held")
    journal.wait(1)
    waiting = [limited.hold.delay("k", journal.path, "", "waited") for _ in range(3)]
    jobs.wait(waiting[-1], State.BLOCKED)
    second = workers(app="tests.support.limited", pool="threads", concurrency=2)
    assert second.running
    first.kill9()
    journal.wait(2)  # the job that was cut, or one that has waited: not both
    gate.touch()
    assert [one.get(timeout=60) for one in [held, *waiting]] == ["held"] + ["waited"] * 3
    assert jobs.of(held).crashes == 1
    assert sorted(journal.lines) == ["held", "held", "waited", "waited", "waited"]


WRONG = """
from celery import shared_task
from kathikon_celery import Limit

@shared_task(limits=[Limit('a:{acount}', concurrency=1)])
def charge(account, amount):
    pass
"""


@on_one_database
def test_a_wrong_limit_ends_the_worker(project: Project, database_url: str) -> None:
    project.write("proj/tasks.py", WRONG)
    with pytest.raises(AssertionError) as caught, project.worker():
        pass
    assert "exited with 1" in str(caught.value)
    assert (
        "task proj.tasks.charge: limit 'a:{acount}' names {acount}, and the task has account, amount;"
        " did you mean account?"
    ) in str(caught.value)


@on_one_database
def test_a_call_without_the_field_sends_nothing(client: Celery, jobs: Jobs) -> None:
    with pytest.raises(LimitError, match="the call has no 'account'; it has args, other"):
        limited.anything.delay(other=1)
    with pytest.raises(LimitError, match="limits need its arguments: missing a required argument: 'account'"):
        client.send_task(limited.charge.name, ("path",))
    assert list(jobs.storage.all()) == []
