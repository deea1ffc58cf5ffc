"""Limits whose numbers an operator changes while real workers run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from kathikon_celery import Kathikon
from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Journal, Workers, client_of
from tests.support import apps
from tests.support.waiting import wait_until

CONF: dict[str, Any] = {
    "kathikon_queues": {"default": {"fleet": 1}},
    "kathikon_rate_limits": "fleet",
    "task_annotations": {apps.echo.name: {"rate_limit": "1000/s"}, apps.sleep.name: {"rate_limit": "1/h"}},
}


@pytest.fixture
def client(database_url: str) -> Iterator[Celery]:
    with client_of(database_url, **CONF) as app:
        yield app


def test_workers_obey_set_and_reset(
    client: Celery, jobs: Jobs, journal: Journal, workers: Workers, tmp_path: Path
) -> None:
    operator, gate = Kathikon(client, operator="ada"), tmp_path / "gate"
    workers(concurrency=4, conf=CONF)

    def send(name: str) -> Any:
        return apps.wait_for_file.delay(str(gate), journal.path, name)

    sent = [send(str(number)) for number in range(3)]
    journal.wait(1)
    wait_until(lambda: operator.limits.get("queue:default").in_use == 1, what="one runs")
    explained = [operator.explain(one) for one in sent if jobs.of(one).state is State.BLOCKED]
    assert [(one.why, one.text) for one in explained] == [
        ("limit", "it waits for the limit 'queue:default': 1 of 1 in use")
    ] * 2
    operator.limits.set("queue:default", concurrency=3)
    journal.wait(3)
    operator.limits.set("queue:default", concurrency=0)
    assert operator.limits.get("queue:default").in_use == 3
    gate.touch()
    assert [one.get(timeout=60) for one in sent] == ["done"] * 3
    last = send("last")
    inspect = client.control.inspect(["worker1@test"], timeout=60)
    assert inspect.ping()
    assert jobs.of(last).state is State.BLOCKED
    operator.limits.reset("queue:default")
    assert last.get(timeout=60) == "done"


def test_celery_s_rate_limit_is_for_the_fleet(client: Celery, jobs: Jobs, workers: Workers) -> None:
    operator = Kathikon(client)
    names = [workers(conf=CONF).hostname for _ in range(2)]

    def control(task: str, rate: Any) -> list[Any]:
        replies = client.control.rate_limit(task, rate, reply=True, destination=names, timeout=60)
        return [answer for reply in replies for answer in reply.values()]

    assert control(apps.echo.name, "1/h") == [{"ok": "new rate limit set successfully"}] * 2
    (act,) = operator.acts()
    assert (act.verb, act.target) == ("limit", f"limit task:{apps.echo.name}: rate 1/h")
    assert act.operator == "celery control rate_limit"
    first, second = apps.echo.delay(1), apps.echo.delay(2)
    done = wait_until(lambda: [one for one in (first, second) if one.ready()], what="one of the two")
    assert len(done) == 1
    (waits,) = {first, second} - set(done)
    assert jobs.wait(waits, State.BLOCKED)
    assert "the next of 1 in 3600 s starts in " in operator.explain(waits).text
    assert control(apps.echo.name, "0") == [{"ok": "rate limit disabled successfully"}] * 2
    assert waits.get(timeout=60) in ([[1], {}], [[2], {}])
    assert control(apps.sleep.name, "0") == [{"ok": "rate limit disabled successfully"}] * 2
    assert [one.get(timeout=60) for one in [apps.sleep.delay(0) for _ in range(5)]]  # no worker has its own limit
    (error, _) = control(apps.add.name, "1/s")
    assert error["error"].endswith("has no rate_limit in the code, so its jobs count for none; add one there")
    assert "Invalid rate limit" in control(apps.echo.name, "often")[0]["error"]
    assert control("tests.unknown", "1/s")[0] == {"error": "unknown task"}
    assert len(operator.acts()) == 3
