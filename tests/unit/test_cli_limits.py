"""``celery kathikon limits`` and ``limit``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from celery import Celery

from kathikon_celery.job import Job, Use
from kathikon_celery.storage import Storage, limits, nodes
from tests.unit.test_cli import invoke, make_app

USE = Use("account:7", "account:{account}", 1, 1, None, 1.0, 1)


@pytest.fixture
def app(tmp_path: Path) -> Celery:
    app = make_app(f"sqlite:///{tmp_path / 'kathikon.db'}")
    storage = Storage.for_app(app)
    limits.define(storage.database, [USE, Use("stripe", "stripe", 1, None, 60, 60.0, 5)])
    for number in range(3):
        storage.insert(Job(id=str(number), queue="mail", task="proj.send", limits=(USE,)))
    return app


def test_listed(app: Celery) -> None:
    head, account, stripe = invoke(app, "limits").output.splitlines()
    assert head.split()[:2] == ["limit", "numbers"]
    assert account.split() == ["account:{account}", "1", "at", "once", "1", "0", "2"]
    assert stripe.split() == ["stripe", "60/m,", "burst", "5", "0", "0", "0"]
    found = json.loads(invoke(app, "limits", "--json").output)
    assert [(one["name"], one["blocked"], one["of_operator"]) for one in found] == [
        ("account:{account}", 2, None),
        ("stripe", 0, None),
    ]
    assert found[1]["numbers"] == {"concurrency": None, "rate": 60, "per": 60.0, "burst": 5}
    _, key = invoke(app, "limits", "--keys", "account:{account}").output.splitlines()
    assert key.split()[:3] == ["account:7", "0", "2"]
    (key,) = json.loads(invoke(app, "limits", "--keys", "account:{account}", "--json").output)
    assert (key["key"], key["in_use"], key["blocked"], key["has_room"]) == ("account:7", 0, 2, True)
    assert invoke(app, "limits", "--keys", "stripe").output == "No key of that limit has been used lately.\n"
    assert json.loads(invoke(app, "queues", "--json").output)[0]["blocked"] == 2


def test_set_and_reset(app: Celery) -> None:
    said = invoke(
        app, "limit", "set", "stripe", "--concurrency", "3", "--rate", "none", "--reason", "they ask", "--by", "ada"
    )
    assert said.exit_code == 0, said.output
    assert " ".join(said.output.splitlines()[1].split()) == "stripe 3 at once 0 0 0 60/m, burst 5 ada: they ask"
    storage = Storage.for_app(app)
    nodes.consume(storage.database, nodes.register(storage.database, "worker", "machine", 1, 0.0, 60.0).id, ["mail"])
    (explained,) = json.loads(invoke(app, "explain", "2", "--json").output)
    assert explained["why"] == "limit"
    assert explained["text"] == "it waits in the line of the limit 'account:7': others were let out before it"
    assert invoke(app, "limit", "reset", "stripe").output == "stripe: reset.\n"
    assert invoke(app, "limit", "reset", "stripe").output == "stripe: the numbers of the code count already.\n"
    acts = json.loads(invoke(app, "acts", "--json").output)
    assert [(act["verb"], act["target"]) for act in acts] == [
        ("unlimit", "limit stripe"),
        ("limit", "limit stripe: concurrency 3, rate none"),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("limit", "set", "stripe"), 2, "Say what to set: --concurrency N, --rate 60/m, or --burst N."),
        (("limit", "set", "stripe", "--concurrency", "x"), 1, "a concurrency is a whole number from 0"),
        (("limit", "set", "stripe", "--rate", "60/w"), 1, 'a rate is a rate such as "10/s"'),
        (("limit", "set", "stripe", "--burst", "61"), 1, "a burst is at most the number of its rate, 60, not 61"),
        (("limit", "set", "strip", "--burst", "2"), 1, "there is no limit 'strip'"),
        (("limit", "reset", "strip"), 1, "did you mean stripe?"),
        (("limits", "--keys", "account:7"), 1, "that is a key of the limit 'account:{account}'"),
    ],
)
def test_wrong_calls(app: Celery, arguments: tuple[str, ...], code: int, said: str) -> None:
    result = invoke(app, *arguments)
    assert result.exit_code == code
    assert said in result.output
    assert json.loads(invoke(app, "acts", "--json").output) == []


def test_no_limits(tmp_path: Path) -> None:
    app = make_app(f"sqlite:///{tmp_path / 'empty.db'}")
    assert invoke(app, "limits").output == "No worker has told of any limit.\n"
