"""Waiting for a wake-up, from another thread or another process."""

from __future__ import annotations

import selectors
import socket
from contextlib import suppress
from datetime import datetime, timezone

#: First character of a NOTIFY payload: o = outcome JSON, e = ended, key follows, n = progress, key follows.
OUTCOME, ENDED, NEWS = "o", "e", "n"
#: p = a job was published: its ``seq``, a space and its queue's key follow.
PUBLISHED = "p"
#: s = jobs were published at this moment, seconds since 1970 by the database's clock, and are visible only now.
SINCE = "s"


class Wakeup:
    """Sleeps until `notify` is called in this process, or a dialect's subclass hears another process."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._receiver, selectors.EVENT_READ)
        self._notified = False
        #: Whether the last call was to all nodes, not to this one by its name.
        self.called_all = True
        #: The payloads of the calls that had one; the reader empties the list.
        self.named: list[str] = []

    def notify(self) -> None:
        """Wake the sleeper. Any thread may call it, any number of times."""
        if not self._notified:
            self._notified = True
            with suppress(OSError):  # closed
                self._sender.send(b"\0")

    def wait(self, timeout: float) -> bool:
        """Sleep for at most *timeout* seconds; return true when another process called."""
        return self._sleep(timeout)[1]

    def _sleep(self, timeout: float) -> tuple[bool, bool]:
        """Sleep for at most *timeout* seconds; return whether anything ended the sleep, and whether a call did."""
        found = self._selector.select(max(timeout, 0))
        called = False
        for key, _ in found:
            if key.fileobj is self._receiver:
                with suppress(BlockingIOError):
                    self._receiver.recv(4096)
                self._notified = False
            else:
                called = self.called() or called
        return bool(found), called

    def called(self) -> bool:
        """Read the call that another process made; return false when it was not for us."""
        return False

    def calls(self) -> tuple[dict[str, int], datetime | None]:
        """Return what the last calls said, and forget them.

        First queue key -> ``seq`` of a job that was published. Then the earliest moment at which jobs were published
        that are visible only now.
        """
        named, self.named = self.named, []
        jobs = (call[len(PUBLISHED) :].partition(" ") for call in named if call.startswith(PUBLISHED))
        late = [float(call[len(SINCE) :]) for call in named if call.startswith(SINCE)]
        since = datetime.fromtimestamp(min(late), timezone.utc) if late else None
        return {queue: int(seq) for seq, _, queue in jobs}, since

    def close(self) -> None:
        """Stop listening."""
        self._selector.close()
        self._receiver.close()
        self._sender.close()
