"""One worker replaces its pool children all the time."""

from statistics import median

from tests.endurance.harness import Figures, Run, main

SAMPLES = 20


def child_recycling(run: Run, *, jobs: int = 20_000, per_child: int = 50) -> Figures:
    """Run many empty jobs through a worker (-c 2) whose children end after `per_child` of them.

    `memory_early` and `memory_late` are what the main process held, in MB, in the second and in the last fifth.
    """
    run.send(jobs)
    run.sent()
    (worker,) = run.start("--max-tasks-per-child", str(per_child))
    memory: list[float] = []

    def done() -> bool:
        while len(run.journal.ended) > jobs * len(memory) / SAMPLES:  # several, when this process was slow
            memory.append(worker.memory())
        return not run.journal.unfinished()

    run.wait(done)
    fifth = SAMPLES // 5
    children = {attempt.pid for attempts in run.journal.attempts.values() for attempt in attempts}
    return {
        **run.figures(),
        "children": len(children),
        "memory_early": median(memory[fifth : 2 * fifth]),
        "memory_late": median(memory[-fifth:]),
    }


if __name__ == "__main__":
    main(child_recycling)
