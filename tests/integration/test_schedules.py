"""Schedules sent by the workers themselves: each tick once, however many workers there are."""

from __future__ import annotations

import json
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
    said = [(act.verb, act.target) for act in operator.acts()]
    assert said == [(verb, "schedule quick") for verb in ("delete", "resume", "schedule", "run", "pause", "schedule")]


def test_missed_ticks(operator: Kathikon, journal: Journal, workers: Workers) -> None:
    """No worker lives for a while."""
    hands = operator.schedules
    for missed in ("once", "all", "skip"):
        hands.add(missed, "tests.support.apps.append", 0.25, (journal.path, missed), missed=missed, max_runs=4)
    begun = {name: hands.get(name).tick_at for name in ("once", "all", "skip")}
    later = max(at for at in begun.values() if at is not None) + timedelta(seconds=2)
    wait_until(lambda: datetime.now(timezone.utc) > later, what="ticks are missed")
    workers(concurrency=1)
    wait_until(lambda: all(hands.get(name).runs == 4 for name in begun), what="four of each are sent")
    wait_until(lambda: len(journal.lines) == 12, what="they run")
    assert hands.get("all").skipped == 0
    assert hands.get("once").skipped >= 7
    assert hands.get("once").next_at is None
    assert hands.get("all").last_tick == begun["all"] + timedelta(seconds=0.75)  # type: ignore[operator]


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
    hands.add("bad", "tests.support.apps.append", 0.5, (1, 2), options={"priority": "high"})
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
        ({"schedule": 0}, "must be above 0"),
        ({"zone": "Mars"}, "there is no time zone 'Mars'"),
        ({"missed": "never"}, "missed = 'never'; allowed are once, skip, all"),
        ({"overlap": 5}, "overlap = 5; allowed are allow, skip, queue, cancel"),
        ({"jitter": -1}, "jitter = -1 is no number of seconds"),
        ({"max_runs": 0}, "max_runs = 0 is no whole number above 0"),
        ({"colour": "red"}, "colour: allowed are missed, "),
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
    assert worker.log.count("Kathikon: beat_schedule['bad'] is not sent: a schedule each 0 seconds has no ticks") == 1
