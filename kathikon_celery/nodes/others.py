"""Finds the nodes that are dead, and returns what they held; and the queues that nobody uses any more, which go.

A node of this machine is dead when its process is gone. A node elsewhere is dead when the lock that its connection held
is free and it does not come back; any node is, when its lease has run out. The last two are believed only by one that
has itself held its lease for long enough without a gap: when the database was away, everybody's lease has run out.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any, Protocol

from kathikon_celery.nodes.machine import is_running, machine
from kathikon_celery.storage import Storage, nodes, prune, topology
from kathikon_celery.storage.errors import is_lost
from kathikon_celery.storage.nodes import Node

logger = logging.getLogger(__name__)

#: Seconds that a node whose lock is free has for coming back.
GRACE = 3.0
#: Seconds between two looks for what dead nodes hold: a claim may be committed just after its node was removed.
ORPHANS = 10.0


class Observer(Protocol):
    """The node that looks at the others: a `kathikon_celery.nodes.own.OwnNode`."""

    id: int

    @property
    def lease(self) -> float:
        """Seconds after which a node that was silent is taken for dead."""

    @property
    def unbroken(self) -> float:
        """Seconds for which the node has held its lease without a gap."""


class Watch:
    """What one node knows of the others.

    Arguments:
        storage: the database.
        presence: the node.
    """

    def __init__(self, storage: Storage, presence: Observer) -> None:
        self.storage = storage
        self.own_node = presence
        self._prune_at = self._orphans_at = monotonic()
        #: Since when a node's lock is free, and the end of its lease then, both in monotonic time.
        self._unlocked: dict[int, tuple[float, float]] = {}
        self._others: list[Node] = []

    def asks(self) -> dict[str, Any]:
        """The parameters of the question ``is_amiss`` (see `storage.outlook`)."""
        known = [self.own_node.id, *(node.id for node in self._others)]
        return {"node": self.own_node.id, "machine": machine(), "known": known}

    def is_calm(self) -> bool:
        """Whether there is nothing to look for, given that nothing is amiss."""
        self._unlocked.clear()
        return all(node.machine != machine() or is_running(node.pid, node.pid_started) for node in self._others)

    def look(self) -> None:
        """Look at all others once."""
        with self.storage.database.read() as connection:
            others = self._others = nodes.others(connection, self.own_node.id)
            suspects = [node for node in others if node.machine != machine()]
            free = {node.id for node in suspects if nodes.is_lock_free(self.storage.database, connection, node.id)}
        for node in others:
            if why := self._is_dead(node, node.id in free):
                self._rescue(node, why)
        if monotonic() >= self._orphans_at:
            self._remove_orphans()
            self._orphans_at = monotonic() + ORPHANS
        topology.delete_unused(self.storage.database)

    def try_to_look(self) -> None:
        """`look`, and delete messages whose time is over every ``kathikon_prune_interval``; errors are only logged."""
        try:
            self.look()
            if monotonic() >= self._prune_at:
                self._prune_at = monotonic() + self.storage.settings.prune_interval
                prune.expired_messages(self.storage.database)
        except Exception as error:
            if not is_lost(error):  # of a lost database the lease's renewal says enough
                logger.exception("Kathikon: the other nodes could not be looked at")

    def _is_dead(self, node: Node, unlocked: bool) -> str | None:
        """Why the node is dead; `None` while it may be alive."""
        if node.machine == machine() and not is_running(node.pid, node.pid_started):
            return "its process is gone"
        if node.lease <= 0 and self.own_node.unbroken >= self.own_node.lease:
            return "its lease has run out"
        if not unlocked:
            self._unlocked.pop(node.id, None)
            return None
        now = monotonic()
        since, until = self._unlocked.setdefault(node.id, (now, now + node.lease))
        if now + node.lease > until + 0.5:  # renewed: it has only lost its connection
            self._unlocked[node.id] = (now, now + node.lease)
        elif now - since >= GRACE and self.own_node.unbroken >= GRACE:
            return "its connection is gone"
        return None

    def _remove_orphans(self) -> None:
        with self.storage.database.read() as connection:
            orphans = nodes.orphans(connection)
        for node_id in orphans:
            if node_id != self.own_node.id:
                nodes.remove(self.storage.database, node_id)

    def _rescue(self, node: Node, why: str) -> None:
        self._unlocked.pop(node.id, None)
        returned = nodes.remove(self.storage.database, node, unless_renewed=why == "its lease has run out")
        if returned is not None:
            level = logging.WARNING if returned else logging.INFO
            logger.log(level, "Kathikon: node %s (%s) is dead, %s; it held %d jobs", node.id, node.name, why, returned)
