"""The arithmetic of a rate: never more than so many starts in any window of its length, and nearly as many in each.

This is the generic cell rate algorithm (ITU-T I.371): one moment says how many tokens there are. All times are seconds,
moments are seconds since 1970.
"""

from __future__ import annotations

from math import floor
from typing import NamedTuple

#: How late a token may be taken without being lost: as a part of the window, and at most so many seconds.
SLACK, MOST_SLACK = 0.02, 0.2
#: How unevenly starts may follow their tokens, in the same units.
JITTER, MOST_JITTER = 0.01, 0.05


class Rate(NamedTuple):
    """At most *number* tokens in any window of *per* seconds, of which *burst* at once.

    A window may begin with a burst. So that it has no more than *number* tokens, the others come more slowly than at
    the rate: with a burst of 1 at 97 % of the rate or more, with a larger one at less.
    """

    number: int
    per: float
    burst: int = 1

    @property
    def slack(self) -> float:
        return min(SLACK * self.per, MOST_SLACK)

    @property
    def step(self) -> float:
        """Seconds between two tokens."""
        window = self.per + self.slack + min(JITTER * self.per, MOST_JITTER)
        return window / (self.number - self.burst + 1)

    def _from(self, state: float | None, at: float) -> float:
        latest = at - self.slack
        return latest if state is None else max(state, latest)

    def tokens(self, state: float | None, at: float) -> int:
        """Return how many tokens there are *at* a moment. *state*: as the last `taken` returned it."""
        return max(0, floor((at - self._from(state, at)) / self.step + self.burst + 1e-9))

    def taken(self, state: float | None, at: float, number: int) -> float:
        """Return the state after *number* tokens were taken *at* a moment."""
        return self._from(state, at) + number * self.step

    def next_at(self, state: float | None, at: float, number: int = 1) -> float:
        """Return the moment at which there are *number* tokens."""
        return max(at, self._from(state, at) + (min(number, self.burst) - self.burst) * self.step)
