"""The pruner deletes jobs that ended long ago, and other rows that no process needs any more."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from random import uniform
from time import monotonic
from typing import Any

from kathikon_celery.storage import chords, prune, result_listeners
from kathikon_celery.storage.idle_query import Questions
from kathikon_celery.worker.services.service import Service

logger = logging.getLogger(__name__)

#: Seconds for which a chord is kept at least, although none of its parts waits or runs: a part may not be sent yet, as
#: the last task of a chain is not.
LONGEST_CHORD = 30 * 86400.0


#: If the database's clock jumps ahead by more than `JUMP` seconds, nothing is deleted for `REST` seconds: by a wrong
#: clock everything is old, and the clock may be set right meanwhile.
JUMP, REST = 60.0, 600.0
#: Seconds between two looks at the slots and keys of limits, in a worker that has run jobs with limits.
LIMITS_INTERVAL = 600.0


class Pruner(Service):
    """Deletes in chunks every ``kathikon_prune_interval`` seconds. Every worker has one, each at its own times.

    >>> Pruner(storage=storage, interval=60.0).step()     # deletes jobs that ended long ago
    """

    #: The database's clock less the monotonic clock.
    _ahead: float | None = None
    _rests_until = 0.0
    #: When the slots and keys of limits are looked at next.
    _limits_at = 0.0

    def questions(self) -> Questions:
        retention = self.storage.settings.retention_period
        kept = retention["completed"]
        longest_chord = None if kept is None else max(kept, LONGEST_CHORD)
        return {
            "is_anything_old": prune.ages(retention, group=kept, chord=longest_chord, wait=result_listeners.LONGEST)
        }

    def spare(self, answers: Mapping[str, Any]) -> float:
        return 0.0 if answers["is_anything_old"] or self._is_time_for_limits() else self._pause()

    def step(self) -> float:
        if (rest := self._rest()) > 0:
            return min(rest, self._pause())
        self.storage.discard_expired()
        while self.storage.prune() and not self._stopping:
            pass
        database = self.storage.database
        prune.expired_messages(database)
        result_listeners.prune(database)
        kept = self.storage.settings.retention_period["completed"]
        if kept is not None:
            prune.old_groups(database, kept)
            chords.prune(database, max(kept, LONGEST_CHORD))
        if self._is_time_for_limits():
            self._limits_at = monotonic() + LIMITS_INTERVAL * uniform(0.8, 1.2)
            database.has_limits_to_prune = False  # before: a claim meanwhile sets it again
            if self.storage.prune_limits():
                database.has_limits_to_prune = True
        return self._pause()

    def _is_time_for_limits(self) -> bool:
        return self.storage.database.has_limits_to_prune and monotonic() >= self._limits_at

    def _rest(self) -> float:
        """Seconds for which nothing may be deleted, since the database's clock has jumped ahead."""
        with self.storage.database.read() as connection:
            ahead = prune.clock(connection) - monotonic()
        before, self._ahead = self._ahead if self._ahead is not None else ahead, ahead
        if ahead > before + JUMP:
            logger.warning(
                "Kathikon: the database's clock has jumped ahead by %.0f s; nothing is deleted for %g s",
                ahead - before, REST,
            )  # fmt: skip
            self._rests_until = monotonic() + REST
        elif ahead < before - JUMP:
            self._rests_until = 0.0
        return self._rests_until - monotonic()

    def _pause(self) -> float:
        return self.interval * uniform(0.8, 1.2)
