"""What several viewers look at is read once a second, not once for each of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from time import monotonic
from typing import Any

#: Seconds for which what was read is shown to others.
FRESH = 1.0
#: What was read takes so many times its duration at least until it is read again: a slow look does not become a load.
REST = 10.0
#: How many different looks are kept.
MOST = 200


class _Look:
    def __init__(self) -> None:
        self.lock = Lock()
        self.until = 0.0
        self.value: Any = None


class Shared:
    """Values by key, each read at most once a second. Used by any thread."""

    def __init__(self) -> None:
        self._looks: OrderedDict[Hashable, _Look] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """Return what *read* has returned for *key* within the last second, or call it."""
        with self._lock:
            look = self._looks.setdefault(key, _Look())
            self._looks.move_to_end(key)
            while len(self._looks) > MOST:
                self._looks.popitem(last=False)
        with look.lock:
            if monotonic() >= look.until:
                began = monotonic()
                look.value = read()
                took = monotonic() - began
                look.until = began + max(FRESH, took * REST)
            return look.value

    def forget(self) -> None:
        """Read anew: somebody has acted."""
        with self._lock:
            self._looks.clear()
