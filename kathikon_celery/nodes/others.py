"""Finds dead nodes, and gives back the jobs that they held. Deletes unused queues as well.

A node on this machine is dead when its process is gone. A node on another machine is dead when its lock stays free and
its lease is not renewed for `GRACE` seconds. Any node is dead when it does not renew its lease for its length.

No wall clock decides: the database's clock may be set, and machines sleep. This node notes how long it has seen a lease
unchanged, by its own monotonic clock. It counts only the time in which it looked again and again, and begins anew when
a look fails: after an outage of the database no lease was renewed, and this proves nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
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
#: Seconds between two looks of a node, mostly.
LOOK = 1.0
#: The highest value of ``kathikon_lease``, in seconds. If a lease lasts for longer, the database's clock was set back.
LONGEST_LEASE = 3600.0


class Observer(Protocol):
    """The node that watches the others: a `kathikon_celery.nodes.own.OwnNode`."""

    @property
    def id(self) -> int:
        """The number of this node."""

    @property
    def lease(self) -> float:
        """Seconds without renewal after which a node is taken for dead."""


@dataclass(slots=True)
class _Sight:
    """How another node was last seen.

    Arguments:
        renewal: see `Node.renewal`.
        lease: length of the node's lease in seconds, as far as we know.
        is_unlocked: whether the node's lock was free.
        unchanged: seconds for which we have seen no renewal.
        unlocked: seconds for which it has been free.
    """

    renewal: str
    lease: float
    is_unlocked: bool
    unchanged: float = 0.0
    unlocked: float = 0.0


class Watch:
    """What this node knows of the others.

    Arguments:
        storage: the database.
        presence: this node.
    """

    def __init__(self, storage: Storage, presence: Observer) -> None:
        self.storage = storage
        self.own_node = presence
        self._prune_at = self._orphans_at = self._looked_at = monotonic()
        self._seen: dict[int, _Sight] = {}
        self._others: list[Node] = []

    def asks(self) -> dict[str, Any]:
        """Return the parameters of the question ``is_amiss`` (see `storage.idle_query`)."""
        return {"machine": machine()}

    def is_calm(self, is_amiss: bool, renewals: str | None) -> bool:
        """Whether no `look` is needed, given the answers to the questions ``is_amiss`` and ``renewals``."""
        lived, found = self._lived(), nodes.renewals_of(renewals)
        for node in self._others:
            if (renewal := found.get(node.id)) is not None:
                self._see(node.id, renewal, lived, None if is_amiss else False)
        if is_amiss or found.keys() - {self.own_node.id} != self._seen.keys():
            return False
        if any(one.unchanged >= one.lease for one in self._seen.values()):
            return False
        return all(node.machine != machine() or is_running(node.pid, node.pid_started) for node in self._others)

    def look(self) -> None:
        """Look once for dead nodes, rows that removed nodes hold, and unused queues."""
        lived = self._lived()
        try:
            with self.storage.database.read() as connection:
                others = self._others = nodes.others(connection, self.own_node.id)
                suspects = [node for node in others if node.machine != machine()]
                free = {node.id for node in suspects if nodes.is_lock_free(self.storage.database, connection, node.id)}
        except BaseException:
            self._seen.clear()
            raise
        self._looked_at = monotonic()  # the statements may have waited, and such a time proves nothing
        for node in others:
            if why := self._is_dead(node, lived, node.id in free):
                self._try(node.id, partial(self._rescue, node, why))
        for gone in self._seen.keys() - {node.id for node in others}:
            del self._seen[gone]
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

    def _lived(self) -> float:
        """Seconds since the last look. A longer pause, as of a machine that slept, counts as a short one."""
        last, self._looked_at = self._looked_at, monotonic()
        return min(self._looked_at - last, max(LOOK, self.own_node.lease / 4))

    def _see(self, node_id: int, renewal: str, lived: float, is_unlocked: bool | None, lease: float = 0.0) -> _Sight:
        """Note a node, seen *lived* seconds after the last look.

        Arguments:
            is_unlocked: whether its lock is free; `None`: not known.
            lease: seconds left of its lease by the database's clock.
        """
        seen = self._seen.get(node_id)
        if seen is None or seen.renewal != renewal:
            known = seen.lease if seen is not None else self.own_node.lease
            longest = max(known, lease) if lease <= LONGEST_LEASE else known
            seen = self._seen[node_id] = _Sight(renewal, longest, bool(is_unlocked))
            return seen
        if is_unlocked is None:
            is_unlocked = seen.is_unlocked
        seen.unchanged += lived
        seen.unlocked = seen.unlocked + lived if seen.is_unlocked and is_unlocked else 0.0
        seen.is_unlocked = is_unlocked
        return seen

    def _is_dead(self, node: Node, lived: float, is_unlocked: bool) -> str | None:
        """Return why the node is dead; `None` while it may be alive."""
        seen = self._see(node.id, node.renewal, lived, is_unlocked, node.lease)
        if node.machine == machine() and not is_running(node.pid, node.pid_started):
            return "its process is gone"
        if seen.unchanged >= seen.lease:
            return "its lease has run out"
        return "its connection is gone" if seen.unlocked >= GRACE else None

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
        renewal = None if why == "its process is gone" else node.renewal
        returned = self.storage.backend.remove_node(node.id, renewal)
        if returned is not None:
            level = logging.WARNING if returned else logging.INFO
            logger.log(level, "Kathikon: node %s (%s) is dead, %s; it held %d jobs", node.id, node.name, why, returned)
