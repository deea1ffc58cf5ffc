"""The deliveries of one connection, each from its claim until its end is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import NamedTuple

from kathikon_celery.consume.delivery import UNBEGUN, Delivery, Outcome
from kathikon_celery.consume.subscriptions import Subscription, Subscriptions
from kathikon_celery.job import Hold
from kathikon_celery.storage.engine.wakeup import Wakeup
from kathikon_celery.storage.errors import Unavailable

#: Seconds after which a job that the pool has accepted is written as running, if it still runs.
RUNNING_AFTER = 0.05

#: What was claimed, each with the subscription that it was claimed for.
Claimed = list[tuple[Subscription, Delivery]]


class Batch(NamedTuple):
    """What the next transaction writes."""

    #: Deliveries that have ended, and how.
    reports: list[tuple[Delivery, Outcome]]
    #: Deliveries whose start must be on disk before the pool gets them.
    to_mark: list[Delivery]
    #: Deliveries that run, while their rows do not say so yet.
    started: list[Delivery]


class Ledger:
    """The deliveries that the consumer and the intake's thread share.

    A claimed delivery waits in its `Subscription`. Then it is handed out to the consumer and is "in hand". When it has
    ended it is a report, until a transaction has written it. A delivery whose start must be on disk first makes a
    detour: the next transaction marks it, and it waits once more.

    Threads: the intake's thread adds what was claimed and takes what is to be written; the consumer's thread takes what
    waits; any thread ends a delivery. All of them change the collections here, and the subscriptions, only while they
    hold `lock`. One attribute or one key may be read without it. `loss` is set without the lock, by any thread, and
    taken by the consumer's thread. A thread that holds `lock` must not wait for `OwnNode.claiming`; the other way round
    is allowed.

    Arguments:
        subscriptions: of the connection.
        on_ready: called, in any thread, when there is something to hand out.
        longest_wait: seconds that a claimed job may wait for a pool that is full.
    """

    def __init__(self, subscriptions: Subscriptions, on_ready: Callable[[], None], longest_wait: float) -> None:
        self.subscriptions = subscriptions
        self.lock = subscriptions.lock
        #: What was handed out and has not ended, by its tag.
        self.in_hand: dict[str, Delivery] = {}
        #: What has ended, and is not written.
        self.reports: list[tuple[Delivery, Outcome]] = []
        self.on_ready = on_ready
        #: What the intake's thread sleeps on; `None` until there is such a thread.
        self.wakeup: Wakeup | None = None
        self._former: list[Wakeup] = []  # which that thread perhaps still sleeps on
        #: The error that the consumer's next `Intake.pump` raises: the database was replaced.
        self.loss: Unavailable | None = None
        #: The connection is closed: the intake's thread ends when nothing is left to write.
        self.is_closed = False
        self._to_mark: list[Delivery] = []
        self._longest_wait = longest_wait
        self._ready = threading.Condition(self.lock)
        self._interrupted = self._is_hurried = False

    def notify(self) -> None:
        """Wake the intake's thread."""
        if self.wakeup is not None:
            self.wakeup.notify()

    def replace_wakeup(self, new: Wakeup) -> None:
        """Let the intake's thread sleep on *new* from its next round on; that round closes the one before."""
        assert self.wakeup is not None
        self._former.append(self.wakeup)
        self.wakeup = new
        self._former[-1].notify()

    def close_former(self) -> None:
        """Close what the intake's thread does not sleep on any more. Only that thread may call this."""
        while self._former:
            self._former.pop().close()

    # --- the consumer

    def hand_out(self, subscription: Subscription) -> Delivery | None:
        """The next delivery of *subscription* that may be handed out now; it is in hand from now on."""
        with self.lock:
            while subscription.waiting and (
                (subscription.allowed > 0 and subscription.waiting[0].is_job is subscription.are_jobs)
                or self.subscriptions.may_hand_out(subscription)
            ):
                delivery = subscription.waiting.popleft()
                subscription.allowed -= 1
                subscription.in_hand += 1
                if subscription.no_ack and not delivery.is_job:
                    subscription.in_hand -= 1
                    return delivery
                self.in_hand[delivery.tag] = delivery
                if delivery.is_kept:
                    self.subscriptions.keep(subscription, 1)
                if not delivery.early or delivery.marked:
                    return delivery
                self._to_mark.append(delivery)
                self.notify()
            return None

    def needs_slot(self, delivery: Delivery) -> None:
        """The strategy that has kept *delivery* passes it on to the pool."""
        with self.lock:
            if delivery.tag in self.in_hand:
                self._needs_slot(delivery, self.subscriptions.get(delivery.queue))

    def _needs_slot(self, delivery: Delivery, subscription: Subscription | None) -> None:
        if delivery.is_kept:
            delivery.is_kept = False
            self.subscriptions.keep(subscription, -1)

    def end(self, tag: str, outcome: Outcome | None = None) -> None:
        """Report the end of a delivery: *outcome*, or else its own. Other tags than those in hand are ignored."""
        with self.lock:
            delivery = self.in_hand.pop(tag, None)
            if delivery is None:
                return
            self.reports.append((delivery, outcome or delivery.outcome))
            subscription = self.subscriptions.get(delivery.queue)
            self._needs_slot(delivery, subscription)
            if subscription is not None:
                subscription.in_hand = max(0, subscription.in_hand - 1)
                subscription.pace.count()
            awaited = subscription is not None and self.subscriptions.is_awaited(subscription)
        # Not under the lock: these calls let other threads run, which would have to wait for the lock.
        if awaited:
            self.on_ready()
        self.notify()

    def wait(self, timeout: float) -> bool:
        """See `Intake.wait`."""
        with self._ready:
            self._ready.wait_for(lambda: self._interrupted or self.subscriptions.can_hand_out(), timeout)
            self._interrupted = self._is_hurried
            return self.loss is not None or self.subscriptions.can_hand_out()

    def interrupt(self, for_good: bool = False) -> None:
        """See `Intake.interrupt`."""
        with self._ready:
            self._interrupted, self._is_hurried = True, for_good
            self._ready.notify_all()

    # --- the intake's thread

    def has_to_write(self) -> bool:
        """Whether a transaction has something to write at once."""
        return bool(self.reports or self._to_mark)

    def start_due_at(self) -> float | None:
        """Monotonic time from which on the next start is to be written; `None` when there is none."""
        accepted = [one.accepted for one in list(self.in_hand.values()) if one.accepted and not one.running]
        return min(accepted) + RUNNING_AFTER if accepted else None

    def take(self, now: float) -> Batch:
        """What is to be written at the monotonic time *now*. The caller holds the lock."""
        reports, self.reports = self.reports, []
        to_mark, self._to_mark = self._to_mark, []
        started = [
            one
            for one in self.in_hand.values()
            if one.is_job and one.accepted and not one.running and one.accepted + RUNNING_AFTER <= now
        ]
        return Batch(reports, to_mark, started)

    def put_back(self, batch: Batch) -> None:
        """Take *batch* back, because the transaction that was to write it has failed."""
        with self.lock:
            self.reports = batch.reports + self.reports
            self._to_mark = [one for one in batch.to_mark if not one.marked] + self._to_mark

    def marked(self, deliveries: list[Delivery]) -> None:
        """Note that the starts of *deliveries* are on disk: they may be handed out."""
        with self.lock:
            for delivery in deliveries:
                delivery.marked = delivery.running = True
                if delivery.is_silent:
                    delivery.accepted = monotonic()
                self.in_hand.pop(delivery.tag, None)
                subscription = self.subscriptions.get(delivery.queue)
                if subscription is None:
                    self.reports.append((delivery, UNBEGUN))
                else:
                    subscription.in_hand -= 1
                    subscription.waiting.appendleft(delivery)

    def written(self, started: list[Delivery], claimed: Claimed) -> None:
        """Note that the rows of *started* say that they run, and that *claimed* may be handed out."""
        with self._ready:
            for one in started:
                one.running = True
            for subscription, delivery in claimed:
                delivery.claimed = monotonic()  # not earlier: the commit of a large payload takes long
                if self.subscriptions.get(delivery.queue) is subscription:
                    subscription.waiting.append(delivery)
                else:
                    self.reports.append((delivery, UNBEGUN))
            self._return_stale()
            self._ready.notify_all()

    def _return_stale(self) -> None:
        """Give back jobs that were claimed ahead and have waited too long, because tasks have become slower."""
        pool = self.subscriptions.pool
        if not pool.is_full():
            return
        oldest = monotonic() - self._longest_wait
        for subscription in self.subscriptions.every():
            stale = [one for one in subscription.waiting if one.is_job and one.claimed < oldest]
            for delivery in stale:
                subscription.waiting.remove(delivery)
                self.reports.append((delivery, UNBEGUN))
        for delivery in list(self.in_hand.values()):
            is_stale = (
                delivery.is_job
                and not (delivery.early or delivery.is_kept)
                and delivery.accepted is None
                and delivery.claimed < oldest
            )
            if is_stale and pool.withdraw(delivery):
                del self.in_hand[delivery.tag]
                self.reports.append((delivery, UNBEGUN))
                if (consumed := self.subscriptions.get(delivery.queue)) is not None:
                    consumed.in_hand -= 1

    # --- what this process knows that it holds

    def waiting(self) -> Iterable[Delivery]:
        """What is claimed and not handed out. The caller holds the lock."""
        return (one for subscription in self.subscriptions.every() for one in subscription.waiting)

    def holds(self) -> set[Hold]:
        """The holds of all deliveries here, in each of their places."""
        with self.lock:
            held = {one.hold for one in self.in_hand.values()}
            held |= {one.hold for one, _ in self.reports}
            return held | {one.hold for one in self.waiting()}
