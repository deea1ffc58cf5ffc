"""Figures for Prometheus from a real worker, read by Prometheus's own parser."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from kathikon_celery import Kathikon
from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Workers, on_one_database
from tests.support import apps
from tests.support.waiting import wait_until

httpx = pytest.importorskip("httpx")
parser = pytest.importorskip("prometheus_client.parser")
metrics = pytest.importorskip("kathikon_celery.metrics")
FOLDER = Path(metrics.__file__).parent
#: Those of celery-exporter (its README) that a table of jobs can tell; the others count events that nobody stores.
OF_CELERY_EXPORTER = {
    "celery_task_succeeded_total": {"name", "hostname", "queue_name"},
    "celery_task_failed_total": {"name", "hostname", "exception", "queue_name"},
    "celery_task_revoked_total": {"name", "hostname", "queue_name"},
    "celery_task_runtime_bucket": {"name", "hostname", "queue_name", "le"},
    "celery_worker_up": {"hostname"},
    "celery_worker_tasks_active": {"hostname"},
    "celery_queue_length": {"queue_name"},
    "celery_active_consumer_count": {"queue_name"},
    "celery_active_worker_count": {"queue_name"},
}


COUNTERS = ("celery_task_succeeded_total", "celery_task_failed_total", "celery_task_revoked_total")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parser.text_string_to_metric_families(text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def test_a_worker_tells_of_the_fleet(client: Celery, jobs: Jobs, workers: Workers) -> None:
    port = free_port()
    worker = workers(concurrency=2, conf={"kathikon_metrics_port": port})
    address = f"http://127.0.0.1:{port}/metrics"
    assert httpx.get(address).status_code == 200
    done = [apps.add.delay(number, 1) for number in range(5)]
    slow = apps.sleep.delay(0.3)
    failed = apps.fail.delay("no")
    cancelled = apps.add.apply_async((1, 1), countdown=3600)
    Kathikon(client).cancel(cancelled)
    for one in (*done, slow):
        jobs.wait(one, State.COMPLETED)
    jobs.wait(failed, State.DEAD)
    apps.add.apply_async((1, 1), countdown=3600, queue="later")

    def of(figure: str, /, **labels: str) -> float:
        return found[figure, tuple(sorted(labels.items()))]

    task = {"queue_name": "default", "hostname": ""}
    add, sleep = ({"name": f"tests.support.apps.{name}", **task} for name in ("add", "sleep"))
    found: dict[Any, float] = {}

    def are_counted() -> bool:
        found.clear()
        found.update(samples(httpx.get(address).text))
        return sum(value for (name, _), value in found.items() if name in COUNTERS) == 8

    wait_until(are_counted, what="the counters, some seconds later")
    assert of("celery_task_succeeded_total", **add) == 5
    assert of("celery_task_revoked_total", **add) == 1
    assert of("celery_task_runtime_count", **sleep) == 1
    assert of("celery_task_runtime_bucket", **sleep, le="0.25") == 0
    assert of("celery_task_runtime_bucket", **sleep, le="+Inf") == 1
    assert of("celery_task_runtime_sum", **sleep) >= 0.3
    assert of("kathikon_queue_time_seconds_count", **add) == 5
    assert of("celery_worker_up", hostname=worker.hostname) == 1
    assert of("kathikon_jobs", queue_name="later", state="scheduled") == 1
    assert of("celery_active_worker_count", queue_name="later") == 0
    assert of("kathikon_table_bytes") > 0
    labels = {name: {key for key, _ in of_name} for name, of_name in found}
    assert {name: labels[name] for name in OF_CELERY_EXPORTER} == OF_CELERY_EXPORTER
    apps.add.delay(1, 1).get(timeout=60)
    wait_until(lambda: samples(httpx.get(address).text)["celery_task_succeeded_total", tuple(sorted(add.items()))] == 6)
    assert worker.stop() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


@on_one_database
def test_two_workers_of_a_machine_have_one_port(client: Celery, workers: Workers) -> None:
    port = free_port()
    first = workers(conf={"kathikon_metrics_port": port})
    second = workers(conf={"kathikon_metrics_port": port})
    assert f"Kathikon: metrics are not served at 127.0.0.1 port {port}, trying again: " in second.log
    assert apps.add.delay(1, 1).get(timeout=60) == 2
    assert first.stop() == 0

    def is_served() -> bool:
        with suppress(httpx.ConnectError):
            return httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
        return False

    wait_until(is_served, what="the second one takes the first one's place")
    assert second.stop() == 0


@on_one_database
def test_alerts_and_board_ask_for_figures_that_are_there(client: Celery, jobs: Jobs) -> None:
    """On PostgreSQL, whose transactions SQLite does not have, there is one more."""
    promql = pytest.importorskip("promql_parser")
    yaml = pytest.importorskip("yaml")
    text = metrics.exposition(metrics.serving.registry_of(client))[1].decode()
    known = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)) | {"kathikon_oldest_transaction_seconds"}
    histograms = ("celery_task_runtime", "kathikon_queue_time_seconds")
    known |= {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    rules = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    assert all({"alert", "expr", "labels", "annotations"} <= rule.keys() for rule in rules)
    board = json.loads((FOLDER / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions = [*(rule["expr"] for rule in rules), *asked]
    for one in expressions:
        plain = one.replace("$__rate_interval", "5m").replace("$queue", ".*")
        assert promql.parse(plain) is not None
        assert set(_names(plain)) <= known, one
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def _names(expression: str) -> Iterator[str]:
    yield from re.findall(r"\b(?:celery|kathikon)_\w+", expression)
