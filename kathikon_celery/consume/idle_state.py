"""What an intake looks for next, and whether it will be woken when there is work."""

from __future__ import annotations

from datetime import datetime
from time import monotonic

from kathikon_celery.consume.reporting import Reports
from kathikon_celery.storage.engine.wakeup import Wakeup

#: Seconds until the next look after a claim that got fewer jobs than it asked for, if no publication wakes the node.
LOOK_AGAIN = 0.003
#: Pauses, in seconds, between the looks after a node has announced that it is idle. A publication that is committed at
#: that moment does not see the announcement, and wakes no node.
RECHECKS = (0.002, 0.02, 0.2, 1.0)


class IdleState:
    """Whether this node is idle, and what it looks for next.

    A node is idle when its last claim got fewer jobs than it asked for. On PostgreSQL an idle node announces that in
    its row: a publication deletes the announcement of one such node and notifies that node. On SQLite every publication
    wakes all nodes.

    Threads: the intake's thread owns all attributes. Two of them are also set by other threads, under the lock of the
    `Ledger`: `is_called`, to true, and `will_be_woken`, to false. `is_called` is cleared under that lock too, so no
    call is lost. `will_be_woken` is not: a claim that is under way may set it to true again. Then perhaps no process
    wakes the node, and the node finds the next job after the poll interval.
    """

    def __init__(self) -> None:
        #: Look for messages as well as for jobs, for example because the poll interval has passed.
        self.is_called = True
        #: Look for jobs, when the monotonic time is `look_from` or later.
        self.looks_for_jobs = True
        self.look_from = 0.0
        #: Publications can wake this node; on PostgreSQL, because the node's row announces that it is idle.
        self.will_be_woken = False
        #: Numbers of the jobs that other processes have notified this node of, by the keys of their queues.
        self.notified: dict[str, int] = {}
        #: Least seconds between two looks without a wake-up; more than 0 after a look that took long.
        self.cooldown = 0.0
        #: Read what is paused before the next claim.
        self.are_pauses_due = True
        self._rechecks: list[float] = []

    def was_woken(self) -> bool:
        """Whether the next look for jobs is due because of another process, not because of a pause that is over."""
        return self.looks_for_jobs and not self.look_from

    def wake(self, wakeup: Wakeup) -> datetime | None:
        """Another process has called: look at once. Returns since when jobs may be ready that were not visible."""
        self.looks_for_jobs, self.look_from, self.will_be_woken = True, 0.0, False
        self.notified, since = wakeup.calls()
        if wakeup.called_all:
            self.is_called = self.are_pauses_due = True
        return since

    def forget(self) -> None:
        """After an error: look for everything, and announce again that the node is idle."""
        self.will_be_woken, self.is_called, self.are_pauses_due = False, True, True

    def take(self, reports: Reports) -> tuple[bool, bool]:
        """Whether to look for jobs now, and whether for messages as well. *reports* have made room for more of both."""
        for_messages = self.is_called or any(not one.is_job for one, _ in reports)
        for_jobs = self.looks_for_jobs or for_messages or bool(reports)
        self.is_called = self.looks_for_jobs = False
        return for_jobs, for_messages

    def look_again(self, seconds: float = LOOK_AGAIN) -> None:
        """Look for jobs again after so many *seconds*."""
        self.looks_for_jobs, self.look_from = True, monotonic() + seconds

    def announced(self) -> None:
        """The node's row says that the node is idle from now on."""
        self.will_be_woken, self._rechecks = True, list(RECHECKS)
        self.recheck()

    def recheck(self) -> None:
        """Look once more, after the next pause, for what was published while the node announced that it is idle."""
        if self._rechecks:
            self.look_again(self._rechecks.pop(0))
