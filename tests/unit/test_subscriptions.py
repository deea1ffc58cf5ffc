"""What may be claimed and handed out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kathikon_celery.consume.pool import NoPool
from kathikon_celery.consume.subscriptions import Subscription, Subscriptions


class Slots(NoPool):
    """A pool of so many slots."""

    def __init__(self, number: int) -> None:
        self.number = number

    def slots(self) -> int:
        return self.number


@pytest.mark.parametrize(("slots", "may"), [(-1, False), (0, False), (1, True)])
def test_without_a_slot_there_is_nothing_to_claim_or_to_hand_out(slots: int, may: bool) -> None:
    """All slots are those of tasks that run for a connection that was lost."""
    subscriptions = Subscriptions(horizon=0.05)
    subscriptions.pool = Slots(slots)
    one = Subscription("default", no_ack=False, deliver=print, prefetch=lambda: 4)
    subscriptions.add(one)
    assert bool(subscriptions.wanted()) == may
    waiting: Any = SimpleNamespace(is_job=True)
    one.waiting.append(waiting)
    assert subscriptions.may_hand_out(one) == may
