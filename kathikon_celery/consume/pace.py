"""How fast a queue's jobs are finished, as seen in the last moments."""

from __future__ import annotations

from math import exp
from time import monotonic

#: Seconds after which what happened counts for a third.
MEMORY = 0.3
#: Jobs a second below which the next one is a new beginning.
CALM = 1.0
#: Seconds that a beginning lasts at least, however quickly jobs follow one another.
BEGINNING = 0.05
#: Jobs a second from which on there is much to do, so that transactions are shared.
BUSY = 150.0
#: The same while the pool has a free slot. It is higher: a caller that sends its next task when it has the result of
#: the last one makes many jobs a second, and waits for each.
RUSH = 600.0


class Pace:
    """A rate that forgets."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = self._began = monotonic()

    def count(self) -> None:
        """One more is finished."""
        rate = self.rate()
        if rate < CALM:
            self._began = self._at
        self._rate = rate + 1 / MEMORY

    def rate(self) -> float:
        """Jobs a second."""
        now = monotonic()
        self._rate *= exp((self._at - now) / MEMORY)
        self._at = now
        return self._rate

    def ahead(self, horizon: float, slots: int) -> float:
        """How many jobs will be finished within *horizon* seconds, beside those that the *slots* hold now.

        Soon after a beginning that is told by what was finished since then, when `rate` does not know it yet: less one
        job for each slot, as tasks that took long may end together.
        """
        rate = self.rate()
        since = rate / (1 - exp(-max(BEGINNING, self._at - self._began) / MEMORY))
        return max(rate * horizon, since * horizon - slots)
