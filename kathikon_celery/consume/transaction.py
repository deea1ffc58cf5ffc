"""One transaction of an intake: writes how deliveries started and ended, and claims the next ones."""

from __future__ import annotations

from time import monotonic

from kathikon_celery.consume.claiming import Claiming
from kathikon_celery.consume.delivery import DONE, PASSED_ON, UNBEGUN, WRITTEN, Delivery
from kathikon_celery.consume.idle_state import IdleState
from kathikon_celery.consume.ledger import Batch, Claimed, Ledger
from kathikon_celery.consume.recovery import Recovery
from kathikon_celery.consume.subscriptions import Subscription
from kathikon_celery.job import Job
from kathikon_celery.storage import Storage, limits, messages
from kathikon_celery.storage.errors import is_refusal


class Transaction:
    """Writes and claims in one transaction. Only the intake's thread uses it."""

    def __init__(
        self, storage: Storage, ledger: Ledger, idle: IdleState, recovery: Recovery, claiming: Claiming
    ) -> None:
        self._database, self._backend = storage.database, storage.backend
        self._ledger = ledger
        self._idle = idle
        self._recovery = recovery
        self._claiming = claiming

    def run(self) -> bool:
        """Write the reports and starts, and claim what is wanted. True if there may be something to hand out."""
        ledger, subscriptions = self._ledger, self._ledger.subscriptions
        with ledger.lock:
            now = monotonic()
            batch = ledger.take(now)
            for_jobs, for_messages = self._idle.take(batch.reports)
        must_write = batch.started or any(outcome not in (WRITTEN, PASSED_ON) for _, outcome in batch.reports)
        claimed: Claimed = []
        reported = batch.reports
        try:
            if batch.to_mark:
                self._mark(batch.to_mark)
            if keys := limits.keys_of(one.item for one, _ in reported if isinstance(one.item, Job)):
                # What makes room is committed before others may have it, and before this node claims.
                self._write(batch, [], [], False)
                self._recovery.written(now, reported)
                ledger.written(batch.started, [])
                batch, must_write = batch._replace(reports=[], started=[]), False
                limits.give_tokens_back(
                    self._database,
                    (one.item for one, outcome in reported if outcome is UNBEGUN and isinstance(one.item, Job)),
                )
                self._backend.offer(keys)
            if for_jobs:
                self._claiming.read_pauses()
            names = subscriptions.open()
            wanted = subscriptions.wanted() if for_jobs else []
            if (
                must_write
                or self._recovery.is_unsure
                or (for_jobs and names and self._claiming.is_worth_while(names, for_messages))
            ):
                claimed = self._write(batch, wanted, names, for_messages)
        except BaseException as error:
            self._idle.is_called = True
            was_refused = False
            try:
                if batch.reports and is_refusal(error):
                    was_refused = self._recovery.report_singly(batch.reports)
                    batch = batch._replace(reports=[])
            finally:
                ledger.put_back(batch)
            if not was_refused:
                raise
            return True
        self._recovery.written(now, batch.reports)
        ledger.written(batch.started, claimed)
        if self._database.has_taken_tokens:
            self._database.has_taken_tokens = False
            subscriptions.pool.on_call()
        return bool(claimed or batch.to_mark or reported)

    def _write(
        self, batch: Batch, wanted: list[tuple[Subscription, int]], names: list[str], for_messages: bool
    ) -> Claimed:
        recovery, claiming = self._recovery, self._claiming
        with self._database.once() as connection:
            recovery.check()
            filled = messages.there(connection, names) if for_messages else []
            asked, wanted = len(wanted), claiming.narrow(connection, wanted)
            if self._is_one_statement(batch, wanted, filled):
                if not wanted:
                    recovery.report(connection, batch.reports)
                done = [one for one, outcome in batch.reports if outcome is DONE]
                return claiming.claim_jobs(connection, wanted, names, done, len(wanted) < asked)
            with self._database.transaction(connection):
                if recovery.is_unsure:
                    recovery.say_again(connection)
                if not recovery.may_claim():
                    asked, wanted = 0, []
                recovery.report(connection, batch.reports)
                if batch.started:
                    self._backend.started(connection, [one.hold for one in batch.started])
                if recovery.is_unsure:
                    recovery.reconcile(connection, batch.reports)
                taken = claiming.take_messages(connection, filled)
                if not self._locks_apart():
                    return taken + claiming.claim_jobs(connection, wanted, names, (), len(wanted) < asked)
            return taken + claiming.claim_jobs(connection, wanted, names, (), len(wanted) < asked)

    def _locks_apart(self) -> bool:
        """Whether each claim has to be a transaction of its own: two would lock keys of limits in no order."""
        return self._database.knows_limits and not self._database.dialect.has_one_writer

    def _is_one_statement(self, batch: Batch, wanted: list[tuple[Subscription, int]], filled: list[str]) -> bool:
        """Whether one statement does all, so that no transaction is needed around it."""
        if filled or batch.started or self._recovery.is_unsure or not self._recovery.may_claim():
            return False
        if any(not one.is_job or outcome not in (DONE, WRITTEN, PASSED_ON) for one, outcome in batch.reports):
            return False
        done = any(outcome is DONE for _, outcome in batch.reports)
        at_once = done and bool(wanted) and self._database.dialect.completes_and_claims
        return done + len(wanted) - at_once == 1

    def _mark(self, deliveries: list[Delivery]) -> None:
        """Write to disk that at-most-once tasks start; only then are they handed out."""
        with self._database.write(durable=True) as connection:
            self._backend.started(connection, [one.hold for one in deliveries], acked=True)
        self._ledger.marked(deliveries)
