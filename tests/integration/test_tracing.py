"""Traces of a real worker: publication, wait and run of a chain are one trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain

from tests.integration.conftest import Workers
from tests.support import apps
from tests.support.waiting import wait_until

pytest.importorskip("opentelemetry.instrumentation.celery")


def spans_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in apps.read_lines(path)]


def test_publication_wait_and_run_are_one_trace(client: Celery, workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "spans"
    workers(app="tests.support.traced", concurrency=2, env={"SPANS": str(path)})
    result = chain(apps.add.s(1, 2), apps.add.s(3)).delay()
    assert result.get(timeout=60) == 6
    name = "run/tests.support.apps.add"
    wait_until(lambda: sum(span["name"] == name for span in spans_in(path)) == 2, what="two runs")
    spans = spans_in(path)
    first, second = (
        next(span for span in spans if span["name"] == name and span["job"] == one.id)
        for one in (result.parent, result)
    )
    sent = next(span for span in spans if span["name"] == "apply_async/tests.support.apps.add")
    assert second["trace"] == first["trace"] == sent["trace"]
    assert (sent["parent"], second["parent"]) == (first["id"], sent["id"])
    for run in (first, second):
        assert (run["attributes"]["kathikon.attempt"], run["attributes"]["kathikon.fence"] >= 1) == (1, True)
        waits = {span["job"]: span for span in spans if span["name"] == "wait/default"}
        wait = waits[run["job"]]
        assert wait["trace"] == run["trace"]
        assert wait["begin"] <= wait["end"] <= run["end"]
        assert run["attributes"]["kathikon.queue_time"] == pytest.approx((wait["end"] - wait["begin"]) / 1e9, abs=1e-3)
    assert len([span for span in spans if span["name"] == name]) == 2  # the contrib's, and not doubled
