"""Workers and their pool children are killed while they run chords."""

import os
import random
import signal
import time

import psutil

from tests.endurance.harness import Figures, Run, Worker, main


def kill_chords(
    run: Run,
    *,
    chords: int = 200,
    parts: int = 50,
    seconds: float = 0.02,
    workers: int = 2,
    kills: int = 100,
    every: float = 2.0,
) -> Figures:
    """Send chords, and until all have ended (or for so many `kills`) do harm to their workers (-c 2) every so often.

    Each time one worker as a whole is killed with ``kill -9``, and another started at once, and of another worker one
    pool child. A job is a chord: it is `unfinished` unless its body ran with what its parts have returned, and
    started `twice` if its body was. `parts_again` is the number of parts whose first run was cut short.
    """
    alive = run.start_ready(count=workers)
    run.send(chords, seconds=seconds, parts=parts)
    run.expect("the first chord is sent", lambda: bool(run.journal.sent))
    workers_killed = children_killed = 0
    while workers_killed < kills:
        time.sleep(every)
        run.journal.read()
        if len(run.journal.sent) == chords and not run.journal.unfinished():
            break
        victim = alive.pop(0)
        with run.disturbance(victim):
            victim.kill9()
        workers_killed += 1
        for other in alive[:1]:
            with run.disturbance(other):
                children_killed += _kill_child(other)
        alive += run.start()
    run.finish()
    run.wait(lambda: all(row.ended_at is not None for row in run.rows().values()))  # the last body's end is on its way
    rows = run.rows().values()
    return {
        **run.figures(),
        "wrong": len(run.journal.wrong),
        "parts_again": sum(row.crashes > 0 for row in rows if row.task == "endurance.part"),
        "left_over": sum(row.ended_at is None for row in rows),
        "workers_killed": workers_killed,
        "children_killed": children_killed,
    }


def _kill_child(worker: Worker) -> bool:
    """Kill one of the worker's pool children, if it has any by now."""
    children = psutil.Process(worker.pid).children()
    if not children:
        return False
    try:
        os.kill(random.choice(children).pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main(kill_chords)
