"""``celery kathikon schedule import``: from the file of Celery's beat, and from RedBeat, as each writes them itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from threading import Thread
from typing import Any

import fakeredis
import pytest
import redbeat
import redis
from celery import Celery
from celery.beat import PersistentScheduler
from celery.schedules import BaseSchedule, crontab, schedule

from kathikon_celery import Kathikon
from kathikon_celery.schedules import imports
from tests.unit.test_cli import invoke, make_app


@pytest.fixture
def app(tmp_path: Path) -> Celery:
    return make_app(f"sqlite:///{tmp_path / 'kathikon.db'}")


@pytest.fixture
def redis_url() -> Iterator[str]:
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    yield f"redis://{host}:{port}/0"
    server.shutdown()
    server.server_close()
    thread.join()


class Odd(BaseSchedule):  # type: ignore[misc]
    """A schedule of the application's own class."""


def written_by_beat(path: Path, entries: dict[str, Any], ran: dict[str, datetime]) -> Path:
    """A file as Celery's beat leaves it behind, with the moments at which entries were sent last."""
    app = Celery("before", set_as_current=False)
    app.conf.beat_schedule = entries
    scheduler = PersistentScheduler(app, schedule_filename=str(path))
    for name, moment in ran.items():
        entry = scheduler.schedule[name]
        entry.last_run_at, entry.total_run_count = moment, 1
    scheduler.close()
    return path


def test_beats_file(app: Celery, tmp_path: Path) -> None:
    """An entry of the code goes on after its last run, others are added, and what cannot be used is said."""
    code = {"hourly": {"task": "proj.hourly", "schedule": crontab(minute=0)}}
    others = {
        "added at run time": {
            "task": "proj.other", "schedule": schedule(timedelta(days=1)), "args": (1, 2), "options": {"queue": "mail"},
        },
        "odd": {"task": "proj.odd", "schedule": Odd()},
        "no json": {"task": "proj.x", "schedule": 10.0, "args": (object,)},
    }  # fmt: skip
    now = datetime.now(timezone.utc)
    ran = {"hourly": now - timedelta(hours=2), "added at run time": now - timedelta(hours=23)}
    path = written_by_beat(tmp_path / "celerybeat-schedule", {**code, **others}, ran)
    app.conf.beat_schedule = code
    dry = invoke(app, "schedule", "import", str(path), "--dry-run")
    assert (invoke(app, "schedules").output, dry.exit_code) == ("There are no schedules.\n", 1)
    done = invoke(app, "schedule", "import", str(path), "--reason", "no beat any more")
    assert done.output == dry.output
    words = dict(line.split("  ", 1) for line in done.output.splitlines()[1:])
    assert words.keys() >= {"hourly", "added at run time", "odd", "no json"}
    assert words["hourly"].strip() == "goes on"
    assert words["added at run time"].strip() == "added"
    assert "its schedule is of the class Odd; only code can have it" in words["odd"]
    assert words["no json"].strip().startswith("left out: ")
    hands = Kathikon(app).schedules
    hourly, added = hands.get("hourly"), hands.get("added at run time")
    assert hourly.tick_at is not None
    assert hourly.tick_at < now  # missed, and sent by the policy
    assert (added.source, added.task, json.loads(added.args)) == ("table", "proj.other", [1, 2])
    assert added.tick_at == ran["added at run time"] + timedelta(days=1)
    assert [act["verb"] for act in json.loads(invoke(app, "acts", "--json").output)] == ["import"]
    again = invoke(app, "schedule", "import", str(path))
    assert "added at run time  is there" in again.output


def test_redbeat(app: Celery, redis_url: str) -> None:
    before = Celery("before", set_as_current=False)
    before.conf.update(redbeat_redis_url=redis_url, redbeat_redis_options={}, redbeat_key_prefix="mine*:")
    redbeat.schedulers.ensure_conf(before)
    moment = datetime.now(timezone.utc) - timedelta(minutes=10)
    for name, when, more in (
        ("nightly", crontab(minute=30, hour=2), {}),
        ("often", schedule(timedelta(minutes=15), relative=True), {"args": [1], "kwargs": {"a": "b"}}),
        ("off", schedule(10.0), {"enabled": False}),
        ("by rule", redbeat.schedules.rrule("HOURLY"), {}),
    ):
        entry = redbeat.RedBeatSchedulerEntry(name, f"proj.{name}", when, app=before, **more)
        entry.last_run_at = moment
        entry.save()
    done = invoke(app, "schedule", "import", redis_url, "--prefix", "mine*:")
    words = dict(line.split("  ", 1) for line in done.output.splitlines()[1:])
    assert "a schedule of the kind 'rrule' is not known" in words.pop("by rule")
    assert {name: word.strip() for name, word in words.items()} == dict.fromkeys(("nightly", "often", "off"), "added")
    hands = Kathikon(app).schedules
    often = hands.get("often")
    assert (json.loads(often.args), json.loads(often.kwargs)) == ([1], {"a": "b"})
    assert often.tick_at is not None
    assert abs(often.tick_at - (moment + timedelta(minutes=15))) <= timedelta(minutes=1)
    assert (hands.get("off").paused, hands.get("off").next_at) == (True, None)
    assert json.loads(hands.get("nightly").timing)["crontab"]["hour"] == "2"
    wrong = invoke(app, "schedule", "import", redis_url, "--prefix", "min?")
    assert (wrong.exit_code, "there are no entries with the prefix 'min?'" in wrong.output) == (1, True)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "there is no file nowhere"),
        ("redis://u:s3cret@127.0.0.1:1/0", "redis://u:**@127.0.0.1:1/0 cannot be read: "),
        ("redis://127.0.0.1:1/0", "redis://127.0.0.1:1/0 cannot be read: "),
        ("django-celery-beat", "django_celery_beat is not in INSTALLED_APPS"),
    ],
)
def test_what_cannot_be_read(app: Celery, source: str, said: str) -> None:
    done = invoke(app, "schedule", "import", source)
    assert (done.exit_code, said in done.output) == (1, True), done.output
    assert invoke(app, "acts", "--json").output == "[]\n"


def test_hostile_entries_of_redbeat(app: Celery, redis_url: str) -> None:
    """Each is said by its name, and the good one is added."""
    client = redis.Redis.from_url(redis_url)
    good = {"name": "good", "task": "proj.x", "schedule": {"__type__": "interval", "every": 5.0}}
    wrong: dict[str, Any] = {
        "list": "[]", "null": "null", "deep": "[" * 100_000, "bytes": b"\xff", "text": "nonsense",
        "huge": json.dumps({**good, "name": "huge", "schedule": {"__type__": "interval", "every": 1e300}}),
        "args": json.dumps({**good, "name": "args", "args": 5}),
        "task": json.dumps({**good, "name": "task", "task": 5}),
        "options": json.dumps({**good, "name": "options", "options": {"queue": 5}}),
    }  # fmt: skip
    for name, definition in wrong.items():
        client.hset(f"redbeat:{name}", "definition", definition)
    client.hset("redbeat:meta", mapping={"definition": json.dumps({**good, "name": "meta"}), "meta": "5"})
    client.hset("redbeat:good", "definition", json.dumps(good))
    done = invoke(app, "schedule", "import", redis_url)
    assert (done.exit_code, done.exception and type(done.exception)) == (1, SystemExit)
    words = dict(line.split("  ", 1) for line in done.output.splitlines()[1:])
    assert words.pop("good").strip() == "added"
    assert words.keys() == {*wrong, "meta"}
    assert all(word.strip().startswith("left out: ") for word in words.values())


@pytest.mark.parametrize("zone", [7200.0, "Europe/Berlin"])
def test_a_moment_of_redbeat(zone: Any) -> None:
    said = {"__type__": "datetime", "year": 2026, "month": 7, "day": 1, "hour": 12, "minute": 0, "timezone": zone}
    assert imports._object(said) == datetime(2026, 7, 1, 10, tzinfo=timezone.utc)
