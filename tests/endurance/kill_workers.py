"""Whole workers are killed while they run jobs."""

import time

from tests.endurance.harness import Figures, Run, main


def kill_workers(
    run: Run, *, jobs: int = 400, seconds: float = 0.05, workers: int = 2, kills: int = 5, every: float = 2.0
) -> Figures:
    """Of some workers (-c 2) that run short jobs, ``kill -9`` one every so many seconds, and start another at once."""
    alive = run.start_ready(count=workers)
    run.send(jobs, seconds=seconds)
    run.expect("the first job is sent", lambda: bool(run.journal.sent))
    for _ in range(kills):
        time.sleep(every)
        victim = alive.pop(0)
        with run.disturbance(victim):
            victim.kill9()
        alive += run.start()
    run.finish()
    return run.figures()


if __name__ == "__main__":
    main(kill_workers)
