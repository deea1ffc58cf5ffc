"""The loop of an intake's thread: when the next transaction runs, and what happens when it fails."""

from __future__ import annotations

import logging
from time import monotonic, sleep

from kathikon_celery.consume.idle_state import IdleState
from kathikon_celery.consume.ledger import Ledger
from kathikon_celery.consume.pace import BUSY, RUSH
from kathikon_celery.consume.recovery import PAUSE, Recovery
from kathikon_celery.consume.transaction import Transaction
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.storage import Storage, claim
from kathikon_celery.storage.errors import StorageError, in_words, is_lost

logger = logging.getLogger(__name__)

#: Seconds between two transactions at a high rate: reports that come meanwhile share the next transaction.
BUSY_GAP = 0.004
#: Most seconds between two transactions, while the jobs that are claimed ahead last for longer.
LONGEST_GAP = 0.010


class Loop:
    """Runs a transaction whenever there is something to write or to claim. Only the intake's thread uses it."""

    def __init__(
        self,
        storage: Storage,
        own_node: OwnNode,
        ledger: Ledger,
        idle: IdleState,
        recovery: Recovery,
        transaction: Transaction,
    ) -> None:
        #: Monotonic time of the last transaction that went well. Other threads may read it.
        self.last_success = monotonic()
        self._database = storage.database
        self._poll_interval = storage.settings.poll_interval
        self._own_node = own_node
        self._ledger = ledger
        self._subscriptions = ledger.subscriptions
        self._idle = idle
        self._recovery = recovery
        self._transaction = transaction
        self._unprepared = claim.preparations(self._database)  # statements that are not compiled yet

    def run(self) -> None:
        """Run transactions until the ledger is closed and all is written."""
        ledger, idle = self._ledger, self._idle
        pause, last, next_look, due_soon = 0.0, 0.0, 0.0, False
        while True:
            ledger.close_former()
            wakeup = ledger.wakeup
            assert wakeup is not None
            try:
                if ledger.is_closed and not ledger.reports and not ledger.in_hand:
                    return
                if ledger.loss is not None:
                    ledger.interrupt()
                    ledger.on_ready()
                now = monotonic()
                due_at = min(self._due_at(now, next_look), next_look)
                pause_until = last + self._gap()
                if now < pause_until and self._is_rush():
                    sleep(pause_until - now)  # not `wait`: a wake-up by each job that ends costs more than all the SQL
                    continue
                due_at = max(due_at, pause_until)
                timeout = max(0.0, due_at - now)
                if wakeup.wait(min(timeout, self._poll_interval)):
                    if (since := idle.wake(wakeup)) is not None:
                        self._subscriptions.look_back_to(since)
                    due_soon = due_soon or wakeup.called_all
                if timeout:
                    continue
                if now >= next_look:
                    idle.is_called = True
                with self._own_node.claiming:
                    is_ready = self._transaction.run()
                if is_ready:
                    ledger.on_ready()
                pool = self._subscriptions.pool
                if due_soon:
                    due_soon = False
                    pool.on_call()
                elif not is_ready and not ledger.in_hand and pool.slots() is not None:
                    self._prepare()
                last = self.last_success = monotonic()
                next_look = last + max(self._poll_interval, idle.cooldown)
                if pause:
                    logger.warning("Kathikon: the database %r is back", self._database)
                    pause = 0.0
            except Exception as error:
                self._recovery.is_unsure = True
                idle.forget()
                if not is_lost(error) and not isinstance(error, StorageError):
                    logger.exception("Kathikon: unexpected error while claiming")
                elif not pause:
                    what = "is away, trying until it is back" if is_lost(error) else "cannot be used, trying again"
                    logger.warning("Kathikon: the database %s: %s", what, in_words(error))
                if ledger.is_closed and pause >= PAUSE:
                    return  # the lease will run out, and the other nodes take over
                pause = min(PAUSE, pause * 2 or 0.05)
                wakeup.wait(pause)

    def _prepare(self) -> None:
        """Compile one of the statements that the first jobs need, as there is nothing else to do."""
        if (prepare := next(self._unprepared, None)) is not None:
            with self._database.read() as connection:
                prepare(connection)

    def _due_at(self, now: float, next_look: float) -> float:
        """Monotonic time from which on the next transaction is worth while."""
        if self._ledger.has_to_write() or self._idle.is_called:
            return now
        if self._idle.looks_for_jobs and self._subscriptions.wanted():
            return self._idle.look_from
        start_due_at = self._ledger.start_due_at()
        return next_look if start_due_at is None else start_due_at

    def _gap(self) -> float:
        """Seconds that the next transaction waits, so that more reports and jobs share it."""
        if not self._is_busy():
            return 0.0
        slots = self._subscriptions.pool.slots()
        if slots is None:
            return BUSY_GAP
        ahead = self._subscriptions.outstanding() - slots
        return min(max(BUSY_GAP, ahead / self._subscriptions.rate() / 2), LONGEST_GAP)

    def _is_busy(self) -> bool:
        """Whether there is so much to do that what happens within a few milliseconds should share a transaction."""
        rate = self._subscriptions.rate()
        if rate <= BUSY or self._is_rush():
            return rate > BUSY
        must_announce = self._database.dialect.wakes_by_name and not self._idle.will_be_woken
        return not (self._idle.was_woken() or must_announce)

    def _is_rush(self) -> bool:
        """Whether a transaction at once helps no caller: the rate is above `RUSH`, or no slot is free."""
        return self._subscriptions.rate() > RUSH or not self._subscriptions.has_room()
