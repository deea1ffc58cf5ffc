"""A transaction that has sent a job stays open while thousands of other jobs run."""

from __future__ import annotations

import time

from celery import Celery
from sqlalchemy import create_engine

from kathikon_celery import enqueue_in
from tests.endurance.harness import Figures, Run, main, percentile

#: The number of the job of the long transaction.
LATE = 1_000_000_000


def long_transaction(run: Run, *, seconds: float = 60.0, rate: float = 200.0, probes: int = 100) -> Figures:
    """Keep a transaction open for so many seconds that has sent a job first; `rate` jobs a second run meanwhile.

    `pickup_p50` and `pickup_p99` are the milliseconds from ``delay()`` to the start of one of `probes` jobs sent to the
    idle worker, 20 a second: before the transaction began, and while it is open, after the other jobs. `claimed` is the
    number of jobs that were sent after the transaction's own and ran before its commit; `late` the milliseconds from
    the commit to the start of its own job. Not for SQLite, where such a transaction lets nobody else write.
    """
    run.start_ready()
    before = _pickups(run, probes)
    app = Celery("long", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.broker_url = run.broker
    engine = create_engine(run.broker.partition("+")[2])
    with engine.connect() as connection:
        with enqueue_in(connection):
            app.send_task("endurance.work", (LATE, 0.0))
        until = time.monotonic() + seconds
        others = run.send(round(rate * seconds), rate=rate)
        run.expect("the others are done", lambda: run.journal.ended.keys() >= set(others))
        during = _pickups(run, probes)
        run.expect("the time is over", lambda: time.monotonic() >= until)
        is_early = LATE in run.journal.attempts
        claimed = len(run.journal.ended)
        connection.commit()
        committed = time.monotonic()
    run.expect("the job of the transaction is done", lambda: LATE in run.journal.ended)
    engine.dispose()
    app.close()
    return {
        **run.figures(),
        "early": is_early,
        "claimed": claimed - probes - 1,
        "late": round(1e3 * (run.journal.attempts[LATE][0].started - committed), 1),
        **{f"pickup_p{percent}_before": percentile(before, percent) for percent in (50, 99)},
        **{f"pickup_p{percent}_open": percentile(during, percent) for percent in (50, 99)},
    }


def _pickups(run: Run, probes: int) -> list[float]:
    """Send probes to an idle worker; return the milliseconds until each started. The first one connects."""
    _, *singles = run.send(1 + probes, rate=20.0)
    run.expect("the probes are done", lambda: run.journal.ended.keys() >= set(singles))
    run.sent()
    return [round(1e3 * (run.journal.attempts[job][0].started - run.journal.sent[job]), 1) for job in singles]


if __name__ == "__main__":
    main(long_transaction, "kathikon+{database}")
