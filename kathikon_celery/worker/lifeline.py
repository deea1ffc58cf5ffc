"""The lifeline takes back the jobs of nodes that are dead.

A node of this machine is dead when its process is gone. A node elsewhere is dead when the lock that its connection held
is free and it does not come back; any node is, when its lease has run out. The last two are believed only by one that
has itself held its lease for long enough without a gap: when the database was away, everybody's lease has run out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from kathikon_celery.presence import Presence, is_running, machine
from kathikon_celery.storage import Storage, nodes
from kathikon_celery.storage.nodes import Node
from kathikon_celery.worker.service import Service

logger = logging.getLogger(__name__)

#: Seconds that a node whose lock is free has for coming back.
GRACE = 3.0


class Lifeline(Service):
    """Looks after the other nodes every second. Every worker has one."""

    def __init__(
        self,
        *,
        storage: Storage,
        interval: float = 1.0,
        presence: Presence | None = None,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(storage=storage, interval=interval)
        #: Tells of the jobs that have ended without a run.
        self.tell = tell
        self.presence = presence or Presence.of(storage)
        #: Since when a node's lock is free, and the end of its lease then, both in monotonic time.
        self._unlocked: dict[int, tuple[float, float]] = {}

    def step(self) -> float:
        with self.storage.database.read() as connection:
            others = nodes.others(connection, self.presence.id)
            suspects = [node for node in others if node.machine != machine()]
            free = {node.id for node in suspects if nodes.is_lock_free(self.storage.database, connection, node.id)}
            orphans = nodes.orphans(connection)
        for node in others:
            if why := self._is_dead(node, node.id in free):
                self._rescue(node, why)
        for node_id in orphans:
            if node_id != self.presence.id:
                nodes.remove(self.storage.database, node_id)
        self.tell()
        return self.interval

    def _is_dead(self, node: Node, unlocked: bool) -> str | None:
        """Why the node is dead; `None` while it may be alive."""
        if node.machine == machine() and not is_running(node.pid, node.pid_started):
            return "its process is gone"
        if node.lease <= 0 and self.presence.unbroken >= self.presence.lease:
            return "its lease has run out"
        if not unlocked:
            self._unlocked.pop(node.id, None)
            return None
        now = monotonic()
        since, until = self._unlocked.setdefault(node.id, (now, now + node.lease))
        if now + node.lease > until + 0.5:  # renewed: it has only lost its connection
            self._unlocked[node.id] = (now, now + node.lease)
        elif now - since >= GRACE and self.presence.unbroken >= GRACE:
            return "its connection is gone"
        return None

    def _rescue(self, node: Node, why: str) -> None:
        self._unlocked.pop(node.id, None)
        returned = nodes.remove(self.storage.database, node, unless_renewed=why == "its lease has run out")
        if returned is not None:
            level = logging.WARNING if returned else logging.INFO
            logger.log(level, "Kathikon: node %s (%s) is dead, %s; it held %d jobs", node.id, node.name, why, returned)
