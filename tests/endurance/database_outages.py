"""What the scenarios in which the database goes away share: jobs come and are run all the time."""

import time
from collections.abc import Callable

from tests.endurance.harness import Figures, Run


def under_load(run: Run, harm: Callable[[], None], *, times: int, every: float, rate: float, seconds: float) -> Figures:
    """Do harm every so many seconds, while jobs are sent at a steady rate and two workers run them.

    `silence` is the longest time, in seconds, from the end of such an outage to the next start of a job.
    """
    workers = run.start_ready(count=2)
    jobs = run.send(int(rate * every * (times + 1)), rate=rate, seconds=seconds)
    run.expect("the first job runs", lambda: bool(run.journal.attempts))
    for _ in range(times):
        time.sleep(every)
        with run.disturbance():
            harm()
    run.finish()
    starts = sorted(attempt.started for job in jobs for attempt in run.journal.attempts.get(job, ()))
    silences = [next((s for s in starts if s > o.end), float("inf")) - o.end for o in run.disturbances]
    return {
        **run.figures(),
        "workers_lost": sum(not worker.running for worker in workers),
        "silence": round(max(silences), 2),
    }
