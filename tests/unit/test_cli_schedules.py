"""``celery kathikon schedules`` and ``schedule``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from celery import Celery

from tests.unit.test_cli import invoke, make_app


@pytest.fixture
def app(tmp_path: Path) -> Celery:
    return make_app(f"sqlite:///{tmp_path / 'kathikon.db'}")


def test_added_changed_and_listed(app: Celery) -> None:
    assert invoke(app, "schedules").output == "There are no schedules.\n"
    added = invoke(
        app, "schedule", "add", "report", "proj.report", "--crontab", "*/5 8-18 * * 1-5", "--zone", "Europe/Berlin",
        "--args", '["daily"]', "--missed", "all", "--by", "ada",
    )  # fmt: skip
    assert (added.exit_code, added.output) == (0, "Added report.\n")
    (row,) = json.loads(invoke(app, "schedules", "--json").output)
    assert (row["name"], row["args"], row["missed"], row["zone"]) == ("report", ["daily"], "all", "Europe/Berlin")
    head, line = invoke(app, "schedules").output.splitlines()
    assert head.split()[:4] == ["name", "task", "when", "next"]
    assert line.startswith("report  proj.report  */5 8-18 * * 1-5 Europe/Berlin  ")
    assert invoke(app, "schedule", "change", "report", "--every", "90s").output == "Changed report.\n"
    assert "every 90 s" in invoke(app, "schedules").output
    assert invoke(app, "schedule", "pause", "report").output == "Paused report.\n"
    assert invoke(app, "schedules").output.rstrip().endswith("paused")
    assert invoke(app, "schedule", "resume", "report").output == "Resumed report.\n"
    job_id = invoke(app, "schedule", "run", "report").output.strip()
    assert json.loads(invoke(app, "show", job_id, "--json").output)[0]["task"] == "proj.report"
    filled = invoke(app, "schedule", "backfill", "report", "--since", "2026-01-01", "--until", "2026-01-01T00:15")
    assert filled.output == "Sent 10 ticks.\n"
    assert invoke(app, "schedule", "remove", "report").output == "Removed report.\n"
    verbs = [act["verb"] for act in json.loads(invoke(app, "acts", "--json").output)]
    assert verbs == ["delete", "backfill", "run", "resume", "pause", "change", "add"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("add", "x", "proj.x"), 2, "Say when: --every 10s or --crontab '0 6 * * *'."),
        (("add", "x", "proj.x", "--every", "1s", "--crontab", "* * * * *"), 2, "Say either --every or --crontab."),
        (("add", "x", "proj.x", "--crontab", "* * *"), 2, "'* * *' has 3 fields; a crontab has five"),
        (("add", "x", "proj.x", "--crontab", "99 * * * *"), 2, "'99 * * * *' is no crontab"),
        (("add", "x", "proj.x", "--every", "1s", "--args", "{}"), 2, "'{}' is no list in JSON"),
        (("add", "x", "proj.x", "--every", "1s", "--kwargs", "x"), 2, "'x' is no JSON"),
        (("add", "x", "proj.x", "--every", "0s"), 1, "it must be from 0.1 to 1e+09"),
        (("add", "x", "proj.x", "--every", "1s", "--zone", "Mars"), 1, "there is no time zone 'Mars'"),
        (("change", "x"), 2, "Say what to change."),
        (("pause", "none"), 1, "there is no schedule 'none'"),
        (("run", "none"), 1, "there is no schedule 'none'"),
        (("reset", "none"), 1, "there is no schedule 'none'"),
    ],
)
def test_wrong_calls(app: Celery, arguments: tuple[str, ...], code: int, said: str) -> None:
    result = invoke(app, "schedule", *arguments)
    assert result.exit_code == code
    assert said in result.output
    assert json.loads(invoke(app, "schedules", "--json").output) == []
