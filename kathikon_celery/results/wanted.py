"""What one caller waits for, and when to query for it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Any

from kathikon_celery.job import Job
from kathikon_celery.storage import result_listeners
from kathikon_celery.storage.names import key
from kathikon_celery.storage.scan_start import cooldown

#: Delays (s) of re-checks after entering a wait: an end committed concurrently did not see the wait and sent no NOTIFY.
DOUBTS = (0.002, 0.02, 0.2, 1.0)
#: Batching delay per pending result, and its maximum, in seconds: answer several NOTIFYs with one query.
LINGER, LONGEST_LINGER = 0.0005, 0.1
#: Up to so many pending results there is no batching delay.
FEW = 4
#: Upper bound (seconds) of the delay before re-querying after NOTIFYs that turned out to be for other waiters.
VAIN = 0.008


class Wanted:
    """Jobs whose results one caller waits for. The `Desk` calls all methods, with its lock held, in any thread.

    Arguments:
        ids: the jobs' ids.
        interval: seconds between two queries without a wake-up, at the least.
        news: also take unfinished jobs, each time that they have changed.
    """

    def __init__(self, ids: Iterable[str], interval: float, news: bool = False) -> None:
        self.interval = interval
        self.news = news
        #: Key -> id of each job that is not ready.
        self.open = {key(job_id): job_id for job_id in ids}
        #: The keys of all jobs, ready or not.
        self.keys = list(self.open)
        #: The jobs that the caller has not taken yet.
        self.arrived: list[Job] = []
        #: Set when a job arrives, and to wake the caller's thread.
        self.event = threading.Event()
        #: Whether the caller's thread waits for `event`.
        self.sleeps = False
        #: Whether the jobs were queried since `begin`.
        self.is_known = False
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._doubts: list[float] = []
        self._looked = 0.0
        self._vain = 0
        self._all_due = 0.0
        self._named: set[str] = set()
        self._named_due = inf

    def begin(self, in_doubt: bool) -> None:
        """Begin with a query for all jobs; *in_doubt*: an end at this moment may not call, so query again soon."""
        self.is_known, self._all_due = False, 0.0
        self._doubts = list(DOUBTS) if in_doubt else []

    @property
    def due(self) -> float:
        """Monotonic time of the next query."""
        return min(self._all_due, self._named_due)

    def called(self, name: str | None = None) -> None:
        """Note that the job with the key *name* may be ready, or with `None` any job."""
        now = monotonic()
        patience = min(LINGER * len(self.open), LONGEST_LINGER) if len(self.open) > FEW else 0.0
        if self._vain:
            patience = max(patience, min(FEW * LINGER / 8 * 2**self._vain, VAIN))
        if name is None:
            self._all_due = min(self._all_due, max(now, self._looked + patience))
            return
        self._named.add(name)
        if len(self._named) >= len(self.open):
            patience = 0.0
        self._named_due = min(self._named_due, max(now, self._looked + patience))

    def lost(self) -> None:
        """Note that a query has failed: all jobs are due again."""
        self._all_due = 0.0

    def wanted(self, now: float) -> list[str]:
        """Return the keys to query for at the monotonic time *now*."""
        return list(self.open) if self._all_due <= now else [name for name in self._named if name in self.open]

    def looked(self, now: float, took: float) -> None:
        """Note that the query for the `wanted` keys began at *now* and *took* so many seconds."""
        self._vain = 0 if self.arrived or not self.is_known else self._vain + 1
        if self._all_due <= now:
            self._all_due = now + max(self.interval, cooldown(took))
            if self._doubts:
                self._all_due = min(self._all_due, now + took + self._doubts.pop(0))
        self._named, self._named_due = set(), inf
        self._looked, self.is_known = now, True

    def deliver(self, name: str, job: Job) -> bool:
        """Take *job*, as found for the key *name*; return whether its result is ready."""
        job = replace(job, id=self.open[name])
        is_ready = result_listeners.is_ready(job)
        if not is_ready and self.news:
            seen = (job.state, job.status, job.result, job.meta)
            if self._seen.get(name) == seen:
                return False
            self._seen[name] = seen
        self.arrived.append(job)
        if is_ready:  # after the append: a thread that sees no open job must see the arrived one (`is_over`)
            del self.open[name]
            self._seen.pop(name, None)
        self.event.set()
        return is_ready
