"""The intake of one connection: a thread that claims ahead for its consumers and writes back what they finished.

All database work of a consumer happens in this thread, in as few transactions as the load allows: while one is under
way, the next batch grows. A lost database stops nothing but this thread, which tries again until it is back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic, sleep
from typing import Any

from sqlalchemy import Connection

from kathikon_celery.consume import reporting
from kathikon_celery.consume.delivery import BACK, DONE, PASSED_ON, WRITTEN, Delivery, Outcome, Verdict
from kathikon_celery.consume.subscriptions import UNLIMITED, Subscription, Subscriptions
from kathikon_celery.job import Cause, Hold, Job, State
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.storage import Storage, claim, finish, idle_query, messages, nodes, transitions
from kathikon_celery.storage.engine.wakeup import Wakeup
from kathikon_celery.storage.errors import StorageError, Unavailable, in_words, is_lost
from kathikon_celery.storage.names import key
from kathikon_celery.storage.scan_start import cooldown

logger = logging.getLogger(__name__)

#: Seconds after which a job that the pool has accepted is written as running, if it still is.
RUNNING_AFTER = 0.05
#: Seconds between two transactions while there is much to do: what comes meanwhile shares the next one.
BUSY_GAP = 0.004
#: The same, at most, while what is claimed ahead lasts for longer.
LONGEST_GAP = 0.010
#: Seconds until it is made sure that nothing came after a claim that got all there was.
LOOK_AGAIN = 0.003
#: Pauses between the looks for what was being published while our row began to say that we wait: nobody called us.
DOUBTS = (0.002, 0.02, 0.2, 1.0)
#: Jobs a second from which on there is much to do.
BUSY = 150.0
#: The same while the pool has room: a caller who sends a task each time he has got the last result is not much.
RUSH = 600.0
#: Longest pause between two attempts to reach a database that is away, in seconds.
PAUSE = 0.5


#: A task that must not run twice was cut short.
LOST = Outcome(Verdict.ENDED, State.DEAD, Cause.LOST_ONCE, transitions.LOST_AT_MOST_ONCE)


class Intake:
    """Claims and reports for the consumers of one connection.

    Arguments:
        storage: where from.
        concurrency: of a queue by its name, or `None` for no limit.
    """

    def __init__(self, storage: Storage, concurrency: Callable[[str], int | None] = lambda queue: None) -> None:
        self.storage = storage
        self.database = storage.database
        self.own_node = OwnNode.of(storage)
        self.subscriptions = Subscriptions(storage.settings.claim_horizon)
        #: Whether the pool runs as many jobs as it can, so that what is behind them waits for their end.
        self.is_pool_full: Callable[[], bool] = lambda: True
        #: Whether a task's message is acknowledged before it runs.
        self.is_early: Callable[[str], bool] = lambda task: False
        #: What an acknowledgement of a task means as long as the consumer says nothing else.
        self.outcome_of: Callable[[str], Outcome] = lambda task: DONE
        #: Whether the pool has a delivery in its hands, so that it must not be given back.
        self.is_in_pool: Callable[[Delivery], bool] = lambda delivery: False
        #: Takes a delivery out of the pool's queue again, in this thread; false if the pool has begun with it.
        self.withdraw: Callable[[Delivery], bool] = lambda delivery: False
        #: Called from this thread when another process calls all nodes: perhaps a job is due soon.
        self.on_call: Callable[[], None] = lambda: None
        #: Whose questions to the database are asked with the look for work while nothing else is to be done.
        self.askers: Sequence[idle_query.Asker] = ()
        #: Called, in any thread, when there is something to deliver.
        self.on_ready: Callable[[], None] = lambda: None
        #: Monotonic time of the last transaction that went well.
        self.last_success = monotonic()
        self._concurrency = concurrency
        self._lock = self.subscriptions.lock
        self._in_hand: dict[str, Delivery] = {}
        self._reports: list[tuple[Delivery, Outcome]] = []
        self._to_mark: list[Delivery] = []
        self._server: object = None  # which life of the server we know
        self._opened = 0  # how many connections had been made when we last made sure
        self._claims_from = 0.0  # after its restart, all nodes first claim anew what they hold
        self._said = reporting.RecentReports()
        self._wakeup: Wakeup | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._called = True  # somebody called, or it is time: look for anything
        self._look = True  # look for jobs
        self._look_from = 0.0  # but not before this moment
        self._waits = False  # our row says that we wait
        self._told: dict[str, int] = {}  # for which jobs we were called, by their queues' keys
        self._rest = 0.0  # seconds until the next look of which nobody called: it may take long, see front.py
        self._doubts: list[float] = []  # pauses until it is looked for what came while we said so
        self._unsure = True  # a commit may have happened of which we did not hear
        self._unprepared = claim.preparations(self.database)  # not until there is nothing else to do
        self._turn = 0  # the queue that `pump` serves first
        self._ready = threading.Condition(self._lock)
        self._interrupted = False
        self._loss: Unavailable | None = None  # what the consumer is to be told

    # --- what the channels call

    def subscribe(
        self, queue: str, no_ack: bool, deliver: Callable[[Delivery], None], prefetch: Callable[[], int]
    ) -> None:
        """Consume *queue*. *deliver* is called from `pump`, for each delivery."""
        self.subscriptions.add(Subscription(queue, no_ack, deliver, prefetch, self._concurrency(queue)))
        self.start()
        self.look()

    def unsubscribe(self, queue: str) -> None:
        """Consume *queue* no longer; what was claimed for it and not delivered is given back."""
        with self._lock:
            subscription = self.subscriptions.pop(queue)
            if subscription is not None:
                self._reports += [(delivery, BACK) for delivery in subscription.waiting]
                self._waits = False
        self._notify()

    def start(self) -> None:
        """Become a node and start the thread, unless that was done."""
        with self._lock:
            if self._thread is not None:
                return
            self.own_node.enter()
            self.own_node.on_reborn.append(self._reborn)
            self.own_node.holds.append(self._holds)
            self.database.on_replaced.append(self._replaced)
            self._wakeup = self.database.wakeup(self.own_node.id)
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="kathikon-intake", daemon=True)
            self._thread.start()

    def take_one(self, queue: str, no_ack: bool) -> Delivery | None:
        """Claim one delivery at once, in the caller's thread (AMQP's ``basic.get``)."""
        self.start()
        name = key(queue)
        with self.own_node.claiming:
            with self.database.write() as connection:
                items: list[Any] = list(claim.claim(self.database, connection, name, 1, self.own_node.id))
                if not items:
                    items = list(messages.take(self.database, connection, name, 1, self.own_node.id, keep=not no_ack))
            if not items:
                return None
            delivery = Delivery(items[0], name, monotonic())
            with self._lock:
                self._in_hand[delivery.tag] = delivery
        if no_ack:
            self.finish(delivery.tag)
        return delivery

    def delivery(self, tag: str) -> Delivery | None:
        """The delivery in hand that has this tag."""
        return self._in_hand.get(tag)

    def in_hand(self) -> list[Delivery]:
        """All deliveries that were handed out and not finished."""
        with self._lock:
            return list(self._in_hand.values())

    def accepted(self, delivery: Delivery) -> None:
        """The pool has begun to run it."""
        delivery.accepted = monotonic()
        if not delivery.running:
            self._notify()

    def acknowledge(self, tag: str) -> None:
        """The consumer acknowledges."""
        delivery = self._in_hand.get(tag)
        if delivery is not None:
            self.finish(tag, delivery.outcome)

    def finish(self, tag: str, outcome: Outcome | None = None) -> None:
        """Report the end of a delivery; any thread, any order, once or more often."""
        with self._lock:
            delivery = self._in_hand.pop(tag, None)
            if delivery is None:
                return
            self._reports.append((delivery, outcome or delivery.outcome))
            subscription = self.subscriptions.get(delivery.queue)
            if subscription is not None:
                subscription.in_hand = max(0, subscription.in_hand - 1)
                subscription.pace.count()
            awaited = subscription is not None and self.subscriptions.is_awaited(subscription)
        # Whoever calls lets other threads run, which must not find the lock taken.
        if awaited:
            self.on_ready()
        self._notify()

    def give_back(self, which: Callable[[Delivery], bool]) -> None:
        """Return the deliveries in hand that *which* names."""
        for delivery in self.in_hand():
            if which(delivery):
                self.finish(delivery.tag, BACK)

    def pump(self, most: int | None = None) -> int:
        """Hand out what is waiting and allowed, in the consumer's thread, up to *most*; how much it was.

        Raises `Unavailable` when the database was replaced: the consumer is to connect, and to declare all, anew.
        """
        handed = 0
        loss, self._loss = self._loss, None
        if loss is not None:
            raise loss
        self._turn += 1
        every = self.subscriptions.every()
        first = self._turn % len(every) if every else 0
        for subscription in every[first:] + every[:first]:
            subscription.allowed = 0
            while handed != most and (delivery := self._next(subscription)) is not None:
                handed += 1
                subscription.deliver(delivery)
        return handed

    def wait(self, timeout: float) -> bool:
        """Sleep until something can be handed out, at most *timeout* seconds; false when nothing can."""
        with self._ready:
            self._ready.wait_for(lambda: self._interrupted or self.subscriptions.can_hand_out(), timeout)
            self._interrupted = False
            return self._loss is not None or self.subscriptions.can_hand_out()

    def interrupt(self) -> None:
        """End the `wait` that the consumer is in, or else its next one. Any thread may call it."""
        with self._ready:
            self._interrupted = True
            self._ready.notify_all()

    def look(self) -> None:
        """Look for work now."""
        self._called = True
        self._notify()

    def stop(self) -> None:
        """Write what is to be written, give back what the pool has not in its hands, and end the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            for subscription in self.subscriptions.every():
                self.unsubscribe(subscription.queue)
            for delivery in list(self._in_hand.values()):
                if self.is_in_pool(delivery) and not self.withdraw(delivery):
                    continue
                cut_short = delivery.early and delivery.accepted
                self.finish(delivery.tag, LOST if cut_short else BACK)
            self._stopping = True
            remains = bool(self._in_hand)
        self._notify()
        if not remains:  # else the thread ends by itself, with the last report of what the pool still runs
            thread.join(timeout=10)

    # --- handing out

    def _next(self, subscription: Subscription) -> Delivery | None:
        with self._lock:
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
                self._in_hand[delivery.tag] = delivery
                if not delivery.early or delivery.marked:
                    return delivery
                self._to_mark.append(delivery)
                self._notify()
            return None

    def _gap(self) -> float:
        """Seconds that the next transaction waits for what comes meanwhile."""
        if not self._is_busy():
            return 0.0
        subscriptions = self.subscriptions
        if subscriptions.slots is None:
            return BUSY_GAP
        ahead = subscriptions.outstanding() - subscriptions.slots()
        return min(max(BUSY_GAP, ahead / subscriptions.rate() / 2), LONGEST_GAP)

    def _is_busy(self) -> bool:
        """Whether there is so much to do that transactions should be shared."""
        rate = self.subscriptions.rate()
        if rate <= BUSY or self._is_rush():
            return rate > BUSY
        was_called = self._look and not self._look_from
        must_say_so = self.database.dialect.wakes_by_name and not self._waits
        return not (was_called or must_say_so)

    def _is_rush(self) -> bool:
        """Whether nobody is helped by an answer at once: there is very much to do, or no slot is free."""
        return self.subscriptions.rate() > RUSH or not self.subscriptions.has_room()

    # --- the thread

    def _notify(self) -> None:
        if self._wakeup is not None:
            self._wakeup.notify()

    def _run(self) -> None:
        assert self._wakeup is not None
        pause, last, next_look, due_soon = 0.0, 0.0, 0.0, False
        while True:
            try:
                if self._stopping and not self._reports and not self._in_hand:
                    break
                if self._loss is not None:
                    self.interrupt()
                    self.on_ready()
                now = monotonic()
                due_at = min(self._due_at(now, next_look), next_look)
                pause_until = last + self._gap()
                if now < pause_until and self._is_rush():
                    sleep(pause_until - now)  # deaf: to be woken by each job that ends costs more than all the SQL
                    continue
                due_at = max(due_at, pause_until)
                timeout = max(0.0, due_at - now)
                if self._wakeup.wait(min(timeout, self.storage.settings.poll_interval)):
                    self._look, self._look_from, self._waits = True, 0.0, False
                    self._told = self._wakeup.jobs()
                    due_soon = due_soon or self._wakeup.called_all
                    self._called = self._called or self._wakeup.called_all
                if timeout:
                    continue
                if now >= next_look:
                    self._called = True
                with self.own_node.claiming:
                    is_ready = self._step()
                if is_ready:
                    self.on_ready()
                if due_soon:
                    due_soon = False
                    self.on_call()
                elif not is_ready and not self._in_hand and self.subscriptions.slots is not None:
                    self._prepare()
                last = self.last_success = monotonic()
                next_look = last + max(self.storage.settings.poll_interval, self._rest)
                if pause:
                    logger.warning("Kathikon: the database %r is back", self.database)
                    pause = 0.0
            except Exception as error:
                self._unsure, self._waits, self._called = True, False, True
                if not is_lost(error) and not isinstance(error, StorageError):
                    logger.exception("Kathikon: unexpected error while claiming")
                elif not pause:
                    logger.warning("Kathikon: the database is away, trying until it is back: %s", in_words(error))
                if self._stopping and pause >= PAUSE:
                    break  # the lease will run out, and the others take over
                pause = min(PAUSE, pause * 2 or 0.05)
                self._wakeup.wait(pause)
        self._wakeup.close()
        self.own_node.on_reborn.remove(self._reborn)
        self.own_node.holds.remove(self._holds)
        self.database.on_replaced.remove(self._replaced)
        self.own_node.leave()

    def _prepare(self) -> None:
        """Do one thing of those that the first jobs would have to wait for, as there is nothing else to do."""
        if (prepare := next(self._unprepared, None)) is not None:
            with self.database.read() as connection:
                prepare(connection)

    def _due_at(self, now: float, next_look: float) -> float:
        """When the next transaction is worth while."""
        if self._reports or self._to_mark or self._called:
            return now
        if self._look and self.subscriptions.wanted():
            return self._look_from
        started = [one.accepted for one in list(self._in_hand.values()) if one.accepted and not one.running]
        return min(started) + RUNNING_AFTER if started else next_look

    def _step(self) -> bool:
        """One transaction: write the reports, claim what is wanted. True when there is something to deliver."""
        with self._lock:
            reports, self._reports = self._reports, []
            to_mark, self._to_mark = self._to_mark, []
            called, self._called = self._called or any(not one.is_job for one, _ in reports), False
            look, self._look = self._look or called or bool(reports), False
            tells = any(outcome not in (WRITTEN, PASSED_ON) for _, outcome in reports)
            names = self.subscriptions.names()
            now = monotonic()
            started = [
                one
                for one in self._in_hand.values()
                if one.is_job and one.accepted and not one.running and one.accepted + RUNNING_AFTER <= now
            ]
        try:
            if to_mark:
                self._mark(to_mark)
            wanted = self.subscriptions.wanted() if look else []
            claimed: list[tuple[Subscription, Delivery]] = []
            if tells or started or self._unsure or (look and names and self._is_worth_a_claim(names, called)):
                claimed = self._write(reports, started, wanted, names, called)
        except BaseException:
            with self._lock:
                self._reports = reports + self._reports
                self._to_mark = [one for one in to_mark if not one.marked] + self._to_mark
                self._called = True
            raise
        self._unsure = False
        self._said.add(now, reports)
        with self._ready:
            for one in started:
                one.running = True
            for subscription, delivery in claimed:
                delivery.claimed = monotonic()  # a large payload's commit takes its time, in which nobody could run it
                if self.subscriptions.get(delivery.queue) is subscription:
                    subscription.waiting.append(delivery)
                else:
                    self._reports.append((delivery, BACK))
            self._return_stale()
            self._ready.notify_all()
        return bool(claimed or to_mark or reports)

    def _write(
        self,
        reports: list[tuple[Delivery, Outcome]],
        started: list[Delivery],
        wanted: list[tuple[Subscription, int]],
        names: list[str],
        called: bool,
    ) -> list[tuple[Subscription, Delivery]]:
        """Report and claim, in one transaction; what was claimed."""
        with self.database.once() as connection:
            if self._server is not None and self._opened != self.database.opened:
                self._unsure = True  # another thread may have met the loss of the server before us
            filled = messages.there(connection, names) if called else []
            if self._is_one_statement(reports, started, wanted, filled):
                if not wanted:
                    self._report(connection, reports)
                return self._claim(connection, wanted, names, [one for one, outcome in reports if outcome is DONE])
            with self.database.transaction(connection):
                if self._unsure:
                    self._say_again(connection)
                if monotonic() < self._claims_from:
                    wanted = []
                self._report(connection, reports)
                if started:
                    finish.started(self.database, connection, [one.hold for one in started])
                if self._unsure:
                    self._reconcile(connection, reports)
                taken = self._take(connection, filled)
                return taken + self._claim(connection, wanted, names)

    def _is_one_statement(
        self,
        reports: list[tuple[Delivery, Outcome]],
        started: list[Delivery],
        wanted: list[tuple[Subscription, int]],
        filled: list[str],
    ) -> bool:
        """Whether it takes one statement, which needs no transaction around it."""
        if filled or started or self._unsure or monotonic() < self._claims_from:
            return False
        if any(not one.is_job or outcome not in (DONE, WRITTEN, PASSED_ON) for one, outcome in reports):
            return False
        done = any(outcome is DONE for _, outcome in reports)
        at_once = done and bool(wanted) and self.database.dialect.changes_in_ctes
        return done + len(wanted) - at_once == 1

    def _is_worth_a_claim(self, names: list[str], called: bool) -> bool:
        """Whether there is something to claim, or our row must say that we wait. Of a message everybody is called."""
        if not self._waits:
            return True  # we were called, or must say that we wait
        began = monotonic()
        there = self._look_for(names, called)
        self._rest = cooldown(monotonic() - began)
        if there:  # perhaps before the front: where that was found, the claim shall look as well
            self.subscriptions.forget_fronts()
        self._waits = not there
        if self._waits and self._doubts:
            self._look, self._look_from = True, monotonic() + self._doubts.pop(0)
        return there

    def _look_for(self, names: list[str], with_messages: bool) -> bool:
        """Whether there is work. With that statement the lease is renewed, or it asks what others will soon ask."""
        soon = 2 * self.storage.settings.poll_interval
        if self.own_node.is_due(min(soon, self.own_node.lease / 8)):
            return bool(self.own_node.renew_by(partial(idle_query.renew, self.database, names, with_messages)))
        asked = [(one, questions) for one in self.askers if (questions := one.asks(soon))]
        with self.database.read() as connection:
            try:
                return idle_query.look(self.database, connection, names, with_messages, asked)
            except Exception as error:
                if not asked or is_lost(error):
                    raise
                # A question that has no answer is the trouble of who asks it: he asks again by himself.
                return idle_query.look(self.database, connection, names, with_messages)

    def _mark(self, deliveries: list[Delivery]) -> None:
        """Write, on disk, that at-most-once tasks start; only then they are handed out."""
        with self.database.write(durable=True) as connection:
            finish.started(self.database, connection, [one.hold for one in deliveries], acked=True)
        with self._ready:
            for delivery in deliveries:
                delivery.marked = delivery.running = True
                self._in_hand.pop(delivery.tag, None)
                subscription = self.subscriptions.get(delivery.queue)
                if subscription is None:
                    self._reports.append((delivery, BACK))
                else:
                    subscription.in_hand -= 1
                    subscription.waiting.appendleft(delivery)

    def _report(self, connection: Connection, reports: reporting.Reports) -> None:
        returned = reporting.write(self.database, connection, reports, partial(self._complain, connection))
        self.subscriptions.forget_fronts(returned)

    def _complain(self, connection: Connection, deliveries: list[Delivery]) -> None:
        if not self._unsure:
            reporting.complain(connection, deliveries)

    def _take(self, connection: Connection, filled: list[str]) -> list[tuple[Subscription, Delivery]]:
        """Take the messages, which are no jobs, from the queues that are *filled* with some."""
        taken = []
        for name in filled:
            if (one := self.subscriptions.get(name)) is None:
                continue
            limit = (one.prefetch() or UNLIMITED) - one.outstanding
            if limit > 0:
                batch = messages.take(self.database, connection, name, limit, self.own_node.id, not one.no_ack)
                taken += [(one, Delivery(message, name, monotonic())) for message in batch]
                self._called = self._called or len(batch) == limit
        return taken

    def _claim(
        self,
        connection: Connection,
        wanted: list[tuple[Subscription, int]],
        names: list[str],
        done: Sequence[Delivery] = (),
    ) -> list[tuple[Subscription, Delivery]]:
        """Claim jobs, or say that we wait for them. With the first claim, *done* is reported."""
        subscriptions = self.subscriptions
        slots = subscriptions.slots() if subscriptions.slots is not None else UNLIMITED
        # With the first claim, unless that fills all slots, it is said that we wait.
        free = slots - subscriptions.outstanding()
        says_so = self.database.dialect.wakes_by_name and not self._waits and free > 0 and subscriptions.rate() <= RUSH
        told, self._told = self._told, {}
        claimed: list[tuple[Subscription, Delivery]] = []
        room, hungry = max((limit for _, limit in wanted), default=0), False
        for subscription, most in wanted:
            if (limit := min(most, room)) <= 0:
                break
            waiting = claim.Waiting(names, min(limit, free)) if says_so else None
            name = key(subscription.queue)
            jobs = self._claim_from(connection, subscription, limit, waiting, done, told.get(name))
            if waiting is not None and len(jobs) < waiting.room:
                self._says_that_we_wait()
            says_so, done = False, ()
            now = monotonic()
            for job in jobs:
                early, outcome = self.is_early(job.task), self.outcome_of(job.task)
                carried = not early and len(jobs) > slots
                claimed.append((subscription, Delivery(job, name, now, early, carried=carried, outcome=outcome)))
            room -= len(jobs)
            hungry = hungry or len(jobs) < limit
        if wanted:
            self._wait_or_look(connection, names, hungry, len(claimed), slots)
        return claimed

    def _claim_from(
        self,
        connection: Connection,
        subscription: Subscription,
        limit: int,
        waiting: claim.Waiting | None,
        done: Sequence[Delivery],
        seq: int | None,
    ) -> list[Job]:
        """Claim jobs of one queue, by one statement: that for which we were called, *seq*, or as many as may be."""
        database, name, node = self.database, key(subscription.queue), self.own_node.id
        if done:
            holds = [one.hold for one in done]
            completed, jobs = claim.complete_and_claim(
                database, connection, holds, name, limit, node, subscription.front, waiting
            )
            if completed != len(done):
                self._complain(connection, list(done))
            return jobs
        # With one slot the other claim is worth more: it takes what comes behind as well.
        if waiting and waiting.room > 1 and seq is not None:
            jobs = claim.claim_told(database, connection, name, seq, node, waiting)
            if jobs:
                return jobs
        return claim.claim(database, connection, name, limit, node, subscription.front, waiting)

    def _wait_or_look(self, connection: Connection, names: list[str], hungry: bool, claimed: int, slots: int) -> None:
        """After claims, which left us hungry or not: whoever publishes shall wake us, or we look again soon."""
        by_name = self.database.dialect.wakes_by_name
        has_room = self.subscriptions.outstanding() + claimed < slots
        busy = (claimed and not has_room) or self.subscriptions.rate() > (RUSH if has_room else BUSY)
        waits = hungry and not (by_name and busy)  # to look again costs less, when there is much to do
        if waits != self._waits and by_name:
            nodes.wait_for(connection, self.own_node.id, names if waits else None)
            if waits:
                self._says_that_we_wait()
        self._waits = waits
        if hungry and not waits:
            self._look, self._look_from = True, monotonic() + LOOK_AGAIN

    def _says_that_we_wait(self) -> None:
        """Our row says so from now on: who publishes at this moment does not see it yet."""
        self._waits, self._doubts = True, list(DOUBTS)
        self._look, self._look_from = True, monotonic() + self._doubts.pop(0)

    def _say_again(self, connection: Connection) -> None:
        """Claim and report anew what a server that crashed has forgotten, since it had not yet written it to disk."""
        with self._lock:
            held = [*self._in_hand.values(), *(one for one, _ in self._said.reports())]
            held += [one for subscription in self.subscriptions.every() for one in subscription.waiting]
        holds = [one.hold for one in held if one.is_job]
        if holds:
            claim.claim_again(self.database, connection, holds, self.own_node.id)
        self._report(connection, self._said.reports())
        self._opened = self.database.opened
        server, self._server = self._server, self.database.dialect.incarnation(connection)
        if server not in (None, self._server):
            self._claims_from = monotonic() + PAUSE * 2

    def _holds(self) -> set[Hold]:
        with self._lock:
            held = {one.hold for one in self._in_hand.values()}
            held |= {one.hold for one, _ in self._reports}
            return held | {one.hold for subscription in self.subscriptions.every() for one in subscription.waiting}

    def _reconcile(self, connection: Connection, reports: list[tuple[Delivery, Outcome]]) -> None:
        """Give back what the table says that this process holds and nobody here knows of: a claim's answer was lost."""
        known = {one.hold for one, _ in reports}.union(*(holds() for holds in list(self.own_node.holds)))
        forgotten = [hold for hold in finish.held_by(connection, self.own_node.id) if hold not in known]
        if forgotten:
            finish.given_back(self.database, connection, forgotten)

    def _return_stale(self) -> None:
        """Give back what was claimed ahead and waits for too long: the tasks have become slower."""
        if self.subscriptions.slots is None or not self.is_pool_full():
            return
        oldest = monotonic() - max(0.25, 5 * self.storage.settings.claim_horizon)
        for subscription in self.subscriptions.every():
            stale = [one for one in subscription.waiting if one.is_job and one.claimed < oldest]
            for delivery in stale:
                subscription.waiting.remove(delivery)
                self._reports.append((delivery, BACK))
        for delivery in list(self._in_hand.values()):
            is_stale = (
                delivery.is_job and not delivery.early and delivery.accepted is None and delivery.claimed < oldest
            )
            if is_stale and self.withdraw(delivery):
                del self._in_hand[delivery.tag]
                self._reports.append((delivery, BACK))
                if (consumed := self.subscriptions.get(delivery.queue)) is not None:
                    consumed.in_hand -= 1

    def _replaced(self) -> None:
        """The database was replaced; called by whoever has noticed it, so it waits for no lock."""
        self._loss = Unavailable("the database was deleted or replaced while it was in use")

    def _reborn(self, old: int, new: int) -> None:
        """This process was taken for dead: what it has claimed and not begun is others' now."""
        with self._lock:
            for subscription in self.subscriptions.every():
                subscription.waiting.clear()
            if self._wakeup is not None and self._thread is not None:
                old_wakeup, self._wakeup = self._wakeup, self.database.wakeup(new)
                old_wakeup.notify()
            self._unsure, self._waits = True, False
        self.look()
