"""This process as a node of a database: its row, its lease, and the lock that becomes free at its death."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import threading
from collections.abc import Callable
from contextlib import suppress
from math import inf
from time import monotonic
from typing import TypeVar

from kathikon_celery.job import Hold
from kathikon_celery.nodes.machine import machine, start_of
from kathikon_celery.nodes.others import LOOK, Watch
from kathikon_celery.storage import Storage, nodes
from kathikon_celery.storage.errors import in_words, is_lost

T = TypeVar("T")

logger = logging.getLogger(__name__)


#: The row of a node that is not registered.
_NONE = nodes.Registered(0, "", 0)

_all: dict[tuple[int, Storage], OwnNode] = {}
_all_lock = threading.Lock()


class OwnNode:
    """A node: registered when this process first consumes, renewed by a thread of its own, removed at the end.

    Arguments:
        storage: the database.
        name: shown in logs; a worker's node name.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage = storage
        self.name = name
        self.row = _NONE
        #: Called with the old and the new id when this node had to register again.
        self.on_reborn: list[Callable[[int, int], None]] = []
        #: For each consumer of this process a function that returns the claims it knows of. A claim that none knows of
        #: may be given back, so a consumer holds the lock `claiming` while it claims or reports.
        self.holds: list[Callable[[], set[Hold]]] = []
        self.claiming = threading.Lock()
        #: For each consumer of this process a function that returns the queues whose jobs it runs.
        self.consumes: list[Callable[[], list[str]]] = []
        #: Whether a worker's lifeline and pruner run in this process. Otherwise the lease's thread watches the others,
        #: so that plain kombu programs need no worker beside them.
        self.is_watched = False
        self._users = 0
        self._registering = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._registered = self._renewed = 0.0
        self._is_lost = False  # a renewal has found no row of ours
        self._told: tuple[int, list[str]] = (0, [])  # the id and the queues that were last written
        self._is_locked = False

    def _replaced(self) -> None:
        """The database was replaced: another node may get our id, so the lease's thread registers a new one."""
        self.row, self._is_lost = _NONE, True

    @classmethod
    def of(cls, storage: Storage) -> OwnNode:
        """Return the only `OwnNode` of this process on *storage*."""
        with _all_lock:
            return _all.setdefault((os.getpid(), storage), cls(storage, f"{os.getpid()}@{platform.node()}"))

    @property
    def id(self) -> int:
        """The number of this node; 0: it is not registered."""
        return self.row.id

    @property
    def lease(self) -> float:
        """Seconds without renewal after which a node is taken for dead."""
        return self.storage.settings.lease

    def enter(self) -> None:
        """Register the node, or count one more user of it. Raises the database's error when that is away."""
        if self._users and not self.id:  # the database was replaced: what is declared now must be this node's
            self._register_again(0)
        with _all_lock:
            if not self._users:
                if self._replaced not in self.storage.database.on_replaced:
                    self.storage.database.on_replaced.append(self._replaced)
                self._register()
                self._stopped.clear()
                self._thread = threading.Thread(target=self._run, name="kathikon-lease", daemon=True)
                self._thread.start()
            self._users += 1

    def leave(self) -> None:
        """Count one user less; the last one removes the node and gives back what it held."""
        with _all_lock:
            self._users -= 1
            if self._users:
                return
            self._stopped.set()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
        if self.id:
            with suppress(Exception):  # other nodes give it back when the lease has run out
                self.storage.backend.remove_node(self.id)

    @staticmethod
    def leave_all() -> None:
        """Remove this process's nodes at its end, so that what a program left unclosed is given back at once."""
        for (pid, _), presence in list(_all.items()):
            if pid == os.getpid() and presence._users:
                presence._users = 1
                presence.leave()

    def is_due(self, within: float = 0.0) -> bool:
        """Whether the lease is to be renewed in the next *within* seconds."""
        return self._is_lost or monotonic() + within >= self._renewed + self._renewal

    @property
    def _renewal(self) -> float:
        """Seconds between two renewals: less while no lock shows the other nodes that this one is alive."""
        often = inf if self._is_locked else self.storage.database.dialect.renewal_without_lock
        return min(self.lease / 4, often)

    def renew_by(self, statement: Callable[[nodes.Registered, float], T | None]) -> T | None:
        """Renew the lease by *statement*(this node's row, lease in seconds), and return its answer.

        `None`: the node was taken for dead. The lease's thread then registers a new one.
        """
        now, row = monotonic(), self.row
        answer = statement(row, self.lease)
        if self.row is row:  # else another thread has registered a new one, of which the answer says nothing
            self._is_lost = answer is None
            if answer is not None:
                self._renewed = now
        return answer

    def _register(self) -> None:
        pid = os.getpid()
        self.row = nodes.register(self.storage.database, self.name, machine(), pid, start_of(pid) or 0.0, self.lease)
        self._registered = self._renewed = monotonic()
        self._is_lost = False
        if advice := self.storage.database.dialect.advice:
            logger.warning("Kathikon: %s", advice)

    def _run(self) -> None:
        holder, watch = nodes.Holder(self.storage.database), Watch(self.storage, self)
        complained = False
        try:
            while not self._stopped.is_set():
                try:
                    if complained or self.is_due():
                        self._renew()
                    holder.hold(self.id)
                    self._tell_queues()
                    self._is_locked = holder.is_held
                    complained = False
                except Exception as error:
                    holder.drop()
                    self._is_locked = False
                    if not is_lost(error):
                        logger.exception("Kathikon: the lease could not be renewed")
                    elif not complained:
                        logger.warning("Kathikon: the lease could not be renewed, trying again: %s", in_words(error))
                        complained = True
                    self._stopped.wait(min(0.5, self.lease / 8))
                else:
                    self._stopped.wait(min(max(0.0, self._renewed + self._renewal - monotonic()), LOOK))
                    if not self.is_watched and not self._stopped.is_set():
                        watch.try_to_look()
        finally:
            holder.drop()

    def _tell_queues(self) -> None:
        """Write the queues of this node if they have changed, but not while its consumers still begin one by one."""
        told = self.id, sorted({name for names in list(self.consumes) for name in names()})
        if told != self._told and monotonic() >= self._registered + LOOK / 2:
            nodes.consume(self.storage.database, *told)
            self._told = told

    def _renew(self) -> None:
        database, own = self.storage.database, self.row
        if self.renew_by(lambda row, lease: nodes.renew(database, row, lease) or None):
            return
        if own.id:
            database.check_tables()
        self._register_again(own.id)

    def _register_again(self, old: int) -> None:
        """Register this process, which was the node *old*, unless another thread has done so meanwhile."""
        with self._registering:
            if self.id != old:
                return
            self._register()
        if old:
            logger.warning(
                "Kathikon: node %s was silent for longer than its lease of %g s and was taken for dead; its jobs were"
                " given to others, what it still does with them changes nothing. It goes on as node %s",
                old, self.lease, self.id,
            )  # fmt: skip
        for callback in list(self.on_reborn):
            callback(old, self.id)


atexit.register(OwnNode.leave_all)
