"""A fleet is upgraded worker by worker under load, from older code with an older schema.

git worktree add /tmp/older v0.1.0
python -m tests.endurance.rolling_upgrade --old /tmp/older --broker 'kathikon+{database}'
"""

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

from celery import Celery
from sqlalchemy import func, select

from kathikon_celery import Kathikon
from kathikon_celery.job import TERMINAL
from kathikon_celery.storage import acts, schema
from kathikon_celery.storage.tables import history, jobs
from tests.endurance.harness import Figures, Run, Worker, main
from tests.support.postgresql import new_database
from tests.support.waiting import wait_until
from tests.support.workers import ROOT

#: The queue that is paused.
HELD = "held"
#: Probes are numbered from here on; the producers' jobs have smaller numbers.
PROBES = 1_000_000
#: Old workers delete cancelled jobs after so many seconds, and look for them this often. New workers keep them.
RETENTION, INTERVAL = 2.0, 1.0
OLD_SETTINGS = f'{{"kathikon_retention_period": {{"cancelled": {RETENTION}}}, "kathikon_prune_interval": {INTERVAL}}}'


def rolling_upgrade(
    run: Run,
    *,
    old: str = os.environ.get("ENDURANCE_OLD", ""),
    jobs: int = 40,
    rate: float = 10.0,
    seconds: float = 0.05,
    probes: int = 10,
    hold: float = 5.0,
) -> Figures:
    """Replace two workers of the code in the folder `old` by new ones, while old and new producers send jobs.

    First all is old. Then a new producer upgrades the tables, a new worker joins, an old one restarts, and the old ones
    are shut down (SIGTERM) one by one, each with a new one in its place. A batch of so many `jobs` is sent by old
    code, and from the upgrade on another one by new code, in each of these steps: some of the jobs are retried, due
    later, or in chains or chords. Besides, `probes` are sent for each question about the time with both versions.

    Figures: `lost` are acknowledged jobs that never ran to their end; `wrong` are chords whose body was given wrong
    values; `begun_again` are rows that lost a worker; `errors_logged` are lines in the logs of all workers.
    `upgrade_seconds` is the time that a new producer took, with its start, to send its first job, and `silence` the
    longest time without a start of a job meanwhile. `old_ran_after` are jobs that old workers began with the new
    tables, and `restarted_ran` those of them after a restart.

    Of a queue that new code has paused: `paused_run_old` and `paused_run_new` are the probes that workers of each
    version ran while there were both, `paused_run_alone` those that new workers ran in `hold` seconds when there were
    no others, and `resumed_run` those that ran after the pause. Of probes that waited and that new code revoked:
    `revoked_rows` were cancelled at once, and `revoked_run` ran. Of probes that new code cancelled by hand: `history`
    are their events, `pruned_by_old` the rows that old workers have deleted, and `history_left` the events that this
    left behind. `prune_left` of these are still there after new workers have deleted other such jobs.
    """
    fleet = _Fleet(run, old)
    run.move(fleet.new_address())
    olds = fleet.start_old(2)
    fleet.send_old(jobs, rate, seconds)
    run.expect("the old workers run jobs", lambda: len(run.journal.ended) > 5)
    before = fleet.version()

    upgrade = time.monotonic()
    fleet.send_old(jobs, rate, seconds)
    news = fleet.send_new(jobs, rate, seconds)
    run.expect("the new producer sends", lambda: not run.journal.sent.keys().isdisjoint(news))
    upgraded = time.monotonic()
    after = fleet.version()

    workers = fleet.start_new(1)
    fleet.send_both(jobs, rate, seconds)
    operator = _Operator(run)
    answers = operator.ask(probes, [worker.index for worker in olds])
    exits = [olds[0].stop()]
    restart = time.monotonic()
    run.journal.ready.discard(olds[0].index)
    olds[0].start(ready_timeout=None)
    run.expect("the old worker is ready again", lambda: olds[0].index in run.journal.ready)
    fleet.send_both(jobs, rate, seconds)
    run.expect("the restarted old worker runs jobs", lambda: fleet.ran(olds[:1], restart) > 2)
    answers |= operator.look()

    for worker in olds:
        fleet.send_both(jobs, rate, seconds)
        exits.append(worker.stop())
        workers += fleet.start_new(1)
    fleet.send_both(jobs, rate, seconds)
    answers |= operator.ask_alone(probes, hold)
    run.finish()
    wait_until(lambda: all(row.state in TERMINAL for row in run.rows().values()), run.patience, "the end of all rows")
    rows = run.rows().values()
    figures = run.figures()
    return {
        **figures,
        "lost": figures["unfinished"],
        "wrong": len(run.journal.wrong),
        "begun_again": sum(row.crashes > 0 for row in rows),
        "not_completed": sum(row.state.value not in ("completed", "cancelled") for row in rows),
        "schema": f"{before} to {after}",
        "upgrade_seconds": round(upgraded - upgrade, 2),
        "silence": fleet.silence(upgrade, upgraded),
        "exits": sorted(set(exits)),
        "workers_lost": sum(not worker.running for worker in workers),
        "errors_logged": run.logs().count(": ERROR/"),
        "run_by_new": fleet.ran(workers, 0.0),
        "old_ran_after": fleet.ran(olds, upgraded),
        "restarted_ran": fleet.ran(olds[:1], restart),
        **answers,
        "prune_left": fleet.prune_with_new(workers),
    }


class _Fleet:
    """Processes of both versions on one database."""

    def __init__(self, run: Run, old: str) -> None:
        package = Path(old, "kathikon_celery").absolute()
        if not old or not package.is_dir():
            raise ValueError(f"old = {old!r} is no checkout of older code: say --old or set ENDURANCE_OLD")
        self._run = run
        overlay = run.directory / "older"  # its package with the tests, and so the app, of this checkout
        overlay.mkdir()
        (overlay / package.name).symlink_to(package)
        self._old = {"PYTHONPATH": os.pathsep.join((str(overlay), str(ROOT))), "ENDURANCE_CONF": OLD_SETTINGS}
        self._new = {"PYTHONPATH": str(ROOT), "ENDURANCE_CONF": run.environ["ENDURANCE_CONF"]}

    def new_address(self) -> str:
        """A broker that no code has seen yet: the tables of the run's own were made by new code."""
        if "sqlite" in self._run.broker:
            return f"kathikon+sqlite:///{self._run.directory / 'upgraded.db'}"
        return "kathikon+" + self._run.keep(new_database(self._run.broker.partition("+")[2]))

    def start_old(self, count: int) -> list[Worker]:
        """Start workers of the old code."""
        return self._start(self._old, count)

    def start_new(self, count: int) -> list[Worker]:
        """Start workers of the new code."""
        return self._start(self._new, count)

    def _start(self, environ: dict[str, str], count: int) -> list[Worker]:
        self._run.environ |= environ
        return self._run.start_ready("--queues", f"default,{HELD}", count=count)

    def send_old(self, count: int, rate: float, seconds: float) -> list[int]:
        """Start a producer of the old code; returns the numbers of its jobs."""
        self._run.environ |= self._old
        return list(self._run.send(count, rate=rate, seconds=seconds, mixed=1))

    def send_new(self, count: int, rate: float, seconds: float) -> list[int]:
        """Start a producer of the new code; returns the numbers of its jobs."""
        self._run.environ |= self._new
        return list(self._run.send(count, rate=rate, seconds=seconds, mixed=1))

    def send_both(self, count: int, rate: float, seconds: float) -> None:
        """Start a producer of each."""
        self.send_old(count, rate, seconds)
        self.send_new(count, rate, seconds)

    def version(self) -> str | None:
        """The version of the tables."""
        with self._run._storage() as storage, storage.database.read() as connection:
            return schema.current(connection)

    def ran(self, workers: Sequence[Worker], since: float) -> int:
        """How many jobs these workers began since then, and ended."""
        self._run.journal.read()
        ours = {worker.index for worker in workers}
        every = (attempt for attempts in self._run.journal.attempts.values() for attempt in attempts)
        return sum(one.worker in ours and one.started > since and one.ended is not None for one in every)

    def silence(self, begin: float, end: float) -> float:
        """The longest time within these without a start of a job."""
        starts = (one.started for attempts in self._run.journal.attempts.values() for one in attempts)
        within = [begin, *sorted(start for start in starts if begin < start < end), end]
        return round(max(later - earlier for earlier, later in pairwise(within)), 2)

    def prune_with_new(self, workers: list[Worker]) -> int:
        """Have a new worker prune as the old ones did; returns the number of events without a job after that."""
        for worker in workers:
            worker.stop()
        self._run.environ |= {**self._new, "ENDURANCE_CONF": OLD_SETTINGS}
        self._run.start_ready()
        wait_until(
            lambda: not any(row.state == "cancelled" for row in self._run.rows().values()), what="no cancelled job"
        )
        return _orphans(self._run)


class _Operator:
    """What new code asks of a fleet."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._app = Celery("operator", broker=run.broker)
        self._app.config_from_object("kathikon_celery.config")
        self._app.conf.broker_url = run.broker
        self._kathikon = Kathikon(self._app)
        self._sent = 0
        self._revoked: dict[int, str] = {}
        self._due = 0.0

    def ask(self, probes: int, olds: Sequence[int]) -> Figures:
        """Pause a queue, revoke jobs, cancel jobs; what is seen of it while workers of both versions run."""
        self._kathikon.pause_queue(HELD)
        paused = self._send(probes, queue=HELD)
        by_hand, noted = self._cancel(probes)
        self._revoked, self._due = self._send(probes, countdown=12.0), time.monotonic() + 12.0
        cancelled = 0
        for one in self._revoked.values():
            self._app.control.revoke(one)
            cancelled += self._kathikon.job(one).state == "cancelled"  # before a worker can have done it
        self._run.wait(lambda: len(self._run.journal.started(paused)) == probes)
        ran = [attempt.worker in olds for job in paused for attempt in self._run.journal.attempts.get(job, ())]
        wait_until(lambda: self._run.rows().keys().isdisjoint(by_hand), what="the old workers prune")
        return {
            "paused_run_old": ran.count(True),
            "paused_run_new": ran.count(False),
            "revoked_rows": cancelled,
            "history": noted,
            "pruned_by_old": probes - len(self._run.rows().keys() & by_hand),
            "history_left": _orphans(self._run),
            "workers_seen": self._kathikon.status().workers,
        }

    def look(self) -> Figures:
        """What has become of the revoked jobs a while after they would have been due."""
        time.sleep(max(0.0, self._due + 2.0 - time.monotonic()))
        self._run.journal.read()
        return {"revoked_run": len(self._run.journal.started(self._revoked))}

    def ask_alone(self, probes: int, hold: float) -> Figures:
        """Whether the paused queue is paused when there are only new workers, and not paused any more after that.

        Also cancels jobs, for `_Fleet.prune_with_new`.
        """
        self._cancel(probes)
        paused = self._send(probes, queue=HELD)
        time.sleep(hold)
        self._run.journal.read()
        held = len(self._run.journal.started(paused))
        self._kathikon.resume_queue(HELD)
        self._run.wait(lambda: len(self._run.journal.started(paused)) == probes)
        return {"paused_run_alone": held, "resumed_run": len(self._run.journal.started(paused)) - held}

    def _cancel(self, count: int) -> tuple[set[str], int]:
        """Send jobs and cancel them by hand; returns their ids, and the number of events that say so."""
        ids = set(self._send(count, countdown=600.0).values())
        for one in ids:
            self._kathikon.cancel(one)
        with self._kathikon.storage.database.read() as connection:
            return ids, sum(len(acts.history_of(connection, one)) for one in ids)

    def _send(self, count: int, **options: object) -> dict[int, str]:
        """Send probes; number -> id of each."""
        sent = {}
        for _ in range(count):
            number, name = PROBES + self._sent, str(uuid4())
            self._sent += 1
            self._app.send_task("endurance.work", (number, 0.0), task_id=name, **options)
            sent[number] = name
        return sent


def _orphans(run: Run) -> int:
    """The number of events in the history of jobs that have no row."""
    query = select(func.count()).select_from(history).where(history.c.job.not_in(select(jobs.c.id)))
    with run._storage() as storage, storage.database.read() as connection:
        return int(connection.execute(query).scalar_one())


if __name__ == "__main__":
    main(rolling_upgrade)
