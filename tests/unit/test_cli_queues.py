"""``celery kathikon queues``, ``top``, ``pause``, ``resume``, ``pauses``, ``acts`` and ``health``."""

from __future__ import annotations

import json
import sqlite3
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from celery import Celery

from kathikon_celery.job import Job, State
from kathikon_celery.storage import Storage, schedules, schema
from tests.unit.test_cli import invoke, make_app


@pytest.fixture
def app(tmp_path: Path) -> Celery:
    app = make_app(f"sqlite:///{tmp_path / 'kathikon.db'}")
    storage = Storage.for_app(app)
    mail = [Job(id=f"mail-{number}", queue="mail", task="proj.send", priority=number % 3) for number in range(5)]
    storage.insert_many([*mail, Job(id="dead", queue="other", task="proj.send")])
    dead = storage.all("other")[0]
    dead.state = State.DEAD
    storage.update(dead)
    return app


def rows(app: Celery, *command: str) -> list[list[str]]:
    result = invoke(app, *command)
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.output.splitlines()]


def test_queues(app: Celery) -> None:
    head, mail, other = rows(app, "queues")
    states = ["ready", "oldest", "blocked", "scheduled", "claimed", "running", "dead"]
    assert head == ["queue", *states, "workers", "paused"]
    assert (mail[:2], mail[3:]) == (["mail", "5"], ["0"] * 6)
    assert other == ["other", "0", "0", "0", "0", "0", "1", "0"]
    found = json.loads(invoke(app, "queues", "--json").output)
    assert [(one["name"], one["ready"], one["dead"], one["paused"]) for one in found] == [
        ("mail", 5, 0, None),
        ("other", 0, 1, None),
    ]
    assert found[0]["oldest"] >= 0


def test_a_count_ends_at_a_limit(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = invoke(app, "jobs", "--count", "--queue", "mail")
    assert counted.output == "5\n"
    monkeypatch.setattr("kathikon_celery.cli.jobs.MOST", 3)
    assert invoke(app, "jobs", "--count", "--queue", "mail").output == "3+\n"
    assert invoke(app, "jobs", "--count", "--exact", "--queue", "mail").output == "5\n"
    found = invoke(app, "jobs", "--count", "--queue", "mail", "--json").output
    assert json.loads(found) == {"count": 3, "is_exact": False}


def test_top_looks_once(app: Celery) -> None:
    lines = invoke(app, "top", "--once").output.splitlines()
    assert lines[0] == "0 workers; ended in the last 60 s: 1 dead"
    assert lines[2].startswith("queue  ready")
    (line,) = invoke(app, "top", "--once", "--json").output.splitlines()
    assert json.loads(line)["ended"] == {"cancelled": 0, "completed": 0, "dead": 1, "discarded": 0}


def test_pauses(app: Celery) -> None:
    said = invoke(app, "pause", "--queue", "mail", "--for", "30m", "--reason", "a bad deploy", "--by", "ada")
    assert said.exit_code == 0
    assert said.output.startswith("queue 'mail' is paused since ")
    assert said.output.endswith(" by ada: a bad deploy\n")
    assert " until " in said.output
    (found,) = json.loads(invoke(app, "pauses", "--json").output)
    assert (found["kind"], found["name"], found["operator"]) == ("queue", "mail", "ada")
    assert rows(app, "queues")[1][9] == "until"
    (explained,) = json.loads(invoke(app, "explain", "mail-1", "--json").output)
    assert explained["why"] == "paused"
    assert invoke(app, "resume", "--task", "proj.*").stderr == "Error: task 'proj.*' is not paused\n"
    assert invoke(app, "resume", "--task", "proj.*").exit_code == 1
    assert invoke(app, "resume", "--queue", "mail").output == "Nothing is paused.\n"
    acts = json.loads(invoke(app, "acts", "--json").output)
    assert [(act["verb"], act["target"]) for act in acts] == [("resume", "queue mail"), ("pause", "queue mail")]


@pytest.mark.parametrize(
    "wrong",
    [
        ["pause"],
        ["pause", "--queue", ""],
        ["pause", "--queue", "mail", "--for", "soon"],
        ["pause", "--queue", "mail", "--until", "30m"],
        ["pause", "--queue", "mail", "--for", "30m", "--until", "2030-01-01"],
        ["resume"],
        ["rerun"],
        ["delete", "mail-1"],
        ["delete"],
    ],
)
def test_wrong_calls_change_nothing(app: Celery, wrong: list[str]) -> None:
    result = invoke(app, *wrong)
    assert result.exit_code == 2
    assert "Error" in result.output
    assert json.loads(invoke(app, "acts", "--json").output) == []


def test_a_record_of_bulk_acts(app: Celery) -> None:
    assert invoke(app, "cancel", "--queue", "mail", "--yes", "--by", "ada", "--reason", "why").stdout == (
        "Cancelled 5 jobs.\n"
    )
    head, act = rows(app, "acts")
    assert head == ["began", "by", "verb", "jobs", "ended", "target", "reason"]
    assert act[2:5] == ["ada", "cancel", "5"]
    assert act[-1] == "why"


def test_health(app: Celery, tmp_path: Path) -> None:
    well = invoke(app, "health")
    assert well.exit_code == 0
    assert well.output.startswith("Well: sqlite:///")
    assert f"schema {schema.HEAD}, 0 workers, the oldest ready job waits for " in well.output
    ill = invoke(app, "health", "--min-workers", "2", "--max-age", "0s", "--json")
    assert ill.exit_code == 1
    workers, age = json.loads(ill.output)["problems"]
    assert workers == "0 workers are alive, of 2 that should be"
    assert age.startswith("a job of queue 'mail' is ready for ")
    assert invoke(app, "health", "--max-age", "0s", "--queue", "other").exit_code == 0
    invoke(app, "pause", "--queue", "mail")
    assert invoke(app, "health", "--max-age", "0s").exit_code == 0


def test_health_makes_no_tables(tmp_path: Path) -> None:
    app = make_app(f"sqlite:///{tmp_path / 'empty.db'}")
    said = invoke(app, "health")
    assert said.exit_code == 1
    assert said.output.endswith("empty.db has no tables yet\n")
    path = tmp_path / "empty.db"
    assert not path.exists() or sqlite3.connect(path).execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_health_without_a_database() -> None:
    said = invoke(make_app("postgresql+psycopg://app:hunter2@127.0.0.1:1/jobs"), "health")
    assert said.exit_code == 1
    assert "cannot be read" in said.output
    assert "hunter2" not in said.output


def test_reruns(app: Celery) -> None:
    result = invoke(app, "rerun", "mail-1", "none")
    assert result.exit_code == 1
    assert "cannot run again" in result.stderr


def test_health_of_schedules(app: Celery) -> None:
    assert invoke(app, "schedule", "add", "quick", "proj.send", "--every", "1s").output == "Added quick.\n"
    assert invoke(app, "health", "--max-lag", "1h").exit_code == 0
    with Storage.for_app(app).database.write() as connection:
        past = datetime.now(timezone.utc) - timedelta(minutes=5)
        schedules.change(connection, "quick", {"next_at": past, "problem": "no broker"})
    late = invoke(app, "health", "--max-lag", "1m")
    assert late.exit_code == 1
    assert late.output.startswith("Problem: schedule 'quick' is late by 300.")
    assert late.output.endswith(" s: no broker\n")
    assert invoke(app, "health", "--max-lag", "1h").exit_code == 0
    invoke(app, "schedule", "pause", "quick")
    assert invoke(app, "health", "--max-lag", "1m").exit_code == 0
