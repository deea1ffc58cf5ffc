"""The pruner deletes jobs that ended long ago, and other rows that no process needs any more."""

from __future__ import annotations

from collections.abc import Mapping
from random import uniform
from typing import Any

from kathikon_celery.storage import chords, prune, result_listeners
from kathikon_celery.storage.idle_query import Questions
from kathikon_celery.worker.services.service import Service

#: Seconds for which a chord is kept at least, although none of its parts waits or runs: a part may not be sent yet, as
#: the last task of a chain is not.
LONGEST_CHORD = 30 * 86400.0


class Pruner(Service):
    """Deletes in chunks every ``kathikon_prune_interval`` seconds. Every worker has one, each at its own times."""

    def questions(self) -> Questions:
        retention = self.storage.settings.retention_period
        kept = retention["completed"]
        longest_chord = None if kept is None else max(kept, LONGEST_CHORD)
        return {
            "is_anything_old": prune.ages(retention, group=kept, chord=longest_chord, wait=result_listeners.LONGEST)
        }

    def spare(self, answers: Mapping[str, Any]) -> float:
        return 0.0 if answers["is_anything_old"] else self._pause()

    def step(self) -> float:
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
        return self._pause()

    def _pause(self) -> float:
        return self.interval * uniform(0.8, 1.2)
