"""Where the ready jobs of a queue begin, so that a claim need not walk over what is left of those before them.

PostgreSQL keeps a row's old versions, and their entries in each index, for as long as any transaction is open that may
still see them; and until its next vacuum. A claim that reads a queue from its beginning meets all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from time import monotonic

#: A job's moment is that of its publication's statement; so much later it may become visible.
SLACK = timedelta(seconds=1)
#: How many times as long as it took to look everywhere nobody does so again; at most so many seconds.
REST, LONGEST_REST = 20, 5.0
#: Priorities whose beginnings are remembered.
MOST = 8


def cooldown(took: float) -> float:
    """Seconds for which nobody looks so again, after a look that took *took* seconds."""
    return min(REST * took, LONGEST_REST)


class ScanStart:
    """The moment from which on each priority of a queue has ready jobs.

    There may be others before it, which were given back or were published by a transaction that lasted: as often as
    the database's state allows, a claim looks everywhere.
    """

    def __init__(self) -> None:
        self._since: dict[int, datetime] = {}
        self._everywhere_from = 0.0

    def marks(self) -> list[tuple[int, datetime]]:
        """Each priority, from the highest on, and the moment from which to look for its jobs; none: look everywhere."""
        if monotonic() >= self._everywhere_from or len(self._since) > MOST:
            return []
        return [(priority, self._since[priority] - SLACK) for priority in sorted(self._since, reverse=True)]

    def forget(self) -> None:
        """Jobs were given back: look everywhere."""
        self._since.clear()

    def looked(self, found: Iterable[tuple[int, datetime]], everywhere: bool, took: float) -> None:
        """A claim of so many seconds found jobs of these priorities and moments, in their order."""
        first: dict[int, datetime] = {}
        for priority, since in found:
            first.setdefault(priority, since)
        if everywhere:
            self._everywhere_from = monotonic() + cooldown(took)
            if len(self._since) > MOST:
                self._since.clear()
        self._since.update(first)
