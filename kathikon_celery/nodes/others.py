"""Finds dead nodes, and gives back the jobs that they held. Deletes unused queues as well.

A node on this machine is dead when its process is gone. A node on another machine is dead when its lock stays free and
its lease is not renewed for `GRACE` seconds. Any node is dead when its lease has run out. The last two count only if
this node has held its own lease for long enough without a gap: after an outage of the database all leases have run out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Protocol

from kathikon_celery.nodes.machine import is_running, machine
from kathikon_celery.storage import Storage, nodes, prune, topology
from kathikon_celery.storage.errors import in_words, is_lost, is_refusal
from kathikon_celery.storage.nodes import Node

logger = logging.getLogger(__name__)

#: Seconds in which a node whose lock is free has to renew its lease.
GRACE = 3.0
#: Seconds between two looks for rows that removed nodes hold: a claim may be committed just after the removal.
ORPHANS = 10.0


class Observer(Protocol):
    """The node that watches the others: a `kathikon_celery.nodes.own.OwnNode`."""

    id: int

    @property
    def lease(self) -> float:
        """Seconds without renewal after which a node is taken for dead."""

    @property
    def unbroken(self) -> float:
        """Seconds for which the node has held its lease without a gap."""


class Watch:
    """What this node knows of the others.

    Arguments:
        storage: the database.
        presence: this node.
    """

    def __init__(self, storage: Storage, presence: Observer) -> None:
        self.storage = storage
        self.own_node = presence
        self._prune_at = self._orphans_at = monotonic()
        #: Node id -> since when its lock is free, and when its lease would end then, both in monotonic time.
        self._unlocked: dict[int, tuple[float, float]] = {}
        self._others: list[Node] = []

    def asks(self) -> dict[str, Any]:
        """Return the parameters of the question ``is_amiss`` (see `storage.idle_query`)."""
        known = [self.own_node.id, *(node.id for node in self._others)]
        return {"node": self.own_node.id, "machine": machine(), "known": known}

    def is_calm(self) -> bool:
        """Whether no `look` is needed, if the database finds nothing amiss."""
        self._unlocked.clear()
        return all(node.machine != machine() or is_running(node.pid, node.pid_started) for node in self._others)

    def look(self) -> None:
        """Look once for dead nodes, rows that removed nodes hold, and unused queues."""
        with self.storage.database.read() as connection:
            others = self._others = nodes.others(connection, self.own_node.id)
            suspects = [node for node in others if node.machine != machine()]
            free = {node.id for node in suspects if nodes.is_lock_free(self.storage.database, connection, node.id)}
        for node in others:
            if why := self._is_dead(node, node.id in free):
                self._try(node.id, partial(self._rescue, node, why))
        if monotonic() >= self._orphans_at:
            self._remove_orphans()
            self._orphans_at = monotonic() + ORPHANS
        topology.delete_unused(self.storage.database)

    def try_to_look(self) -> None:
        """`look`, and delete expired messages every ``kathikon_prune_interval`` seconds; log errors."""
        try:
            self.look()
            if monotonic() >= self._prune_at:
                self._prune_at = monotonic() + self.storage.settings.prune_interval
                prune.expired_messages(self.storage.database)
        except Exception as error:
            if not is_lost(error):  # the renewal of the lease logs a lost database
                logger.exception("Kathikon: the other nodes could not be looked at")

    def _is_dead(self, node: Node, unlocked: bool) -> str | None:
        """Return why the node is dead; `None` while it may be alive."""
        if node.machine == machine() and not is_running(node.pid, node.pid_started):
            return "its process is gone"
        if node.lease <= 0 and self.own_node.unbroken >= self.own_node.lease:
            return "its lease has run out"
        if not unlocked:
            self._unlocked.pop(node.id, None)
            return None
        now = monotonic()
        since, until = self._unlocked.setdefault(node.id, (now, now + node.lease))
        if now + node.lease > until + 0.5:  # renewed: the node has only lost its connection
            self._unlocked[node.id] = (now, now + node.lease)
        elif now - since >= GRACE and self.own_node.unbroken >= GRACE:
            return "its connection is gone"
        return None

    def _remove_orphans(self) -> None:
        with self.storage.database.read() as connection:
            orphans = nodes.orphans(connection)
        for node_id in orphans:
            if node_id != self.own_node.id:
                self._try(node_id, partial(self.storage.backend.remove_node, node_id))

    def _try(self, node_id: int, rescue: Callable[[], Any]) -> None:
        """Call *rescue*; log its error, which may come from a corrupt row, and go on with the other nodes."""
        try:
            rescue()
        except Exception as error:
            if not is_refusal(error):
                raise
            logger.error("Kathikon: what node %s held could not be given back: %s", node_id, in_words(error))

    def _rescue(self, node: Node, why: str) -> None:
        self._unlocked.pop(node.id, None)
        returned = self.storage.backend.remove_node(node.id, unless_renewed=why == "its lease has run out")
        if returned is not None:
            level = logging.WARNING if returned else logging.INFO
            logger.log(level, "Kathikon: node %s (%s) is dead, %s; it held %d jobs", node.id, node.name, why, returned)
