"""An incident, played by the operator's commands: a bad deploy, a pause, a redrive, cancelled workflows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from typing import Any

from kathikon_celery.storage import Storage
from tests.endurance.harness import APP, Figures, Run, main
from tests.support.workers import ROOT

#: Prints the ids of the first jobs of workflows whose first task is not due yet.
SEND = """
import sys
from celery import chain
from kathikon_celery import bulk
from tests.endurance.app import fragile
jobs, workflows, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with bulk():
    for number in range(jobs):
        fragile.delay(number, path)
for number in range(workflows):
    first = fragile.si(-1, path).set(countdown=3600)
    print(chain(first, fragile.si(-1, path)).delay().parent.id)
"""


class Shift:
    """Who is on call: runs commands, and prints them with what they say."""

    def __init__(self, run: Run) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._environment = {**os.environ, "PYTHONPATH": path, **run.environ}
        self._directory = run.directory

    def python(self, program: str, *arguments: object) -> list[str]:
        """Run *program*; return the lines that it prints."""
        return self._output([sys.executable, "-c", program, *map(str, arguments)]).split()

    def says(self, *command: str) -> str:
        """Run a command of ``celery kathikon``; return what it prints."""
        said = self._output([sys.executable, "-m", "celery", "-A", APP, "kathikon", *command])
        lines = said.splitlines()
        shown = lines if len(lines) < 12 else [*lines[:8], f"… {len(lines) - 8} more lines"]
        print("\n".join([f"$ celery -A proj kathikon {' '.join(command)}", *shown]), flush=True)
        return said

    def knows(self, *command: str) -> Any:
        """Run a command with ``--json``; return what it says."""
        return json.loads(self._output([sys.executable, "-m", "celery", "-A", APP, "kathikon", *command, "--json"]))

    def _output(self, command: list[str]) -> str:
        return subprocess.run(
            command, env=self._environment, cwd=self._directory, capture_output=True, text=True, check=True
        ).stdout


def incident(run: Run, *, jobs: int = 10_000, waiting: int = 500, workflows: int = 3, rate: float = 200.0) -> Figures:
    """All `jobs` die of a bad deploy; the queue is paused while `waiting` more are sent; then all is mended.

    Dead jobs are retried at `rate` a second, after a dry run; `workflows` are cancelled before their first task is due.
    """
    mended = run.directory / "mended"
    shift = Shift(run)
    run.start_ready(count=2)
    roots = shift.python(SEND, jobs, workflows, mended)
    dead = ("--state", "dead", "--task", "endurance.fragile", "--since", "1h")
    run.expect("all jobs are dead", lambda: _in_state(run, "dead") == jobs)
    shift.says("jobs", *dead, "--error", "*bad deploy*", "--limit", "3")
    shift.says("pause", "--queue", "default", "--reason", "bad deploy", "--by", "ada")
    run.journal.read()
    before = _starts(run)
    shift.python(SEND, waiting, 0, mended)
    shift.says("queues")
    held = _count(shift, "--state", "available")
    explained = shift.knows("explain", shift.knows("jobs", "--state", "available", "--limit", "1")[0]["id"])
    run.journal.read()
    started = _starts(run) - before
    for root in roots:
        shift.says("cancel", "--root", root, "--yes", "--by", "ada")
    mended.touch()
    shift.says("resume", "--queue", "default", "--by", "ada")
    run.expect("what waited is done", lambda: _in_state(run, "completed") == waiting)
    dry = shift.knows("retry", *dead, "--dry-run")["count"]
    shift.says("retry", *dead, "--dry-run")
    began = time.monotonic()
    shift.says("retry", *dead, "--rate", f"{rate:g}/s", "--yes", "--by", "ada", "--reason", "deployed again")
    took = time.monotonic() - began
    run.expect("all jobs are done", lambda: _in_state(run, "completed") == jobs + waiting)
    shift.says("acts")
    rows = run.rows().values()
    one = next(job.id for job in rows if job.errors)
    shift.says("history", one)
    return {
        "dead": dry,
        "held_while_paused": held,
        "started_while_paused": started,
        "explained": explained[0]["why"],
        "retried_a_second": round(jobs / took, 1),
        "completed": sum(job.state == "completed" for job in rows),
        "cancelled": sum(job.state == "cancelled" for job in rows),
        "others": sum(job.state not in ("completed", "cancelled") for job in rows),
        "history": [e["event"] for e in shift.knows("history", one) if e["event"] != "started"],  # not of a short task
        "acts": [[act["verb"], act["changed"]] for act in shift.knows("acts")],
    }


def _starts(run: Run) -> int:
    return sum(map(len, run.journal.attempts.values()))


def _in_state(run: Run, state: str) -> int:
    with closing(Storage(run.broker.partition("+")[2])) as storage:
        return sum(number for (_, one), number in storage.counts().items() if one == state)


def _count(shift: Shift, *options: str) -> int:
    return int(shift.knows("jobs", "--count", "--exact", *options)["count"])


if __name__ == "__main__":
    main(incident)
