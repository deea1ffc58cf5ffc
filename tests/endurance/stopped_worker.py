"""A worker is stopped for longer than its lease, and goes on when others have run its jobs."""

import signal

from tests.endurance.harness import Figures, Run, main


def stopped_worker(run: Run, *, jobs: int = 8, seconds: float = 1.0, lease: float = 2.0) -> Figures:
    """Stop a worker (-c 2) that runs jobs, let a second one do them all, and continue the first.

    `taken_over` are the jobs that the first was running, and `started_late` those of all that it started after it went
    on. In our table, before it did, `recorded` jobs were completed with the second worker's result, and `changed` rows
    were different when it had ended. `said` is what it logged meanwhile.
    """
    run.environ["KATHIKON_LEASE"] = str(lease)
    batch = run.send(jobs, seconds=seconds)
    run.sent()  # before any is run: a slow producer would have the first ones done before the last is there
    (first,) = run.start_ready("--loglevel", "info")
    run.expect("the first worker runs two jobs", lambda: len(run.journal.started(batch)) >= 2)
    with run.disturbance(first):
        with run.nobody_writes():
            first.signal(signal.SIGSTOP)
        run.journal.read()
        frozen = [a for job in batch for a in run.journal.attempts.get(job, ()) if a.ended is None]
        (second,) = run.start_ready()
        run.expect("the second worker has done all jobs", lambda: not run.journal.unfinished())
        second.stop()
        before, logged = run.rows(), len(first.log)
        first.signal(signal.SIGCONT)
    continued = run.disturbances[-1].end
    run.expect("the first worker ends what it ran", lambda: all(attempt.ended for attempt in frozen))
    run.send(1)
    run.finish()
    first.stop()
    after = run.rows()
    late = [a for job in batch for a in run.journal.attempts[job] if a.started > continued]
    return {
        **run.figures(),
        "taken_over": len(frozen),
        "started_late": len(late),
        "recorded": sum((job.state, job.result) == ("completed", str(second.index)) for job in before.values()),
        "changed": sum(after.get(key) != job for key, job in before.items()),
        "said": [line for line in first.log[logged:].splitlines() if "WARNING" in line or "ERROR" in line],
    }


if __name__ == "__main__":
    main(stopped_worker)
