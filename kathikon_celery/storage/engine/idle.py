"""Connections kept for their next use. A thread closes those that were not used for a time."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, suppress
from time import monotonic
from weakref import finalize, ref

from sqlalchemy import Connection

#: Seconds for which a connection is kept.
LONGEST = 60.0

#: A connection, and the monotonic time since which it is kept.
Kept = tuple[float, Connection]


def drop(connection: Connection) -> None:
    """Close *connection*, and do not leave it open in SQLAlchemy's pool."""
    if not connection.invalidated:
        connection.invalidate()
    connection.close()


class Idle:
    """The connections that a process keeps, in two kinds: those that publish, and others.

    Arguments:
        size: how many of each kind are kept.
        gate: entered while connections are closed.
    """

    def __init__(self, size: int, gate: AbstractContextManager[None]) -> None:
        self._size, self._gate = size, gate
        self._kept: dict[bool, list[Kept]] = {True: [], False: []}
        self._lock = threading.Lock()
        self._closer: threading.Thread | None = None
        self._end = threading.Event()

    def take(self, durable: bool) -> Connection | None:
        """Return the connection that was used last, if one is kept. Any thread may call it."""
        kept = self._kept[durable]
        while kept:
            try:
                since, connection = kept.pop()
            except IndexError:  # another thread was quicker
                break
            if monotonic() - since < LONGEST:
                return connection
            drop(connection)
        return None

    def keep(self, durable: bool, connection: Connection) -> None:
        """Keep *connection*, or close it if there are enough."""
        kept = self._kept[durable]
        if len(kept) >= self._size:
            drop(connection)
            return
        kept.append((monotonic(), connection))
        if self._closer is None:
            self._start()

    def drop_all(self) -> None:
        """Close all connections."""
        for kept in self._kept.values():
            while kept:
                with suppress(IndexError):
                    drop(kept.pop()[1])

    def close(self) -> None:
        """Close all connections, and end the thread."""
        self.drop_all()
        self.stop()

    def stop(self) -> None:
        """End the thread; the next connection that is kept starts it again."""
        with self._lock:
            closer, self._closer = self._closer, None
            self._end.set()
        if closer is not None and closer is not threading.current_thread():
            closer.join(timeout=1)

    def _start(self) -> None:
        with self._lock:
            if self._closer is None:
                self._end = threading.Event()
                finalize(self, self._end.set)
                arguments = (ref(self), self._end)
                self._closer = threading.Thread(target=_close_unused, args=arguments, name="kathikon-idle", daemon=True)
                self._closer.start()

    def _close_unused(self) -> float | None:
        """Close what was not used for `LONGEST` seconds; return the seconds until the next look, `None` to end."""
        with self._gate:
            for kept in self._kept.values():
                with suppress(IndexError):  # used meanwhile
                    while monotonic() - kept[0][0] >= LONGEST:
                        drop(kept.pop(0)[1])
        with self._lock:
            oldest = [since for kept in self._kept.values() for since, _ in kept[:1]]
            if not oldest:
                self._closer = None
                return None
        return max(0.01, min(oldest) + LONGEST - monotonic())


def _close_unused(idle: ref[Idle], end: threading.Event) -> None:
    """The thread. It does not keep *idle* alive."""
    pause: float | None = LONGEST
    while not end.wait(pause) and (one := idle()) is not None:
        pause = one._close_unused()
        del one
        if pause is None:
            return
