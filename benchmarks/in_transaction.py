"""``python -m benchmarks.in_transaction``: ``delay()`` in the caller's transaction, beside it alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from benchmarks.systems import url_of
from kathikon_celery import enqueue_in

#: Calls in each transaction.
IN_EACH = 10


def measure(url: str, number: int, rounds: int) -> tuple[float, float, float]:
    """Return calls a second: alone; in transactions of one call; in transactions of `IN_EACH` calls."""
    app = Celery("benchmarks", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.update(kathikon_database_url=url, task_default_queue="benchmarks-in-transaction")

    @app.task(name="benchmarks.nothing")
    def nothing() -> None:
        """No work."""

    nothing.delay()
    engine = create_engine(url)

    def alone(calls: int) -> None:
        for _ in range(calls):
            nothing.delay()

    def within(size: int) -> Callable[[int], None]:
        def run(calls: int) -> None:
            for _ in range(0, calls, size):
                with Session(engine) as session, session.begin(), enqueue_in(session):
                    for _ in range(size):
                        nothing.delay()

        return run

    ways = (alone, within(1), within(IN_EACH))
    rates: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, found in zip(ways, rates, strict=True):
            began = time.perf_counter()
            way(number)
            found.append(number / (time.perf_counter() - began))
    with app.connection_for_write() as connection:
        connection.default_channel.queue_delete("benchmarks-in-transaction")
    engine.dispose()
    app.close()
    first, second, third = map(median, rates)
    return first, second, third


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_transaction", description=__doc__)
    parser.add_argument("--number", type=int, default=1000, help="calls in each round (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="the medians of so many (default: 5)")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="benchmarks-") as folder:
        urls = {"SQLite": f"sqlite:///{Path(folder) / 'kathikon.db'}", "PostgreSQL": url_of("POSTGRESQL")}
        for name, url in urls.items():
            alone, one, ten = measure(url, options.number, options.rounds)
            print(f"{name}, calls/s: alone {alone:.0f}, one a transaction {one:.0f}, {IN_EACH} a transaction {ten:.0f}")


if __name__ == "__main__":
    main()
