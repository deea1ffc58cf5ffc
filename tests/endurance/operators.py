"""The operators' commands beside a small table and a large one."""

from __future__ import annotations

import time
from contextlib import closing
from statistics import median
from typing import Any

from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from benchmarks.growth import fill
from kathikon_celery.cli import kathikon
from kathikon_celery.storage import Storage
from tests.endurance.harness import Figures, Run, main

COMMANDS = (
    "jobs",
    "jobs --state completed",
    "jobs --state available --queue elsewhere",
    "jobs --state dead",
    "jobs --count",
    "jobs --count --state completed",
    "queues",
    "top --once",
    "health",
    "show available-0",
    "explain available-1",
    "history completed-1",
)


def operators(run: Run, *, small: int = 5_000, large: int = 5_000_000, times: int = 10) -> Figures:
    """Time each command `times` times, beside tables of `small` and of `large` jobs: half are ready, half completed.

    Figures: the median of each in ms, in this process: without the start of a process and the import of Celery.
    """
    app = Celery("operators", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.broker_url = run.broker
    storage = Storage.for_app(app)
    context = CLIContext(app=app, no_color=True, workdir=None)
    runner = CliRunner()
    figures: dict[str, Any] = {}
    for size in (small, large):
        storage.clear_jobs()
        fill(storage, size // 2)
        if storage.database.dialect.name == "postgresql":  # as autovacuum does after a while
            with closing(storage.database.detached()) as connection:
                connection.rollback()
                connection.autocommit = True
                connection.execute("VACUUM ANALYZE kathikon_jobs")
        for command in COMMANDS:
            took = []
            for _ in range(times):
                began = time.monotonic()
                result = runner.invoke(kathikon, command.split(), obj=context)
                took.append(1000 * (time.monotonic() - began))
                if result.exit_code not in (0, 1):  # 1: health misses its workers
                    raise RuntimeError(f"celery kathikon {command}: {result.output}") from result.exception
            figures[f"{command}, {size:,} rows"] = round(median(took), 1)
    return figures


if __name__ == "__main__":
    main(operators)
