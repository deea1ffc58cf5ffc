"""How fast a queue's jobs are finished, as seen in the last moments."""

from __future__ import annotations

from math import exp
from time import monotonic

#: Seconds after which what happened counts for a third.
MEMORY = 0.3


class Pace:
    """A rate that forgets."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = monotonic()

    def count(self) -> None:
        """One more is finished."""
        self._rate = self.rate() + 1 / MEMORY

    def rate(self) -> float:
        """Jobs a second."""
        now = monotonic()
        self._rate *= exp((self._at - now) / MEMORY)
        self._at = now
        return self._rate
