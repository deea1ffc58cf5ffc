"""Waiting with a deadline: no test sleeps and hopes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def wait_until(predicate: Callable[[], Value], timeout: float = 60.0, what: str = "", interval: float = 0.02) -> Value:
    """Call ``predicate`` every ``interval`` seconds until it returns a true value, and return that.

    Raises AssertionError, with ``what`` and the last value, after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            name = what or getattr(predicate, "__qualname__", repr(predicate))
            raise AssertionError(f"waited {timeout:g} s in vain for: {name}; last seen: {value!r}")
        time.sleep(interval)
    return value
