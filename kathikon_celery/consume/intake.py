"""Claims and reports for the consumers of one connection; kombu's channels and the worker's requests call it.

All database work of a consumer happens in one thread, in as few transactions as the load allows: while one is under
way, the next batch grows. A lost database stops only this thread, which tries again until the database is back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from kathikon_celery.consume.claiming import Claiming
from kathikon_celery.consume.delivery import BACK, UNBEGUN, Delivery, Outcome
from kathikon_celery.consume.idle_state import IdleState
from kathikon_celery.consume.ledger import Ledger
from kathikon_celery.consume.loop import Loop
from kathikon_celery.consume.pool import Pool
from kathikon_celery.consume.recovery import Recovery
from kathikon_celery.consume.subscriptions import Subscription, Subscriptions
from kathikon_celery.consume.transaction import Transaction
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.storage import Storage, messages
from kathikon_celery.storage.errors import Unavailable
from kathikon_celery.storage.names import key


class Intake:
    """Claims and reports for the consumers of one connection.

    Threads: any thread may call the methods, except that `pump` and `wait` are for the one thread that consumes. What
    they share with the intake's own thread is in the `Ledger` and the `IdleState`, which say who changes what under
    which lock. Here, `_thread` changes under the ledger's lock, and `_turn` is the consumer's.

    Arguments:
        storage: the database.
        concurrency: how many jobs of a queue, by its name, may be in hand at once; `None` for no limit.
        on_ready: called, in any thread, when there is something to deliver.
    """

    def __init__(
        self,
        storage: Storage,
        concurrency: Callable[[str], int | None] = lambda queue: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage = storage
        self.own_node = OwnNode.of(storage)
        horizon = storage.settings.claim_horizon
        self.subscriptions = Subscriptions(horizon)
        self._database = storage.database
        self._concurrency = concurrency
        self._idle = IdleState()
        self._ledger = Ledger(self.subscriptions, on_ready, longest_wait=max(0.25, 5 * horizon))
        self._recovery = Recovery(storage, self.own_node, self._ledger, self._idle)
        claiming = Claiming(storage, self.own_node, self.subscriptions, self._idle, self._recovery)
        transaction = Transaction(storage, self._ledger, self._idle, self._recovery, claiming)
        self._loop = Loop(storage, self.own_node, self._ledger, self._idle, self._recovery, transaction)
        self._thread: threading.Thread | None = None
        self._all_written = threading.Event()
        self._turn = 0  # the queue that `pump` serves first

    @property
    def pool(self) -> Pool:
        """What runs the jobs. A worker sets it before it consumes jobs."""
        return self.subscriptions.pool

    @pool.setter
    def pool(self, pool: Pool) -> None:
        self.subscriptions.pool = pool

    # --- consuming

    def subscribe(
        self, queue: str, no_ack: bool, deliver: Callable[[Delivery], None], prefetch: Callable[[], int]
    ) -> None:
        """Consume *queue*. `pump` calls *deliver* with each delivery."""
        self.subscriptions.add(Subscription(queue, no_ack, deliver, prefetch, self._concurrency(queue)))
        self.start()
        self.look()

    def unsubscribe(self, queue: str) -> None:
        """Stop consuming *queue*; give back the deliveries claimed for it and not handed out."""
        with self._ledger.lock:
            subscription = self.subscriptions.pop(queue)
            if subscription is not None:
                self._ledger.reports += [(delivery, UNBEGUN) for delivery in subscription.waiting]
                self._idle.will_be_woken = False
        self._ledger.notify()

    def pump(self, most: int | None = None) -> int:
        """Hand out up to *most* deliveries that wait and are allowed, in the consumer's thread; return their number.

        Raises `Unavailable` if the database was replaced, or this process was taken for dead: the consumer must
        connect, and declare its queues, again.
        """
        handed, are_kept, ledger = 0, False, self._ledger
        loss, ledger.loss = ledger.loss, None
        if loss is not None:
            raise loss
        self._turn += 1
        every = self.subscriptions.every()
        first = self._turn % len(every) if every else 0
        for subscription in every[first:] + every[:first]:
            subscription.allowed = 0
            while handed != most and (delivery := ledger.hand_out(subscription)) is not None:
                handed += 1
                are_kept = are_kept or delivery.is_kept
                subscription.deliver(delivery)
        if are_kept:  # they need no slot: there is room for more
            self.look()
        return handed

    def wait(self, timeout: float) -> bool:
        """Sleep until something can be handed out, at most *timeout* seconds; false when nothing can."""
        return self._ledger.wait(timeout)

    def interrupt(self, for_good: bool = False) -> None:
        """End the `wait` that the consumer is in, or else its next one; *for_good*: all. Any thread may call it."""
        self._ledger.interrupt(for_good)

    def look(self) -> None:
        """Look for work now."""
        with self._ledger.lock:
            self._idle.is_called = True
        self._ledger.notify()

    def write_returns(self) -> None:
        """Write in the caller's thread what was given back, so that the caller's next statement finds it ready."""
        ledger = self._ledger
        with self.own_node.claiming:  # no transaction of the intake's thread is under way
            with ledger.lock:
                returns = [one for one in ledger.reports if one[1] in (BACK, UNBEGUN)]
                ledger.reports = [one for one in ledger.reports if one[1] not in (BACK, UNBEGUN)]
            try:
                with self._database.write() as connection:
                    self._recovery.report(connection, returns)
            except BaseException:
                with ledger.lock:
                    ledger.reports = returns + ledger.reports
                raise

    def take_one(self, queue: str, no_ack: bool) -> Delivery | None:
        """Claim one delivery at once, in the caller's thread (AMQP's ``basic.get``)."""
        self.start()
        name = key(queue)
        with self.own_node.claiming:
            with self._database.write() as connection:
                items: list[Any] = list(self.storage.backend.claim_jobs(connection, name, 1, self.own_node.id))
                if not items:
                    items = list(messages.take(self._database, connection, name, 1, self.own_node.id, keep=not no_ack))
            if not items:
                return None
            delivery = Delivery(items[0], name, monotonic())
            with self._ledger.lock:
                self._ledger.in_hand[delivery.tag] = delivery
        if no_ack:
            self.finish(delivery.tag)
        return delivery

    # --- what was handed out

    def delivery(self, tag: str) -> Delivery | None:
        """The delivery in hand that has this tag."""
        return self._ledger.in_hand.get(tag)

    def in_hand(self) -> list[Delivery]:
        """All deliveries that were handed out and not finished."""
        with self._ledger.lock:
            return list(self._ledger.in_hand.values())

    def accepted(self, delivery: Delivery) -> None:
        """The pool has begun to run *delivery*."""
        delivery.accepted = monotonic()
        if not delivery.running:
            self._ledger.notify()

    def leaves_strategy(self, delivery: Delivery, early: bool) -> bool:
        """The `Strategy` that has kept *delivery* passes it on to the pool; false if the task must not run.

        The start of an *early* task is on disk when this returns.
        """
        self._ledger.needs_slot(delivery)
        if early and delivery.tag in self._ledger.in_hand:
            with self._database.write(durable=True) as connection:
                if not self.storage.backend.started(connection, [delivery.hold], acked=True):
                    return False
            delivery.early = delivery.marked = delivery.running = True
        return True

    def acknowledge(self, tag: str) -> None:
        """Report that the delivery has ended as its `Delivery.outcome` says."""
        self._ledger.end(tag)

    def finish(self, tag: str, outcome: Outcome | None = None) -> None:
        """Report the end of a delivery, from any thread and in any order; only the first report counts."""
        self._ledger.end(tag, outcome)

    def give_back(self, which: Callable[[Delivery], bool]) -> None:
        """End the deliveries in hand for which *which* is true, as `Delivery.when_left` says."""
        for delivery in self.in_hand():
            if which(delivery):
                self.finish(delivery.tag, delivery.when_left)

    # --- the thread

    def start(self) -> None:
        """Become a node and start the thread, unless that was done."""
        ledger = self._ledger
        with ledger.lock:
            if self._thread is not None:
                return
            self.own_node.enter()
            self.own_node.on_reborn.append(self._recovery.reborn)
            self.own_node.holds.append(ledger.holds)
            self.own_node.consumes.append(self.subscriptions.of_jobs)
            self._database.on_replaced.append(self._replaced)
            ledger.wakeup = self._database.wakeup(self.own_node.id)
            ledger.is_closed = False
            self._thread = threading.Thread(target=self._run, name="kathikon-intake", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        self._loop.run()
        self._all_written.set()
        self._ledger.close_former()
        if self._ledger.wakeup is not None:
            self._ledger.wakeup.close()
        self.own_node.on_reborn.remove(self._recovery.reborn)
        self.own_node.holds.remove(self._ledger.holds)
        self.own_node.consumes.remove(self.subscriptions.of_jobs)
        self._database.on_replaced.remove(self._replaced)
        self.own_node.leave()

    def stop(self) -> None:
        """Write the reports, give back the deliveries that the pool does not have, and end the thread."""
        ledger = self._ledger
        with ledger.lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            for subscription in self.subscriptions.every():
                self.unsubscribe(subscription.queue)
            for delivery in self.in_hand():
                if self.pool.lets_go(delivery):
                    self.finish(delivery.tag, delivery.when_left)
            ledger.is_closed = True
            remains = bool(ledger.in_hand)
        ledger.notify()
        if not remains:  # else the thread ends by itself, with the last report of what the pool still runs
            thread.join(timeout=10)

    def abandon(self) -> None:
        """After `stop`: end what the pool still runs, because the process ends, and wait until that is written."""
        self.give_back(lambda delivery: True)
        self._all_written.wait(timeout=10)

    def _replaced(self) -> None:
        """Note that the database was replaced. Any thread may call this, so this takes no lock."""
        self._ledger.loss = Unavailable("the database was deleted or replaced while it was in use")
