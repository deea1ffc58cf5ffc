"""The queues that one connection consumes, and how many of their jobs may be claimed and handed out now."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from kathikon_celery.consume.delivery import Delivery
from kathikon_celery.consume.pace import Pace
from kathikon_celery.consume.pool import NoPool, Pool
from kathikon_celery.storage.names import key
from kathikon_celery.storage.pauses import Paused
from kathikon_celery.storage.scan_start import ScanStart

NOTHING = Paused()
#: Most deliveries that a consumer without a prefetch limit has in hand.
UNLIMITED = 200
#: Deliveries that are handed out together, once the limit allows so many more.
HANDFUL = 8


@dataclass(slots=True)
class Subscription:
    """A queue that is consumed.

    Threads: `waiting` and `in_hand` change under the lock of the `Subscriptions`. The consumer's thread alone writes
    `allowed`, `are_jobs` and `refill`; the intake's thread alone uses `front`. Any thread that ends a delivery counts
    it in `pace`, under the lock; the intake's thread reads `pace` without it. So a count may be lost; the rate is an
    estimate, and forgets this within a second.
    """

    queue: str
    no_ack: bool
    deliver: Callable[[Delivery], None]
    #: How many deliveries its channel may have in hand; 0 is no limit.
    prefetch: Callable[[], int]
    #: How many of its jobs may be in hand at once; `None` is no limit.
    concurrency: int | None = None
    pace: Pace = field(default_factory=Pace)
    front: ScanStart = field(default_factory=ScanStart)
    waiting: deque[Delivery] = field(default_factory=deque)
    in_hand: int = 0
    #: How many of those in hand need no slot (see `Delivery.is_kept`).
    kept: int = 0
    #: How many more may be handed out before `Subscriptions.may_hand_out` must compute that again.
    allowed: int = 0
    #: Whether `allowed` is for jobs, which need slots, or for messages.
    are_jobs: bool = True
    #: The next deliveries are handed out when at most so many are in hand: several at once cost less.
    refill: int = UNLIMITED

    @property
    def outstanding(self) -> int:
        return self.in_hand + len(self.waiting)


class Subscriptions:
    """All subscriptions of one connection, by the keys of their queues.

    Arguments:
        horizon: seconds for which jobs are claimed ahead, see ``kathikon_claim_horizon``.
    """

    def __init__(self, horizon: float) -> None:
        #: A thread that changes anything here holds this lock. It is also the lock of the `Ledger`.
        self.lock = threading.RLock()
        #: What runs the jobs.
        self.pool: Pool = NoPool()
        #: What no job is claimed of. The intake's thread sets it.
        self.paused = NOTHING
        self._horizon = horizon
        self._by_key: dict[str, Subscription] = {}
        self._first = 0  # the queue that is served first this time

    def add(self, subscription: Subscription) -> None:
        with self.lock:
            self._by_key[key(subscription.queue)] = subscription

    def pop(self, queue: str) -> Subscription | None:
        """Stop consuming *queue*; return its subscription, if there was one."""
        with self.lock:
            return self._by_key.pop(key(queue), None)

    def get(self, name: str) -> Subscription | None:
        """The subscription of the queue with that key."""
        return self._by_key.get(name)

    def names(self) -> list[str]:
        """The keys of all queues."""
        with self.lock:
            return list(self._by_key)

    def open(self) -> list[str]:
        """The keys of the queues that are not paused."""
        if self.paused == NOTHING:
            return self.names()
        return [key(one.queue) for one in self.every() if not self._is_paused(one)]

    def _is_paused(self, subscription: Subscription) -> bool:
        if subscription.no_ack:  # remote control and events
            return False
        return self.paused.everything or key(subscription.queue) in self.paused.queues

    def of_jobs(self) -> list[str]:
        """The names of the queues whose jobs are run: not those of remote control and events."""
        return [one.queue for one in self.every() if not one.no_ack]

    def every(self) -> list[Subscription]:
        with self.lock:
            return list(self._by_key.values())

    def look_back_to(self, since: datetime) -> None:
        """Make the next claims look at jobs that became ready at *since*: their transaction has committed only now."""
        for one in self.every():
            one.front.look_back_to(since)

    def forget_fronts(self, names: Iterable[str] | None = None) -> None:
        """Have the next claims search the whole queues with these keys, or all queues, from their beginning."""
        with self.lock:
            for name in self._by_key if names is None else names:
                if (one := self._by_key.get(name)) is not None:
                    one.front.forget()

    # --- handing out

    def may_hand_out(self, subscription: Subscription) -> bool:
        """Whether the next delivery may be handed out. Sets the subscription's `allowed`, `are_jobs` and `refill`."""
        subscription.are_jobs, limits = subscription.waiting[0].is_job, [UNLIMITED]
        if subscription.concurrency is not None:
            limits.append(subscription.concurrency + subscription.kept - subscription.in_hand)
        limit = subscription.prefetch()
        slots = self.pool.slots() if subscription.are_jobs else None
        if slots is not None:
            if slots <= 0:
                return False
            room = slots + self._ahead(slots)
            limit = min(limit or room, room)
        if limit:
            limits.append(limit - self._in_hand_beside(subscription))
            if limits[-1] <= 0:
                subscription.refill = max(slots or 0, limit // 2, limit - HANDFUL)
        subscription.allowed = min(limits)
        return subscription.allowed > 0

    def is_awaited(self, subscription: Subscription) -> bool:
        """Whether deliveries wait, and the end of one has made room for them (see `Subscription.refill`)."""
        return bool(subscription.waiting) and self._in_hand_beside(subscription) <= subscription.refill

    def can_hand_out(self) -> bool:
        """Whether anything that waits may be handed out."""
        return any(one.waiting and self.may_hand_out(one) for one in self._by_key.values())

    def _in_hand_beside(self, subscription: Subscription) -> int:
        """Number of deliveries in hand of all consumers that share the prefetch limit of *subscription*."""
        return sum(one.in_hand for one in self._by_key.values() if one.prefetch == subscription.prefetch)

    def keep(self, subscription: Subscription | None, change: int) -> None:
        """Count one more (*change* 1) or one less (-1) delivery that needs no slot. The caller holds the lock."""
        self.pool.kept += change
        if subscription is not None:
            subscription.kept += change

    # --- claiming

    def outstanding(self) -> int:
        """Number of deliveries that are claimed and have not ended."""
        with self.lock:
            return sum(one.outstanding for one in self._by_key.values())

    def has_room(self) -> bool:
        """Whether one more job could start at once."""
        slots = self.pool.slots()
        return self.outstanding() < (1 if slots is None else slots)

    def rate(self) -> float:
        """Jobs that end in a second."""
        return sum(one.pace.rate() for one in self._by_key.values())

    def wanted(self) -> list[tuple[Subscription, int]]:
        """How many jobs to claim for which queue, in the order of this turn."""
        slots = self.pool.slots()
        every = [one for one in self.every() if slots is None or not one.no_ack]
        if self.paused != NOTHING:
            every = [one for one in every if not self._is_paused(one)]
        if not every:
            return []
        self._first = (self._first + 1) % len(every)
        every = every[self._first :] + every[: self._first]
        if slots is None:
            # No pool: as much as each channel may have in hand.
            free = [(one, (one.prefetch() or UNLIMITED) - one.outstanding) for one in every]
            return [(one, limit) for one, limit in free if limit > 0]
        if slots <= 0:
            return []
        horizon = self._reach()
        outstanding = sum(one.outstanding for one in every)
        target = slots + self._ahead(slots)
        if outstanding >= slots and outstanding > target // 2:
            return []
        wanted = []
        for one in every:
            most = slots if one.concurrency is None else one.concurrency + one.kept
            limit = min(target - outstanding, most + round(one.pace.ahead(horizon, most)) - one.outstanding)
            if limit > 0:
                wanted.append((one, limit))
        return wanted

    def _reach(self) -> float:
        return self._horizon if self.pool.claims_ahead else 0.0

    def _ahead(self, slots: int) -> int:
        """How many jobs may be in hand beside those of the *slots*."""
        horizon = self._reach()
        return round(sum(one.pace.ahead(horizon, slots) for one in self._by_key.values()))
