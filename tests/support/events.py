"""Events of workers and tasks, as a monitor receives them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from celery import Celery

from tests.support.waiting import wait_until


class Events:
    """The events since `listening` began."""

    def __init__(self, connection: Any, seen: list[dict[str, Any]]) -> None:
        self.seen = seen
        self._connection = connection

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds so far, in the order in which they came."""
        with suppress(TimeoutError):
            while True:
                self._connection.drain_events(timeout=0.02)
        return [event for event in self.seen if event["type"] in kinds]

    def wait(self, *kinds: str, number: int = 1, timeout: float = 60.0) -> list[dict[str, Any]]:
        """The events of these kinds, as soon as there are *number* of them."""
        what = f"{number} × {' or '.join(kinds)}"
        try:
            return wait_until(lambda: found if len(found := self.of(*kinds)) >= number else [], timeout, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; came: {[event['type'] for event in self.seen]}") from None


@contextmanager
def listening(app: Celery) -> Iterator[Events]:
    """Receive all events while the context lasts."""
    with app.connection_for_read() as connection:
        seen: list[dict[str, Any]] = []
        receiver = app.events.Receiver(connection, handlers={"*": seen.append})
        with receiver.consumer_context(wakeup=False) as (own_connection, _, _):
            yield Events(own_connection, seen)
