"""The figures by name: those of celery-exporter, for existing boards, and Kathikon's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from threading import Lock
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from kathikon_celery.job import State
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.storage import figures, reading, schedules
from kathikon_celery.storage.figures import Ended

if TYPE_CHECKING:
    from celery import Celery

    from kathikon_celery.storage import Storage

#: Upper bounds of the histograms, in seconds, as celery-exporter has them by default.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
#: Seconds after which no transaction is expected to write an earlier end any more.
SETTLED = 5.0
#: Terminal state -> celery-exporter's counter.
COUNTERS = {
    State.COMPLETED: ("celery_task_succeeded", "Jobs that were completed."),
    State.DEAD: ("celery_task_failed", "Jobs that have died; exception is Kathikon's cause."),
    State.CANCELLED: ("celery_task_revoked", "Jobs that were cancelled."),
    State.DISCARDED: ("kathikon_task_discarded", "Jobs that were discarded: expired, or given up."),
}
#: Labels of a task; hostname is celery-exporter's, and empty: a job that has ended belongs to no worker.
TASK = ("name", "queue_name", "hostname")


class _Histogram:
    def __init__(self) -> None:
        self.counts = [0] * len(BOUNDS)
        self.number, self.seconds = 0, 0.0

    def add(self, number: int, seconds: float, counts: Sequence[int]) -> None:
        self.number += number
        self.seconds += seconds
        self.counts = [old + new for old, new in zip(self.counts, counts, strict=True)]

    def buckets(self) -> list[tuple[str, float]]:
        named = [(str(bound), float(count)) for bound, count in zip(BOUNDS, self.counts, strict=True)]
        return [*named, ("+Inf", float(self.number))]


class Collector:
    """A collector of ``prometheus_client``: each scrape reads the tables once.

    >>> registry = CollectorRegistry()
    >>> registry.register(Collector(app))

    Counters begin at 0 when the collector is made, and lag `SETTLED` (5) seconds behind. Scrape one process of the
    fleet: each tells of all of it. A scrape raises the database's error if the tables cannot be read.

    Arguments:
        app: a Celery app whose broker is Kathikon, or a storage.
    """

    def __init__(self, app: Celery | Storage) -> None:
        self._kathikon = Kathikon(app)
        self._lock = Lock()
        self._since: datetime | None = None
        self._event = 0
        self._rescued = 0
        self._counts: dict[tuple[State, tuple[str, ...]], int] = defaultdict(int)
        self._runs: dict[tuple[str, ...], _Histogram] = defaultdict(_Histogram)
        self._waits: dict[tuple[str, ...], _Histogram] = defaultdict(_Histogram)

    def describe(self) -> list[Metric]:
        """Return nothing: so a registry does not read the tables when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all figures. Raises the database's error: the scrape fails, and ``up`` is 0."""
        with self._lock:
            self._count()
            yield from self._counters()
        yield from self._queues()
        yield from self._limits()
        yield from self._workers()
        yield from self._schedules()

    # --- what has ended since the last scrape

    def _count(self) -> None:
        database = self._kathikon.storage.database
        with database.read() as connection:
            until = reading.present(connection) - timedelta(seconds=SETTLED)
            if self._since is None:
                self._since, self._event = until, figures.newest_event(connection)
            if until > self._since:
                found = list(figures.ended_between(connection, self._since, until, BOUNDS))
                number, event = figures.rescued_after(connection, self._event)
                for one in found:
                    self._add(one)
                self._since, self._event, self._rescued = until, event, self._rescued + number

    def _add(self, one: Ended) -> None:
        task = (one.task, one.queue, "")
        labels = (*task, one.cause) if one.state is State.DEAD else task
        self._counts[one.state, labels] += one.number
        if one.state in (State.COMPLETED, State.DEAD):
            self._runs[task].add(one.number, one.run, one.runs)
            self._waits[task].add(one.number, one.wait, one.waits)

    def _counters(self) -> Iterator[Metric]:
        for state, (name, text) in COUNTERS.items():
            family = CounterMetricFamily(name, text, labels=(*TASK, "exception") if state is State.DEAD else TASK)
            for (of, labels), number in self._counts.items():
                if of is state:
                    family.add_metric(labels, number)
            yield family
        for name, text, known in (
            ("celery_task_runtime", "Seconds from a job's claim to its end.", self._runs),
            ("kathikon_queue_time_seconds", "Seconds from a job being ready to its claim.", self._waits),
        ):
            histogram = HistogramMetricFamily(name, text, labels=TASK)
            for labels, one in known.items():
                histogram.add_metric(labels, one.buckets(), one.seconds)
            yield histogram
        yield CounterMetricFamily("kathikon_rescues", "Jobs whose worker was lost.", self._rescued)

    # --- what is there now

    def _queues(self) -> Iterator[Metric]:
        status = self._kathikon.status()
        gauges = {
            "celery_queue_length": "Ready jobs, at most 10,000.",
            "celery_active_consumer_count": "Workers that consume the queue.",
            "celery_active_worker_count": "Workers that consume the queue.",
            "kathikon_oldest_ready_seconds": "For how long the oldest ready job waits.",
            "kathikon_queue_paused": "1 if the queue is paused.",
        }
        families = {name: GaugeMetricFamily(name, text, labels=("queue_name",)) for name, text in gauges.items()}
        states = GaugeMetricFamily("kathikon_jobs", "Jobs by state, at most 10,000.", labels=("queue_name", "state"))
        for one in status.queues:
            workers = one.workers or 0
            values = (one.ready, workers, workers, one.oldest or 0.0, one.paused is not None)
            for family, value in zip(families.values(), values, strict=True):
                family.add_metric((one.name,), float(value))
            for state in ("ready", "blocked", "scheduled", "claimed", "running", "dead"):
                states.add_metric((one.name, state), getattr(one, state))
        yield from (*families.values(), states)

    def _limits(self) -> Iterator[Metric]:
        in_use = GaugeMetricFamily("kathikon_limit_in_use", "What running jobs take of the limit.", labels=("limit",))
        blocked = GaugeMetricFamily(
            "kathikon_limit_blocked", "Jobs that wait for the limit, at most 10,000.", labels=("limit",)
        )
        for one in self._kathikon.limits.all():
            in_use.add_metric((one.name,), one.in_use)
            blocked.add_metric((one.name,), one.blocked)
        yield from (in_use, blocked)

    def _workers(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("celery_worker_up", "1 for each living worker.", labels=("hostname",))
        active = GaugeMetricFamily(
            "celery_worker_tasks_active", "Jobs that the worker has claimed or runs.", labels=("hostname",)
        )
        holds: dict[str, int] = defaultdict(int)
        for one in self._kathikon.workers():
            holds[one.name] += one.holds
        for name, number in holds.items():
            up.add_metric((name,), 1)
            active.add_metric((name,), number)
        yield from (up, active)

    def _schedules(self) -> Iterator[Metric]:
        database = self._kathikon.storage.database
        with database.read() as connection:
            rows = schedules.every(connection)
            late = schedules.overdue(connection, 0.0)
            vitals = database.dialect.vitals(connection)
        runs = CounterMetricFamily("kathikon_schedule_ticks", "Ticks that were sent.", labels=("schedule",))
        skipped = CounterMetricFamily(
            "kathikon_schedule_skipped", "Ticks that were not sent: missed, or overlapping.", labels=("schedule",)
        )
        for row in rows:
            runs.add_metric((row.name,), row.runs)
            skipped.add_metric((row.name,), row.skipped)
        yield from (runs, skipped)
        worst = max((seconds for _, seconds, _ in late), default=0.0)
        yield GaugeMetricFamily("kathikon_schedule_lag_seconds", "By how much the latest tick is late now.", worst)
        for name, value in vitals.items():
            yield GaugeMetricFamily(f"kathikon_{name}", "Of the table of jobs, or of the database.", value)
