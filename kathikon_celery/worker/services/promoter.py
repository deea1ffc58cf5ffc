"""The promoter makes due jobs available, to the millisecond and all together, so that priority decides among them.

It also lets jobs out of the lines of limits, when a rate has a token again, or when a lost process has not done so.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic, sleep
from typing import Any

from kathikon_celery.storage.idle_query import Questions
from kathikon_celery.storage.limits import SWEEP_INTERVAL
from kathikon_celery.storage.promote import CHUNK
from kathikon_celery.worker.services.service import Service

#: Shortest time between two steps, in seconds, when one call or one promotion follows another.
GAP = 0.005
#: Shortest pause before a due job, in seconds: the clock of a database may count in milliseconds.
TICK = 0.001


class Promoter(Service):
    """Sleeps until the next job is due, at most ``kathikon_scheduler_interval`` seconds. Every worker has one.

    >>> Promoter(storage=storage, interval=1.0).step()     # makes due jobs available
    """

    heeds_calls = True
    _last, _rests = 0.0, False
    _swept, _line = 0.0, ""

    def questions(self) -> Questions:
        return {"next_due": {}, "next_offer": {}}

    def spare(self, answers: Mapping[str, Any]) -> float:
        due: list[float] = [one for one in answers.values() if one is not None]
        return min([self.interval, *due])

    def step(self) -> float:
        earliest = self._last + GAP
        if not self._rests:  # but not later than the next job is due
            earliest = min(earliest, self._due)
        too_early = earliest - monotonic()
        if too_early > 0:
            sleep(too_early)
        offered_in = self._offer()
        due = self.storage.next_due()
        promoted = 0
        if due is not None and due <= 0:
            promoted = self.storage.promote_scheduled()
            if promoted == CHUNK:
                return 0.0
            due = self.storage.next_due()
        # If a due job was not promoted, it is promoted in a moment; if it is overdue, another process has locked it.
        self._rests = promoted > 0 or (due is not None and due < -GAP)
        self._last = monotonic()
        return min(self.interval, offered_in, self.interval if due is None else max(due, TICK))

    def _offer(self) -> float:
        """Let jobs out of the lines of limits; return the seconds until the next time."""
        ahead = self.storage.next_offer()
        if ahead is None:
            return self.interval
        if ahead <= 0:
            self.storage.offer_due()
            ahead = self.storage.next_offer()
        if monotonic() >= self._swept + SWEEP_INTERVAL:
            self._line = self.storage.sweep(self._line)
            self._swept = monotonic()
        return self.interval if ahead is None else max(ahead, TICK)
