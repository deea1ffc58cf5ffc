"""How fast a queue's jobs end, estimated from the last fractions of a second."""

from __future__ import annotations

from math import exp
from time import monotonic

#: Seconds after which a job that has ended counts for about a third (1/e) in the rate.
MEMORY = 0.3
#: Jobs a second: below this rate, the next job that ends is a new beginning.
CALM = 1.0
#: Shortest length of a beginning, in seconds.
BEGINNING = 0.05
#: Jobs a second; above this rate, jobs share transactions.
BUSY = 150.0
#: `BUSY` while the pool has a free slot: higher, so that a caller that sends one task at a time, and waits for each
#: result, is still answered at once.
RUSH = 600.0


class Pace:
    """A rate in which older jobs count for less and less."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = self._began = monotonic()

    def count(self) -> None:
        """One more job has ended."""
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
        """How many jobs will end within *horizon* seconds, beside those that the *slots* hold now.

        Soon after a beginning `rate` is still too low. Then the jobs that have ended since the beginning give a better
        estimate. One job for each slot is subtracted from it, because tasks that took long may end at one time.
        """
        rate = self.rate()
        since = rate / (1 - exp(-max(BEGINNING, self._at - self._began) / MEMORY))
        return max(rate * horizon, since * horizon - slots)
