"""Many processes write to one SQLite file at once."""

from tests.endurance.harness import Figures, Run, main


def sqlite_contention(
    run: Run, *, minutes: float = 5.0, workers: int = 4, producers: int = 4, rate: float = 50.0
) -> Figures:
    """Producers send jobs, each `rate` a second, and workers (-c 1) run them.

    `locked` counts the lines of all logs and tracebacks that speak of a locked database.
    """
    started = run.start_ready(count=workers, concurrency=1)
    for _ in range(producers):
        run.send(int(60 * minutes * rate), rate=rate)
    run.finish()
    for worker in started:
        worker.stop()
    return {**run.figures(), "locked": sum("locked" in line for line in run.logs().splitlines())}


if __name__ == "__main__":
    main(sqlite_contention)
