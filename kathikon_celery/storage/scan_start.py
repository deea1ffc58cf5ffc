"""Where the ready jobs of a queue begin, so that a claim does not read the index entries of the jobs before them.

PostgreSQL keeps a row's old versions, and their entries in each index, until a vacuum that comes after all transactions
that may see them. A claim that reads a queue from its beginning reads all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from time import monotonic

#: How much later than its ``available_at``, the time of the publishing statement, a job may become visible.
SLACK = timedelta(seconds=1)
#: After a full scan that took t seconds, no full scan for REST × t seconds, at most LONGEST_REST.
REST, LONGEST_REST = 20, 5.0
#: Number of priorities that are remembered.
MOST = 8


def cooldown(took: float) -> float:
    """Return the seconds until the next full scan, after one that took *took* seconds."""
    return min(REST * took, LONGEST_REST)


class ScanStart:
    """For each priority of a queue, the moment from which on there are ready jobs.

    Jobs that were given back, or published by a long transaction, may be older: so a claim scans the whole queue, as
    often as `cooldown` allows.
    """

    def __init__(self) -> None:
        self._since: dict[int, datetime] = {}
        self._everywhere_from = 0.0

    def marks(self) -> list[tuple[int, datetime]]:
        """Return (priority, moment from which to look for its jobs), highest priority first; empty: a full scan."""
        if monotonic() >= self._everywhere_from or len(self._since) > MOST:
            return []
        return [(priority, self._since[priority] - SLACK) for priority in sorted(self._since, reverse=True)]

    def forget(self) -> None:
        """Make the next claim a full scan: jobs were given back."""
        self._since.clear()

    def look_back_to(self, since: datetime) -> None:
        """Make the next claim look at jobs that became ready at *since*, and are visible only now."""
        self._since = {priority: min(mark, since) for priority, mark in self._since.items()}

    def looked(self, found: Iterable[tuple[int, datetime]], everywhere: bool, took: float) -> None:
        """Note that a claim *took* so many seconds and found jobs with these priorities and moments, in their order."""
        first: dict[int, datetime] = {}
        for priority, since in found:
            first.setdefault(priority, since)
        if everywhere:
            self._everywhere_from = monotonic() + cooldown(took)
            if len(self._since) > MOST:
                self._since.clear()
        self._since.update(first)
