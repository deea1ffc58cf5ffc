"""Warns, once for each queue, when a process sends tasks to a queue that no worker consumes."""

from __future__ import annotations

import atexit
import logging
import threading

from kathikon_celery.storage import Storage, nodes, reading

logger = logging.getLogger(__name__)

#: Seconds after the first task to a queue until the look for its workers: they may start together with the process.
GRACE = 3.0

_watches: dict[Storage, _Watch] = {}


def watch(storage: Storage, queue: str) -> None:
    """Look soon, or at the end of the process, whether a worker consumes *queue*; only the first call does so."""
    found = _watches.get(storage) or _watches.setdefault(storage, _Watch(storage))
    if queue not in found.known:
        found.add(queue)


class _Watch:
    """The queues of one storage to which this process sends tasks."""

    def __init__(self, storage: Storage) -> None:
        self.known: set[str] = set()
        self._storage = storage
        self._unchecked: list[str] = []
        self._timer: threading.Timer | None = None
        storage.database.on_close.append(self._forget)

    def add(self, queue: str) -> None:
        self.known.add(queue)
        self._unchecked.append(queue)
        if self._timer is None or not self._timer.is_alive():  # a forked process has no thread of its parent
            self._timer = threading.Timer(GRACE, self.look)
            self._timer.daemon, self._timer.name = True, "kathikon-unconsumed"
            self._timer.start()

    def _forget(self) -> None:
        self.known, self._unchecked = set(), []
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            if timer.is_alive() and timer is not threading.current_thread():
                timer.join(GRACE)

    def look(self) -> None:
        """Warn of the queues that were added since the last look and have no worker."""
        self._timer = None
        queues, self._unchecked = self._unchecked, []
        if not queues:
            return
        try:
            with self._storage.database.read() as connection:
                consumed = nodes.consumed(connection)
                left = nodes.without_consumer(queues, consumed)
                left = [queue for queue in left if reading.is_any_waiting(connection, queue)]
        except Exception as error:  # those who need the database report this
            logger.debug("Kathikon: cannot tell who consumes %s: %s", queues, error)
            return
        if not left:
            return
        names = ", ".join(map(repr, left))
        if consumed:
            logger.warning(
                "Kathikon: this process has sent tasks to a queue that no worker of %r consumes: %s. They wait until"
                " one does: see kathikon_queues and the worker's option -Q",
                self._storage.database, names,
            )  # fmt: skip
        elif self._storage.is_on_default_file:
            logger.warning(
                "Kathikon: this process has sent tasks to the file %s, and no worker consumes there. It is the default:"
                " neither the setting kathikon_database_url nor the environment variable KATHIKON_DATABASE_URL names"
                " a database for this process. Queue: %s",
                self._storage.database.url.database, names,
            )  # fmt: skip


@atexit.register
def _look_at_the_end() -> None:
    for one in list(_watches.values()):
        one.look()
