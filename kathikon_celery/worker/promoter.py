"""The promoter makes due jobs available, to the millisecond and all together, so that priority decides among them."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic, sleep
from typing import Any

from kathikon_celery.storage.outlook import Questions
from kathikon_celery.storage.promote import CHUNK
from kathikon_celery.worker.service import Service

#: Seconds between two looks at the table when one call after another says that a job is due soon.
GAP = 0.005
#: The clock of a database may count in milliseconds: a job that is due within one is waited for.
TICK = 0.001


class Promoter(Service):
    """Sleeps until the next job is due, at most ``kathikon_scheduler_interval`` seconds. Every worker has one."""

    _last, _rests = 0.0, False

    def questions(self) -> Questions:
        return {"next_due": {}}

    def spare(self, answers: Mapping[str, Any]) -> float:
        due: float | None = answers["next_due"]
        return self.interval if due is None else min(self.interval, due)

    def step(self) -> float:
        too_early = (self._last + GAP if self._rests else min(self._last + GAP, self._due)) - monotonic()
        if too_early > 0:
            sleep(too_early)
        due = self.storage.next_due()
        promoted = 0
        if due is not None and due <= 0:
            promoted = self.storage.promote_scheduled()
            if promoted == CHUNK:
                return 0.0
            due = self.storage.next_due()
        # Not if this was a moment too early; but somebody else may hold what is overdue.
        self._rests = promoted > 0 or (due is not None and due < -GAP)
        self._last = monotonic()
        return self.interval if due is None else min(self.interval, max(due, TICK))
