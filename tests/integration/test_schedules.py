"""Schedules sent by the workers themselves: each tick once, however many workers there are."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.schedules import crontab

from kathikon_celery import Kathikon
from kathikon_celery.job import State
from kathikon_celery.operate.schedules import lag
from kathikon_celery.schedules.entries import of, reconcile
from kathikon_celery.storage import schedules
from kathikon_celery.storage.errors import NotFound
from tests.integration.conftest import Jobs, Journal, Workers, on_one_database
from tests.support import apps
from tests.support.waiting import wait_until

NOTE = "tests.support.scheduled.note"
SCHEDULED = "tests.support.scheduled"


@pytest.fixture
def operator(client: Celery) -> Kathikon:
    return Kathikon(client, operator="ada")


def ticks(journal: Journal, name: str) -> list[datetime]:
    """The ticks of a schedule whose tasks have run."""
    lines = [line.split() for line in journal.lines]
    return [datetime.fromisoformat(tick) for one, tick in lines if one == name]


def entries(**given: Any) -> dict[str, str]:
    """The environment of a worker whose code has these entries: name -> schedule in seconds."""
    return {"SCHEDULES": json.dumps(given)}


def test_the_codes_entries_are_sent_once_by_workers_that_die(
    operator: Kathikon, journal: Journal, workers: Workers
) -> None:
    code = entries(one=1, two=2) | {"JOURNAL": journal.path}
    first, second = (workers(app=SCHEDULED, env=code, concurrency=1) for _ in range(2))
    wait_until(lambda: len(ticks(journal, "one")) >= 3, what="three ticks")
    first.kill9()
    third = workers(app=SCHEDULED, env=code, concurrency=1)
    wait_until(lambda: len(ticks(journal, "one")) >= 6, what="six ticks")
    second.kill9()
    wait_until(lambda: len(ticks(journal, "one")) >= 9 and len(ticks(journal, "two")) >= 4, what="nine ticks")
    assert third.stop() == 0
    for name, period in (("one", 1), ("two", 2)):
        sent = {job.id for job in operator.jobs(task=NOTE, argument=f'"{name}"')}
        row = operator.schedules.get(name)
        assert row.runs == len(sent)  # a tick of a killed worker may have run twice: its job is one
        found = sorted(set(ticks(journal, name)))
        steps = {(after - before).total_seconds() for before, after in pairwise(found)}
        assert steps <= {float(period), 2.0 * period}  # one was missed while nobody lived, at most


@on_one_database
def test_beat_beside_workers_sends_nothing(operator: Kathikon, journal: Journal, workers: Workers) -> None:
    code = entries(one=1) | {"JOURNAL": journal.path}
    workers(app=SCHEDULED, env=code, args=["--beat"], concurrency=1)
    wait_until(lambda: len(ticks(journal, "one")) >= 3, what="three ticks")
    found = ticks(journal, "one")
    assert len(set(found)) == len(found)
    assert operator.schedules.get("one").runs >= 3


@on_one_database
def test_an_older_deployment_undoes_nothing(operator: Kathikon, workers: Workers, journal: Journal) -> None:
    def deploy(**given: Any) -> None:
        worker = workers(app=SCHEDULED, env=entries(**given) | {"JOURNAL": journal.path}, concurrency=1)
        wait_until(lambda: any(one.name == "done" for one in operator.schedules.every()), what="the entries are rows")
        worker.stop()
        operator.schedules.remove("done")

    def seconds() -> float:
        return float(json.loads(operator.schedules.get("daily").timing)["every"])

    deploy(daily=1000, done=9000)
    assert seconds() == 1000
    deploy(daily=2000, done=9000)
    assert seconds() == 2000
    deploy(daily=1000, done=9000)
    assert seconds() == 2000
    operator.schedules.change("daily", schedule=timedelta(seconds=3000))
    deploy(daily=4000, done=9000)
    assert seconds() == 3000
    operator.schedules.reset("daily")
    deploy(daily=4000, done=9000)
    assert seconds() == 4000


def test_added_paused_resumed_and_removed_while_workers_run(
    operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers
) -> None:
    workers(concurrency=1)
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    hands = operator.schedules
    hands.add("quick", "tests.support.apps.append", 0.5, (journal.path, "tick"))
    journal.wait(3)
    hands.pause("quick", reason="enough")
    assert hands.get("quick").next_at is None
    before = hands.get("quick").runs
    assert apps.add.delay(1, 2).get(timeout=60) == 3
    assert hands.get("quick").runs == before
    job_id = hands.run_now("quick")
    assert operator.result(job_id).get(timeout=60) == "tick"
    hands.change("quick", schedule=3600)
    hands.resume("quick")
    row = hands.get("quick")
    assert row.next_at is not None
    assert row.next_at > datetime.now(timezone.utc) + timedelta(minutes=30)
    hands.remove("quick")
    with pytest.raises(NotFound, match="there is no schedule 'quick'"):
        hands.get("quick")
    said = [(act.verb, act.target.partition(":")[0]) for act in operator.acts()]
    assert said == [(verb, "schedule quick") for verb in ("delete", "resume", "change", "run", "pause", "add")]


def test_missed_ticks(operator: Kathikon, journal: Journal, workers: Workers) -> None:
    """No worker has lived for a minute, and then none is missed: less than ten seconds late are some of them."""
    hands = operator.schedules
    for missed in ("once", "all", "skip"):
        hands.add(missed, "tests.support.apps.append", 3600, (journal.path, missed), missed=missed)
    hands.add("often", "tests.support.apps.append", 1, (journal.path, "often"), max_runs=5)
    begun = datetime.now(timezone.utc)
    with operator.storage.database.write() as connection:
        for name, age in (("once", 7260), ("all", 7260), ("skip", 7260), ("often", 5)):
            tick = begun - timedelta(seconds=age)
            schedules.change(connection, name, {"tick_at": tick, "next_at": tick, "grace": 86400.0})
    workers(concurrency=1)
    wait_until(lambda: hands.get("often").runs == 5, what="the late ones are sent")
    wait_until(lambda: hands.get("all").runs == 3, what="all are sent")
    wait_until(lambda: hands.get("once").runs == 1, what="one is sent for all")
    journal.wait(9)
    assert (hands.get("all").skipped, hands.get("once").skipped, hands.get("skip").skipped) == (0, 2, 3)
    assert hands.get("once").last_tick == begun - timedelta(seconds=60)
    assert (hands.get("skip").runs, hands.get("often").next_at) == (0, None)
    late = [tick - begun for tick in (hands.get("often").last_tick,) if tick is not None]
    assert late == [timedelta(seconds=-1)]


@pytest.mark.parametrize("overlap", ["skip", "queue", "cancel"])
@on_one_database
def test_overlaps(
    operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers, tmp_path: Path, overlap: str
) -> None:
    gate, hands = tmp_path / "gate", operator.schedules
    workers(concurrency=2)
    call = (str(gate), journal.path, "began")
    hands.add("slow", "tests.support.apps.wait_for_file", 0.5, call, overlap=overlap)
    journal.wait(1)
    first = hands.get("slow").last_job
    assert first is not None
    if overlap == "cancel":
        wait_until(lambda: hands.get("slow").runs >= 2, what="a second job")
        sent = list(operator.jobs(task="tests.support.apps.wait_for_file"))
        newest = hands.get("slow").last_job
        before = [job for job in sent if job.id != newest]
        assert before
        assert all(job.revoked_at is not None or job.state is State.CANCELLED for job in before)
    elif overlap == "skip":
        wait_until(lambda: hands.get("slow").skipped >= 2, what="two ticks are skipped")
        assert hands.get("slow").runs == 1
    else:
        wait_until(lambda: hands.get("slow").next_at > hands.get("slow").tick_at, what="a tick waits")  # type: ignore[operator]
        assert hands.get("slow").runs == 1
    hands.pause("slow")
    gate.touch()
    assert jobs.storage.fetch(first) is not None


def test_backfill_sends_what_was_not_sent(operator: Kathikon, jobs: Jobs, journal: Journal, workers: Workers) -> None:
    hands = operator.schedules
    hands.add("hourly", "tests.support.apps.append", crontab(minute=0), (journal.path, "filled"))
    hands.pause("hourly")
    since, until = datetime(2026, 1, 1, tzinfo=timezone.utc), datetime(2026, 1, 1, 5, tzinfo=timezone.utc)
    assert len(hands.backfill("hourly", since, until)) == 5
    assert hands.backfill("hourly", since, until) == []
    workers(concurrency=1)
    journal.wait(5)
    assert operator.jobs("available").count() == 0
    with pytest.raises(ValueError, match="has no time zone"):
        hands.backfill("hourly", since.replace(tzinfo=None), until)
    assert all(jobs.storage.fetch(job.id).state is not State.DEAD for job in operator.jobs())  # type: ignore[union-attr]


@on_one_database
def test_ticks_are_met(operator: Kathikon, workers: Workers, journal: Journal) -> None:
    """How late they are depends on the machine; that each is noted does not."""
    workers(concurrency=1)
    operator.schedules.add("quick", "tests.support.apps.append", 0.5, (journal.path, "tick"))
    journal.wait(2)
    late = lag(operator.schedules.get("quick"))
    assert late is not None
    assert late >= timedelta(0)


def test_a_schedule_that_cannot_be_sent_holds_no_other_back(
    operator: Kathikon, journal: Journal, workers: Workers
) -> None:
    hands = operator.schedules
    hands.add("bad", "tests.support.apps.append", 0.5, (1, 2))
    with operator.storage.database.write() as connection:  # as only an older version would write
        schedules.change(connection, "bad", {"options": '{"priority": "high"}'})
    hands.add("good", "tests.support.apps.append", 0.5, (journal.path, "tick"))
    workers(concurrency=1)
    journal.wait(3)
    row = hands.get("bad")
    assert row.problem is not None
    assert "high" in row.problem


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"schedule": "soon"}, "'soon' is no schedule"),
        ({"schedule": 0}, "each 0 seconds; it must be from 0.1 to 1e\\+09"),
        ({"zone": "Mars"}, "there is no time zone 'Mars'"),
        ({"missed": "never"}, "missed = 'never'; allowed are once, skip, all"),
        ({"overlap": 5}, "overlap = 5; allowed are allow, skip, queue, cancel"),
        ({"jitter": -1}, "jitter = -1 is no number of seconds"),
        ({"max_runs": 0}, "max_runs = 0 is no whole number from 1 to 2147483647"),
        ({"colour": "red"}, "colour: allowed are missed, "),
        ({"schedule": float("nan")}, "each nan seconds"),
        ({"schedule": 1e12}, r"each 1e\+12 seconds"),
        ({"schedule": True}, "True is no schedule"),
        ({"args": "abc"}, "args = 'abc' is no list"),
        ({"kwargs": [1]}, r"kwargs = \[1\] is no mapping"),
        ({"args": [object()]}, "only what JSON can say"),
        ({"options": {"queue": 5}}, "the option queue = 5 is not allowed; allowed is a name"),
        ({"options": {"countdown": float("nan")}}, "the option countdown = nan"),
        ({"options": {"serializer": "nope"}}, "allowed is one of .*json"),
        ({"options": {"expires": "soon"}}, "allowed is seconds, or a moment"),
        ({"options": {"task_id": "x"}}, "options have 'task_id'; allowed are "),
        ({"options": {"kathikon_overlap": "skip"}}, "options have 'kathikon_overlap'"),
        ({"max_runs": 2**31}, "max_runs = 2147483648"),
        ({"starts_at": datetime(1, 1, 1, tzinfo=timezone.utc)}, "is not between the years"),
        (
            {
                "starts_at": datetime(2031, 1, 1, tzinfo=timezone.utc),
                "ends_at": datetime(2030, 1, 1, tzinfo=timezone.utc),
            },
            "starts_at = .* is after ends_at",
        ),
        ({"ends_at": datetime(2020, 1, 1, tzinfo=timezone.utc)}, "has no tick from now on"),
        ({"ends_at": datetime(2030, 1, 1)}, "is no aware datetime"),  # noqa: DTZ001
    ],
)
@on_one_database
def test_what_is_refused(operator: Kathikon, wrong: dict[str, Any], said: str) -> None:
    given = {"schedule": 10, **wrong}
    with pytest.raises((ValueError, TypeError), match=said):
        operator.schedules.add("x", "proj.x", given.pop("schedule"), **given)
    assert (operator.schedules.every(), operator.acts()) == ([], [])


@on_one_database
def test_a_wrong_entry_of_the_code_is_logged_and_holds_no_other_back(
    operator: Kathikon, journal: Journal, workers: Workers
) -> None:
    code = entries(good=1, bad=0) | {"JOURNAL": journal.path}
    worker = workers(app=SCHEDULED, env=code, concurrency=1)
    wait_until(lambda: len(ticks(journal, "good")) >= 2, what="two ticks")
    said = "Kathikon: beat_schedule['bad'] is not sent: a schedule each 0 seconds; it must be from 0.1"
    assert worker.log.count(said) == 1


def test_an_entry_of_the_code_is_deleted_in_the_code(operator: Kathikon, client: Celery) -> None:
    client.conf.beat_schedule = {"hourly": {"task": "proj.x", "schedule": 3600}}
    hands = operator.schedules
    with operator.storage.database.write() as connection:
        reconcile(connection, of(client), datetime.now(timezone.utc))
    with pytest.raises(ValueError, match="'hourly' is an entry of the code: delete it there, or pause it here"):
        hands.remove("hourly")
    hands.change("hourly", schedule=60)
    hands.reset("hourly")
    assert json.loads(hands.get("hourly").timing)["every"] == 3600.0
    client.conf.beat_schedule = {}
    hands.remove("hourly")
    assert hands.every() == []


def test_a_backfill_that_is_repeated_sends_nothing_twice(operator: Kathikon) -> None:
    """Also if the moments have moved a little: ticks keep step with the schedule's own."""
    hands = operator.schedules
    hands.add("hourly", "proj.x", 3600)
    now = datetime.now(timezone.utc)
    since, until = now - timedelta(days=3), now - timedelta(days=2)
    moved = timedelta(seconds=7)
    assert len(hands.backfill("hourly", since, until)) == 24
    assert hands.backfill("hourly", since + moved, until + moved) == []
    assert operator.acts()[1].changed == 24
    for wrong, said in (((until, since), "is not before until"), ((since, now + moved * 100), "has not come yet")):
        with pytest.raises(ValueError, match=said):
            hands.backfill("hourly", *wrong)
    with pytest.raises(TypeError, match="since = '2d' is no datetime"):
        hands.backfill("hourly", "2d", until)  # type: ignore[arg-type]


def test_a_schedule_that_is_replaced_stays_paused(operator: Kathikon) -> None:
    hands = operator.schedules
    assert not hands.add("x", "proj.x", 10)
    hands.pause("x")
    assert hands.add("x", "proj.y", 20)
    row = hands.get("x")
    assert (row.task, row.paused, row.next_at) == ("proj.y", True, None)
    hands.resume("x")
    assert hands.get("x").next_at is not None


def test_many_add_the_same_at_once(operator: Kathikon) -> None:
    def add(number: int) -> None:
        operator.schedules.add("x", "proj.x", 10 + number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert len(operator.schedules.every()) == 1
