"""Celery's own beat with the faults of `tests.endurance.ticks`, for comparison."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise

from tests.endurance.harness import Figures, Run, main
from tests.endurance.ticks import ENTRIES
from tests.support.workers import ROOT


def ticks_of_beat(run: Run, *, minutes: float = 5.0, every: float = 5.0) -> Figures:
    """Ten schedules of one to sixty seconds, sent by one beat, which is killed `every` so often and started anew.

    `expected`: periods from the first message of an entry on; `missed`: periods of an entry without a message; `twice`:
    messages of an entry that came less than half its period after another.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    entries = {f"every-{one:g}": {"task": "proj.echo", "schedule": one, "args": [one]} for one in ENTRIES}
    (run.directory / "beating.py").write_text(
        "from celery import Celery\n"
        "app = Celery('beating')\n"
        "app.config_from_object('kathikon_celery.config')\n"
        f"app.conf.update(broker_url={run.broker!r}, beat_schedule={entries!r})\n"
        "app.conf.beat_scheduler = 'celery.beat:PersistentScheduler'\n"
    )

    def start() -> subprocess.Popen[bytes]:
        with (run.directory / "beat.log").open("ab") as log:
            command = [sys.executable, "-m", "celery", "-A", "beating", "beat", "--pidfile="]
            return subprocess.Popen(
                command, cwd=run.directory, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log
            )

    until, kills, beat = time.monotonic() + 60 * minutes, 0, start()
    try:
        while time.monotonic() < until:
            time.sleep(every)
            beat.kill()
            beat.wait()
            beat, kills = start(), kills + 1
    finally:
        beat.kill()
        beat.wait()
    sent: dict[str, list[float]] = {}
    for job in run.rows().values():
        assert job.inserted_at is not None
        sent.setdefault(job.body, []).append(job.inserted_at.timestamp())
    figures: dict[str, float] = dict.fromkeys(("expected", "sent", "missed", "twice"), 0)
    for body, moments in sent.items():
        (period,) = (one for one in ENTRIES if f"[[{one!r}]," in body.replace(" ", "") or f"[[{one:g}]," in body)
        moments.sort()
        periods = {int((one - moments[0] + period / 10) / period) for one in moments}
        expected = int((moments[-1] - moments[0] + period / 10) / period) + 1
        figures["expected"] += expected
        figures["sent"] += len(moments)
        figures["missed"] += expected - len(periods)
        figures["twice"] += sum(after - before < period / 2 for before, after in pairwise(moments))
    return {**figures, "kills": kills}


if __name__ == "__main__":
    main(ticks_of_beat)
