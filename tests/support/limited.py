"""An app whose tasks have limits, for ``celery -A tests.support.limited worker``: shared tasks, as in `apps`."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import Task, shared_task

from kathikon_celery import Limit, RateLimited
from tests.support.apps import append_line, create_app, read_lines

#: What worker and client have in common.
CONF: dict[str, Any] = {
    "kathikon_queues": {"default": 10, "narrow": {"concurrency": 10, "fleet": 2}, "slow": {"rate": "10/s"}},
    "kathikon_rate_limits": "fleet",
}
app = create_app(**CONF, **json.loads(os.environ.get("KATHIKON_TEST_CONF") or "{}"))


def work(path: str, line: str, seconds: float = 0.05) -> str:
    """Append ``start <line> <moment>`` and, after the work, ``end <line> <moment>``."""
    append_line(path, f"start {line} {time.monotonic()}")
    time.sleep(seconds)
    append_line(path, f"end {line} {time.monotonic()}")
    return line


@shared_task(limits=[Limit("account:{account}", concurrency=1)])
def charge(path: str, account: Any, seconds: float = 0.05) -> Any:
    work(path, "charge", seconds) if isinstance(account, dict) else work(path, json.dumps(account), seconds)
    return account


@shared_task(limits=[Limit("tenant:{tenant}", concurrency=1), Limit("house", concurrency=2)])
def visit(path: str, tenant: str, seconds: float = 0.05) -> str:
    return work(path, tenant, seconds)


@shared_task(limits=[Limit("turn:{key}", concurrency=1), Limit("turns", rate="10/s")])
def take_turn(path: str, key: str) -> str:
    return work(path, key, 0.0)


@shared_task(limits=Limit("weights", concurrency=4, weight=lambda path, size: size))
def carry(path: str, size: int) -> str:
    return work(path, str(size))


@shared_task(limits=[Limit("heavy:{path}", rate="1/d", weight=lambda path: 1_000_000_000)])
def heavy(path: str) -> str:
    return work(path, "heavy", 0.0)


@shared_task(limits=[Limit("api", rate="10/s")])
def call(path: str, line: str) -> str:
    return work(path, line, 0.0)


@shared_task(rate_limit="10/s")
def celerys(path: str, line: str) -> str:
    return work(path, line, 0.0)


@shared_task
def plain(path: str, line: str) -> str:
    return work(path, line)


@shared_task(limits=[Limit("gate:{name}", concurrency=1)])
def hold(name: str, path: str, until: str = "", line: str = "") -> str:
    """Append a line, and hold the limit until there is the file *until*, if it is named."""
    append_line(path, line)
    deadline = time.monotonic() + 100
    while until and not os.path.exists(until) and time.monotonic() < deadline:
        time.sleep(0.01)
    return line


def _refuse_once(self: Task, path: str, service: str) -> int:
    append_line(path, f"start {service} {time.monotonic()}")
    if len([line for line in read_lines(path) if line.startswith("start")]) == 1:
        append_line(path, f"end {service} {time.monotonic()}")
        raise RateLimited(f"service:{service}", retry_after=1.0)
    append_line(path, f"end {service} {time.monotonic()}")
    return int(self.request.retries)


@shared_task(bind=True, max_retries=0, limits=[Limit("service:{service}", concurrency=1)])
def refused(self: Task, path: str, service: str) -> int:
    return _refuse_once(self, path, service)


@shared_task(bind=True, max_retries=0, autoretry_for=(Exception,), limits=[Limit("service:{service}", concurrency=1)])
def refused_and_retried(self: Task, path: str, service: str) -> int:
    return _refuse_once(self, path, service)


@shared_task(bind=True, limits=[Limit("again:{name}", concurrency=1)])
def again(self: Task, path: str, name: str, retries: int) -> int:
    """Retry so often, after a second each."""
    append_line(path, f"{retries} {self.request.retries}")
    if self.request.retries < retries:
        raise self.retry(countdown=1)
    return int(self.request.retries)


@shared_task(limits=[Limit("sum", concurrency=1)])
def total(values: list[Any]) -> int:
    return sum(values)


@shared_task(limits=[Limit("add:{x}", concurrency=1)])
def add(x: int, y: int) -> int:
    return x + y


@shared_task(bind=True, limits=[Limit("own:{name}", concurrency=1)])
def handed_over(self: Task, name: str) -> Any:
    return self.replace(hand.s(name))


@shared_task(limits=[Limit("own:{name}", concurrency=1)])
def hand(name: str) -> str:
    return name


@shared_task(limits=[Limit("early:{line}", concurrency=1)], acks_late=False)
def early(path: str, line: str) -> str:
    return work(path, line)


@shared_task(limits=[Limit("quiet:{line}", concurrency=1)], ignore_result=True)
def quiet(path: str, line: str) -> str:
    return work(path, line)


@shared_task(limits=[Limit("open:{account}", concurrency=1)])
def anything(*args: Any, **kwargs: Any) -> list[Any]:
    return [list(args), kwargs]


@shared_task(limits=[Limit("first", key=lambda *args, **kwargs: args[0] if args else None, concurrency=1)])
def by_key(*args: Any, **kwargs: Any) -> list[Any]:
    return [list(args), kwargs]
