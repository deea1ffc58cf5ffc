"""``celery kathikon jobs``, ``show``, and what all commands that name jobs understand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from celery import Celery

from kathikon_celery.job import Job, State
from kathikon_celery.storage import Storage
from tests.unit.test_cli import invoke, make_app


@pytest.fixture
def app(tmp_path: Path) -> Celery:
    app = make_app(f"sqlite:///{tmp_path / 'kathikon.db'}")
    storage = Storage.for_app(app)
    dead = Job(id="3", queue="other", task="proj.send")
    sent = [
        Job(id="1", queue="mail", task="proj.send", body="[[1], {}, {}]"),
        Job(id="2", queue="mail", task="proj.\x1b[31mred"),
    ]
    storage.insert_many([*sent, dead])
    dead = storage.all("other")[0]
    dead.state = State.DEAD
    storage.update(dead)
    return app


def test_a_table(app: Celery) -> None:
    result = invoke(app, "jobs", "--queue", "mail")
    assert result.exit_code == 0
    head, second, first = result.output.splitlines()
    assert head.split() == ["id", "state", "queue", "task", "published", "tries", "reason"]
    assert second.startswith("2   available  mail   proj.\\x1b[31mred  ")
    assert first.startswith("1   available  mail   proj.send ")
    assert invoke(app, "jobs", "--task", "proj.x*").output == "There are no such jobs.\n"


def test_pages(app: Celery) -> None:
    def ids(*options: str) -> list[str]:
        return [job["id"] for job in json.loads(invoke(app, "jobs", "--json", *options).output)]

    assert ids() == ["3", "2", "1"]
    assert ids("--limit", "1") == ["3"]
    assert ids("--limit", "1", "--after", "3") == ["2"]
    assert ids("--after", "1") == []
    assert ids("--since", "1h") == ["3", "2", "1"]
    assert ids("--until", "2000-01-01") == []
    assert invoke(app, "jobs", "--count", "--queue", "mail").output == "2\n"


def test_json_has_the_names_of_the_columns(app: Celery) -> None:
    (listed,) = json.loads(invoke(app, "jobs", "--json", "--task", "proj.send", "--queue", "mail").output)
    assert (listed["id"], listed["state"], listed["inserted_at"][-6:]) == ("1", "available", "+00:00")
    assert "body" not in listed
    (shown,) = json.loads(invoke(app, "show", "1", "--json").output)
    assert shown["body"] == "[[1], {}, {}]"
    (explained,) = json.loads(invoke(app, "explain", "1", "--json").output)
    assert (explained["id"], explained["state"], explained["why"]) == ("1", "available", "no_consumer")


def test_a_job_as_text(app: Celery) -> None:
    lines = invoke(app, "show", "2").output.splitlines()
    assert any(line.split() == ["task", "proj.\\x1b[31mred"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("jobs", "--state", "asleep"), "'asleep' is not one of 'scheduled', "),
        (("jobs", "--since", "yesterday"), "'yesterday' is neither a moment such as 2026-01-31T12:00 (UTC) nor an age"),
        (("retry",), "Say which jobs to retry: either their ids, or options such as --state and --task."),
        (("cancel", "1", "--queue", "mail"), "Say which jobs to cancel: either their ids, or options"),
        (("retry", "--state", "completed", "--yes"), "retry is for jobs that are cancelled, dead, discarded, "),
        (("jobs", "--limit", "0"), "0 is not in the range 1<=x<=10000"),
        (("jobs", "--exact"), "--exact goes with --count."),
        (("jobs", "--since", "99999999999999d"), "'99999999999999d' is too long ago"),
        (("jobs", "--queue", ""), "queue is an empty text, which no job has; leave it out, or name one"),
        (("cancel", "--yes", "--argument", ""), "argument is an empty text, which no job has"),
        (("retry", "--state", "dead", "--rate", "x"), "rate = 'x' is no rate above 0, such as 50/s, 600/m or 1000/h"),
        (("retry", "--state", "dead", "--rate", "0/s", "--dry-run"), "rate = '0/s' is no rate above 0"),
        (("retry", "--state", "dead", "--rate", "inf/s"), "rate = 'inf/s' is no rate above 0"),
        (("pause", "--all", "--for", "0s"), "until = 0:00:00 is not in the future"),
        (("pause", "--all", "--until", "2020-01-01"), "is not in the future: such a pause would be over at once"),
        (("pause", "--all", "--for", "99999999999999d"), "'99999999999999d' is too long a time"),
    ],
)
def test_a_wrong_call(app: Celery, arguments: tuple[str, ...], said: str) -> None:
    before = Storage.for_app(app).all()
    result = invoke(app, *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert Storage.for_app(app).all() == before


@pytest.mark.parametrize("command", ["show", "explain", "cancel", "retry", "discard"])
def test_a_job_that_is_not_there(app: Celery, command: str) -> None:
    result = invoke(app, command, "none")
    assert result.exit_code == 1
    assert "there is no job 'none'" in result.output


def test_a_verb_that_the_state_does_not_allow_changes_nothing(app: Celery) -> None:
    before = Storage.for_app(app).all()
    result = invoke(app, "cancel", "3")
    assert result.exit_code == 1
    assert "job '3' is dead; nothing was done: cancel is for jobs that are scheduled, available, " in result.output
    assert invoke(app, "retry", "3", "--dry-run").output == "Would retry 1 job.\n"
    assert Storage.for_app(app).all() == before


def test_one_unknown_id_does_not_hide_the_others(app: Celery) -> None:
    for command in ("show", "explain"):
        result = invoke(app, command, "1", "none", "2", "--json")
        assert result.exit_code == 1
        assert [one["id"] for one in json.loads(result.stdout)] == ["1", "2"]
        assert result.stderr == "Error: there is no job 'none'\n"


def test_a_question_that_nobody_answers_says_how_to_go_on(app: Celery) -> None:
    Storage.for_app(app).insert_many([Job(id=f"m{number}", queue="many") for number in range(11)])
    result = invoke(app, "cancel", "--queue", "many")
    assert result.exit_code == 1
    assert "Nothing was done. Say --yes to do it without this question." in result.stderr


def test_results_without_a_message_are_not_counted(app: Celery) -> None:
    """Such as that of a chord's body that never ran."""
    Storage.for_app(app).backend.store_alone(
        "ghost", State.DEAD, status="FAILURE", result=None, traceback=None, meta=None
    )
    found = json.loads(invoke(app, "retry", "--state", "dead", "--dry-run", "--json").output)
    assert (found["count"], found["first"]) == (1, ["3"])
    assert "is only a result, without a message; nothing was done" in invoke(app, "retry", "ghost").stderr


def test_completion_finds_ids_and_queues(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    from kathikon_celery.cli import common

    root = click.Context(click.Command("celery"))
    root.params = {"app": "proj"}
    monkeypatch.setattr(common, "find_app", lambda name: {"proj": app}[name])
    assert common.complete_queues(root, None, "m") == ["mail"]
    assert set(common.complete_ids(root, None, "")) == {"1", "2", "3"}
    root.params = {"app": "unknown"}
    assert common.complete_ids(root, None, "") == []
