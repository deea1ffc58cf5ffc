"""Repeats what a lost connection or a crashed server may have forgotten, and gives up what other nodes have now."""

from __future__ import annotations

from functools import partial
from time import monotonic

from sqlalchemy import Connection

from kathikon_celery.consume import reporting
from kathikon_celery.consume.delivery import Delivery
from kathikon_celery.consume.idle_state import IdleState
from kathikon_celery.consume.ledger import Ledger
from kathikon_celery.job import Job
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.storage import Storage, Unavailable, finish

#: Longest pause between two attempts to reach a database that is away, in seconds.
PAUSE = 0.5


class Recovery:
    """Whether this process and the database may differ in what this node holds, and how they come to agree again.

    Threads: the intake's thread owns all attributes. Only `reborn` is called by other threads, such as that of the
    lease; it changes what it changes under the ledger's lock. A transaction that is under way then still ends as it
    would have.
    """

    def __init__(self, storage: Storage, own_node: OwnNode, ledger: Ledger, idle: IdleState) -> None:
        #: A commit may have happened without an answer, or a commit that was answered may be forgotten. The next
        #: transaction that ends well makes sure of both.
        self.is_unsure = True
        self._database, self._backend = storage.database, storage.backend
        self._own_node = own_node
        self._ledger = ledger
        self._idle = idle
        self._recent = reporting.RecentReports()
        self._server: object = None  # which life of the server is known
        self._opened = 0  # how many connections had been made when that was last asked
        self._claims_from = 0.0  # monotonic time; until then all nodes of a restarted server repeat their claims

    def check(self) -> None:
        """Set `is_unsure` if there are new connections: another thread may have noticed a lost server first."""
        if self._server is not None and self._opened != self._database.opened:
            self.is_unsure = True

    def written(self, now: float, reports: reporting.Reports) -> None:
        """Note that a transaction has written *reports*, at the monotonic time *now*."""
        self.is_unsure = False
        self._recent.add(now, reports)

    def may_claim(self) -> bool:
        """Whether the other nodes of a restarted server have had the time to repeat their claims."""
        return monotonic() >= self._claims_from

    def report(self, connection: Connection, reports: reporting.Reports) -> None:
        returned = reporting.write(self._backend, connection, reports, partial(self.complain, connection))
        self._ledger.subscriptions.forget_fronts(returned)

    def report_singly(self, reports: reporting.Reports) -> bool:
        """Write each of *reports* in a transaction of its own; return whether the database refused one of them."""

        def write(reports: reporting.Reports) -> None:
            with self._database.write() as connection:
                self.report(connection, reports)

        is_any_refused = False
        for delivery, outcome in reports:
            ended = reporting.write_one(write, delivery, outcome)
            is_any_refused = is_any_refused or ended is not outcome
            if ended is not None:
                self._recent.add(monotonic(), [(delivery, ended)])
        return is_any_refused

    def complain(self, connection: Connection, deliveries: list[Delivery]) -> None:
        """Log which of *deliveries* had moved on when they were reported, unless the report is a repetition."""
        if not self.is_unsure:
            reporting.complain(connection, deliveries)

    def say_again(self, connection: Connection) -> None:
        """Repeat the claims and reports that a crashed server has forgotten, since they were not yet on its disk."""
        with self._ledger.lock:
            held = [*self._ledger.in_hand.values(), *(one for one, _ in self._recent.reports())]
            held += self._ledger.waiting()
        holds = [one.hold for one in held if one.is_job]
        if holds:
            self._backend.claim_again(connection, holds, self._own_node.id)
            limited = [one.item for one in held if isinstance(one.item, Job) and one.item.limits]
            self._backend.take_again(connection, limited)
        self.report(connection, self._recent.reports())
        self._opened = self._database.opened
        server, self._server = self._server, self._database.dialect.incarnation(connection)
        if server not in (None, self._server):
            self._claims_from = monotonic() + PAUSE * 2

    def reconcile(self, connection: Connection, reports: reporting.Reports) -> None:
        """Give back jobs that this node holds by the table, but does not know: the answer to the claim was lost."""
        known = {one.hold for one, _ in reports}.union(*(holds() for holds in list(self._own_node.holds)))
        forgotten = [hold for hold in finish.held_by(connection, self._own_node.id) if hold not in known]
        if forgotten:
            self._backend.given_back(connection, forgotten, has_begun=False)

    def reborn(self, old: int, new: int) -> None:
        """Drop the jobs that wait: other nodes took this one, with the id *old*, for dead, and have them now.

        Its queues of remote control were deleted with it, so the consumer must connect, and declare them, again.
        """
        ledger = self._ledger
        with ledger.lock:
            if old:  # else the whole database was replaced, which the consumer is told anyway
                ledger.loss = Unavailable("this process was silent for longer than its lease, and taken for dead")
            for subscription in ledger.subscriptions.every():
                subscription.waiting.clear()
            if ledger.wakeup is not None and not ledger.is_closed:
                ledger.replace_wakeup(self._database.wakeup(new))
            self.is_unsure = True
            self._idle.forget()
        ledger.notify()
