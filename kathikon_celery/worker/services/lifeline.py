"""The lifeline returns the jobs of dead nodes, and writes the end of jobs that ended without a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kathikon_celery.nodes.others import Watch
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.storage import Storage
from kathikon_celery.storage.idle_query import Questions
from kathikon_celery.worker.services.service import Service


class Lifeline(Service):
    """Checks the other nodes every second. Every worker has one.

    >>> Lifeline(storage=storage).step()     # returns the jobs of dead nodes

    Arguments:
        storage: the database.
        interval: seconds between two looks.
        presence: this process as a node; default: that of *storage*.
        tell: writes what follows the jobs that have ended without a run, such as their errbacks.
    """

    def __init__(
        self,
        *,
        storage: Storage,
        interval: float = 1.0,
        presence: OwnNode | None = None,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(storage=storage, interval=interval)
        #: Writes what follows the jobs that have ended without a run, such as their errbacks.
        self.tell = tell
        self.own_node = presence or OwnNode.of(storage)
        self._watch = Watch(storage, self.own_node)

    def start(self) -> None:
        self.own_node.is_watched = True
        super().start()

    def stop(self) -> None:
        super().stop()
        self.own_node.is_watched = False

    def questions(self) -> Questions:
        return {"is_amiss": self._watch.asks(), "renewals": {}}

    def spare(self, answers: Mapping[str, Any]) -> float:
        return self.interval if self._watch.is_calm(answers["is_amiss"], answers["renewals"]) else 0.0

    def step(self) -> float:
        self._watch.look()
        self.tell()
        return self.interval
