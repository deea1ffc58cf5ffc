"""A dashboard that many look at, beside a large table and a steady load."""

from __future__ import annotations

import threading
import time
from statistics import quantiles
from typing import Any

import httpx
import uvicorn
from celery import Celery

from benchmarks.growth import fill
from kathikon_celery import Kathikon
from kathikon_celery.storage import Storage
from kathikon_celery.web import Basic, create_app
from tests.endurance.harness import Figures, Run, main
from tests.support.statements import counted
from tests.support.waiting import wait_until

PATHS = ("/", "/queues", "/jobs", "/jobs?state=dead", "/jobs?state=completed", "/workers", "/schedules", "/acts")
AUTH = ("ada", "secret")


def viewers(
    run: Run, *, rows: int = 5_000_000, viewers: int = 10, jobs: int = 20_000, seconds: float = 60.0
) -> Figures:
    """Fill the table with `rows` jobs, drain `jobs` without and with `viewers` of live pages, then open each page.

    The dashboard is in this process. `statements`: a second, for all viewers, while nothing is drained.
    """
    app = Celery("viewers", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.broker_url = run.broker
    storage = Storage.for_app(app)
    fill(storage, rows // 2)
    server = uvicorn.Server(
        uvicorn.Config(create_app(app, auth=Basic(dict([AUTH]))), "127.0.0.1", 0, log_level="warning")
    )
    threading.Thread(target=server.run, daemon=True).start()
    wait_until(lambda: server.started, what="the dashboard")
    root = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    rates = []
    run.start_ready(count=1)

    def drain() -> None:
        before = len(run.journal.ended)
        began = time.monotonic()
        run.send(jobs)
        run.finish()
        rates.append((len(run.journal.ended) - before) / (time.monotonic() - began))

    drain()
    over = threading.Event()
    pages = [0]

    def watch(path: str) -> None:
        with (
            httpx.Client(auth=AUTH, timeout=60) as browser,
            browser.stream("GET", f"{root}/live", params={"of": path}) as stream,
        ):
            for line in stream.iter_lines():
                pages[0] += line.startswith("event")
                if over.is_set():
                    return

    for number in range(viewers):
        threading.Thread(target=watch, args=(PATHS[number % 3],), daemon=True).start()
    wait_until(lambda: pages[0] >= viewers, what="all see their page")
    drain()
    with counted(all_threads=True) as statements:
        time.sleep(seconds / 4)
    took: dict[str, list[float]] = {path: [] for path in PATHS}
    with httpx.Client(auth=AUTH, timeout=60) as browser:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for path, times in took.items():
                began = time.monotonic()
                browser.get(f"{root}{path}").raise_for_status()
                times.append(1000 * (time.monotonic() - began))
    over.set()
    server.should_exit = True
    figures: dict[str, Any] = {
        "rows": Kathikon(app).jobs().count(rows + jobs),
        "drain_without": round(rates[0]),
        "drain_with": round(rates[1]),
        "statements": round(len(statements) / (seconds / 4), 1),
    }
    for path, times in took.items():
        figures[f"p95_ms {path}"] = round(quantiles(times, n=20)[18], 1)
    return figures


if __name__ == "__main__":
    main(viewers)
