"""Forks: who is told of them, and the gate that keeps connections closed meanwhile."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Gate:
    """Counts the uses of the database, and can be shut until there are none."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._users = 0
        self._shut = 0  # how often: two threads may fork at once
        self._mine = threading.local()

    def __enter__(self) -> None:
        """Use the database; waits while the gate is shut. May be nested in one thread."""
        depth: int = getattr(self._mine, "depth", 0)
        with self._lock:
            while self._shut and not depth:
                self._changed.wait()
            self._users += 1
        self._mine.depth = depth + 1

    def __exit__(self, *exc_info: object) -> None:
        self._mine.depth -= 1
        with self._lock:
            self._users -= 1
            if self._shut:
                self._changed.notify_all()

    def shut(self) -> None:
        """Wait until all other threads have left, and let none in."""
        mine: int = getattr(self._mine, "depth", 0)
        with self._changed:
            self._shut += 1
            while self._users > mine:
                self._changed.wait()

    def open(self) -> None:
        """Undo one `shut`."""
        with self._changed:
            self._shut = max(0, self._shut - 1)
            self._changed.notify_all()


class Watcher(Protocol):
    """What is told before and after each fork of this process."""

    def before_fork(self) -> None:
        """Called in the thread that forks."""

    def after_fork_in_parent(self) -> None:
        """Called in the thread that has forked."""

    def after_fork_in_child(self) -> None:
        """Called in the new process, which has only the thread that has forked."""


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


def watch(watcher: Watcher) -> None:
    """Tell *watcher* of forks as long as it exists."""
    _watchers.add(watcher)


def _tell(of: str) -> None:
    for watcher in list(_watchers):
        getattr(watcher, of)()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _tell("before_fork"),
        after_in_parent=lambda: _tell("after_fork_in_parent"),
        after_in_child=lambda: _tell("after_fork_in_child"),
    )
