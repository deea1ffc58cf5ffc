"""Waiting for a wake-up, from another thread or another process."""

from __future__ import annotations

import selectors
import socket
from contextlib import suppress

#: What a call about a job begins with: its outcome follows, or its id, as it has ended, or there is news of it.
OUTCOME, ENDED, NEWS = "o", "e", "n"
#: What a call about a job that was published begins with: the number of its row follows, a space and its queue's key.
PUBLISHED = "p"


class Wakeup:
    """Sleeps until something happens: `notify` in this process, or what a dialect's subclass listens to."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._receiver, selectors.EVENT_READ)
        self._notified = False
        #: Whether the last call was to all nodes, not to this one by its name.
        self.called_all = True
        #: What the calls named, where they name anything; whoever reads it empties it.
        self.named: list[str] = []

    def notify(self) -> None:
        """Wake the sleeper. Any thread may call it, any number of times."""
        if not self._notified:
            self._notified = True
            with suppress(OSError):  # closed
                self._sender.send(b"\0")

    def wait(self, timeout: float) -> bool:
        """Sleep for at most *timeout* seconds; true when another process called."""
        called = False
        for key, _ in self._selector.select(max(timeout, 0)):
            if key.fileobj is self._receiver:
                with suppress(BlockingIOError):
                    self._receiver.recv(4096)
                self._notified = False
            else:
                called = self.called() or called
        return called

    def called(self) -> bool:
        """Read the call that another process made; false when it was none for us."""
        return False

    def jobs(self) -> dict[str, int]:
        """The rows of the jobs that the last calls were about, by their queues' keys."""
        named, self.named = self.named, []
        calls = (call[len(PUBLISHED) :].partition(" ") for call in named if call.startswith(PUBLISHED))
        return {queue: int(seq) for seq, _, queue in calls}

    def close(self) -> None:
        """Stop listening."""
        self._selector.close()
        self._receiver.close()
        self._sender.close()
