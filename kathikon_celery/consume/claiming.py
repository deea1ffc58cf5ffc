"""Claims jobs and messages, and announces that this node is idle when there are none."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import monotonic

from sqlalchemy import Connection

from kathikon_celery.consume.delivery import Delivery
from kathikon_celery.consume.idle_state import IdleState
from kathikon_celery.consume.ledger import Claimed
from kathikon_celery.consume.pace import BUSY, RUSH
from kathikon_celery.consume.recovery import Recovery
from kathikon_celery.consume.subscriptions import NOTHING, UNLIMITED, Subscription, Subscriptions
from kathikon_celery.job import Job
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.storage import Storage, claim, idle_query, messages, nodes, pauses
from kathikon_celery.storage.errors import is_lost
from kathikon_celery.storage.names import key
from kathikon_celery.storage.scan_start import cooldown

#: Seconds after which pauses are read again although no node was called, and where no node can be called.
PAUSES_CHECKED, PAUSES_POLLED = 30.0, 1.0
#: From up to so many queues the intake claims without a look at which of them have jobs.
FEW = 16


class Claiming:
    """Claims for the subscriptions of one connection. Only the intake's thread uses it."""

    def __init__(
        self, storage: Storage, own_node: OwnNode, subscriptions: Subscriptions, idle: IdleState, recovery: Recovery
    ) -> None:
        self._database, self._backend = storage.database, storage.backend
        self._poll_interval = storage.settings.poll_interval
        self._own_node = own_node
        self._subscriptions = subscriptions
        self._idle = idle
        self._recovery = recovery
        self._read_pauses_at = 0.0

    def read_pauses(self) -> None:
        """Read what is paused if it may have changed: all nodes were called, or a pause has come to its end."""
        now, idle = monotonic(), self._idle
        if not idle.are_pauses_due and now < self._read_pauses_at:
            return
        idle.are_pauses_due = False
        try:
            with self._database.read() as connection:
                paused, left = pauses.paused(connection)
        except BaseException:
            idle.are_pauses_due = True
            raise
        latest = PAUSES_POLLED if self._database.dialect.shares_sessions else PAUSES_CHECKED
        self._read_pauses_at = now + (latest if left is None else min(left, latest))
        self._database.knows_pauses = paused != NOTHING
        if paused != self._subscriptions.paused:
            self._subscriptions.paused = paused
            self._subscriptions.forget_fronts()
            idle.forget()
            idle.are_pauses_due = False

    def is_worth_while(self, names: list[str], with_messages: bool) -> bool:
        """Whether there is something to claim in the queues with these keys, or to announce that the node is idle."""
        idle = self._idle
        if not idle.will_be_woken:
            return True
        began = monotonic()
        there = self._look(names, with_messages)
        idle.cooldown = cooldown(monotonic() - began)
        if there:  # perhaps before the front of its queue: the claim must look there as well
            self._subscriptions.forget_fronts()
        idle.will_be_woken = not there
        if not there:
            idle.recheck()
        return there

    def _look(self, names: list[str], with_messages: bool) -> bool:
        """Whether there is work. The statement also renews the lease, or asks what the services would ask soon."""
        soon = 2 * self._poll_interval
        if self._own_node.is_due(min(soon, self._own_node.lease / 8)):
            return bool(self._own_node.renew_by(partial(idle_query.renew, self._database, names, with_messages)))
        asked = [(one, questions) for one in self._subscriptions.pool.askers if (questions := one.asks(soon))]
        with self._database.read() as connection:
            try:
                return idle_query.look(self._database, connection, names, with_messages, asked)
            except Exception as error:
                if not asked or is_lost(error):
                    raise
                # A question failed. Its service will ask by itself, and log the error; look without questions.
                return idle_query.look(self._database, connection, names, with_messages)

    def take_messages(self, connection: Connection, filled: list[str]) -> Claimed:
        """Take messages (not jobs) from the queues *filled* (keys), in which some wait."""
        taken = []
        for name in filled:
            if (one := self._subscriptions.get(name)) is None:
                continue
            limit = (one.prefetch() or UNLIMITED) - one.outstanding
            if limit > 0:
                batch = messages.take(self._database, connection, name, limit, self._own_node.id, not one.no_ack)
                taken += [(one, Delivery(message, name, monotonic())) for message in batch]
                if len(batch) == limit:
                    self._idle.is_called = True
        return taken

    def narrow(self, connection: Connection, wanted: list[tuple[Subscription, int]]) -> list[tuple[Subscription, int]]:
        """Leave out the queues without a ready job, if there are many queues: each claim is a statement."""
        if len(wanted) <= FEW:
            return wanted
        filled = claim.filled(connection, [key(one.queue) for one, _ in wanted])
        return [(one, limit) for one, limit in wanted if key(one.queue) in filled]

    def claim_jobs(
        self,
        connection: Connection,
        wanted: list[tuple[Subscription, int]],
        names: list[str],
        done: Sequence[Delivery] = (),
        hungry: bool = False,
    ) -> Claimed:
        """Claim jobs, or announce that the node is idle. The first claim also reports that *done* are completed.

        *hungry*: more jobs are wanted, but their queues are empty.
        """
        subscriptions, idle, pool = self._subscriptions, self._idle, self._subscriptions.pool
        slots = pool.slots()
        if slots is None:
            slots = UNLIMITED
        # The first claim also announces that the node is idle, unless the claim fills all slots.
        free = slots - subscriptions.outstanding()
        by_name = self._database.dialect.wakes_by_name
        announces = by_name and not idle.will_be_woken and free > 0 and subscriptions.rate() <= RUSH
        notified, idle.notified = idle.notified, {}
        claimed: Claimed = []
        room = max((limit for _, limit in wanted), default=0)
        for subscription, most in wanted:
            if (limit := min(most, room)) <= 0:
                break
            waiting = claim.Waiting(names, min(limit, free)) if announces else None
            name = key(subscription.queue)
            jobs = self._claim_from(connection, subscription, limit, waiting, done, notified.get(name))
            if waiting is not None and len(jobs) < waiting.room:
                idle.announced()
            announces, done = False, ()
            now = monotonic()
            for job in jobs:
                keeps, outcome = pool.keeps(job.task), pool.outcome_of(job.task)
                early = not keeps and pool.is_early(job.task)
                carried = not early and len(jobs) > slots
                delivery = Delivery(job, name, now, early, is_kept=keeps, carried=carried, outcome=outcome)
                if early:
                    delivery.is_silent = pool.is_silent(job.task)
                claimed.append((subscription, delivery))
            room -= len(jobs)
            hungry = hungry or len(jobs) < limit
        if wanted or hungry:
            self._announce_or_look_again(connection, names, hungry, len(claimed), slots)
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
        """Claim jobs of one queue by one statement: the job *seq* of which the node was notified, or up to *limit*."""
        backend, name, node = self._backend, key(subscription.queue), self._own_node.id
        if done:
            holds = [one.hold for one in done]
            completed, jobs = backend.complete_and_claim(
                connection, holds, name, limit, node, subscription.front, waiting
            )
            if completed != len(done):
                self._recovery.complain(connection, list(done))
            return jobs
        # With one slot `claim_jobs` is better: it also takes the jobs behind this one.
        if waiting and waiting.room > 1 and seq is not None:
            jobs = backend.claim_told(connection, name, seq, node, waiting)
            if jobs:
                return jobs
        return backend.claim_jobs(connection, name, limit, node, subscription.front, waiting)

    def _announce_or_look_again(
        self, connection: Connection, names: list[str], hungry: bool, claimed: int, slots: int
    ) -> None:
        """Announce that the node is idle, or plan the next look, after claims that got *claimed* jobs.

        *hungry*: a claim got fewer jobs than it asked for.
        """
        idle, subscriptions = self._idle, self._subscriptions
        by_name = self._database.dialect.wakes_by_name
        has_room = subscriptions.outstanding() + claimed < slots
        busy = (claimed and not has_room) or subscriptions.rate() > (RUSH if has_room else BUSY)
        is_idle = hungry and not (by_name and busy)  # at a high rate, looking again costs less
        if is_idle != idle.will_be_woken and by_name:
            nodes.wait_for(connection, self._own_node.id, names if is_idle else None)
            if is_idle:
                idle.announced()
        idle.will_be_woken = is_idle
        if hungry and not is_idle:
            idle.look_again()
