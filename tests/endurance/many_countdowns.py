"""A great many jobs wait for their time."""

from tests.endurance.harness import Figures, Run, Worker, main, percentile

HOUR = 3600.0


def many_countdowns(run: Run, *, waiting: int = 100_000, jobs: int = 5_000, probes: int = 100) -> Figures:
    """Measure a worker (-c 2) before and after `waiting` jobs with a countdown of an hour were sent.

    `drain` is the rate, a second, at which it runs a backlog of `jobs`; `pickup_p50` and `pickup_p99` the milliseconds
    from ``delay()`` to the start of one of `probes` jobs sent to the idle worker, 20 a second; `memory` the MB that its
    main process holds. `memory_sent` is that of the worker that was there while they were sent; `early` are those of
    them that were started, and `scheduled` those that wait in our table at the end.
    """
    worker, before = _measure(run, jobs, probes)
    later = run.send(waiting, countdown=HOUR)
    run.sent()
    memory_sent = worker.memory()
    worker.stop()
    worker, after = _measure(run, jobs, probes)
    scheduled = sum(job.state == "scheduled" for job in run.rows().values())
    figures: Figures = {
        **run.figures(),
        "early": len(run.journal.started(later)),
        "scheduled": scheduled,
        "memory_sent": memory_sent,
    }
    for name in before:
        figures |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    figures["unfinished"] -= len(run.journal.unfinished().intersection(later))
    return figures


def _measure(run: Run, jobs: int, probes: int) -> tuple[Worker, dict[str, float]]:
    backlog = run.send(jobs)
    run.sent()
    (worker,) = run.start()
    run.expect("the backlog is done", lambda: run.journal.ended.keys() >= set(backlog))
    ends = [run.journal.ended[job] for job in backlog]
    _, *singles = run.send(1 + probes, rate=20.0)  # the first one connects
    run.expect("the probes are done", lambda: run.journal.ended.keys() >= set(singles))
    run.sent()
    pickups = [1e3 * (run.journal.attempts[job][0].started - run.journal.sent[job]) for job in singles]
    return worker, {
        "drain": round((jobs - 1) / (max(ends) - min(ends))),
        "pickup_p50": round(percentile(pickups, 50), 1),
        "pickup_p99": round(percentile(pickups, 99), 1),
        "memory": worker.memory(),
    }


if __name__ == "__main__":
    main(many_countdowns)
