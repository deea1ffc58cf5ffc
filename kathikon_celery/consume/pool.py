"""What an intake asks of the pool that runs its jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kathikon_celery.consume.delivery import DONE, Delivery, Outcome
from kathikon_celery.storage.idle_query import Asker


class Pool(Protocol):
    """The pool that runs the jobs of an intake. The methods' default answers are those without a pool.

    The intake calls these methods in its own thread, in the consumer's thread, and in the thread that closes the
    connection; often while it holds its lock. No method may wait for another thread or use the database.
    """

    #: Whether jobs are claimed before a slot is free for them.
    claims_ahead: bool = True
    #: Services whose questions the idle intake asks in one statement with its own look for work.
    askers: Sequence[Asker] = ()
    #: How many deliveries in hand are kept by a `Strategy` of their task. The ledger counts them, under its lock.
    kept: int = 0

    def slots(self) -> int | None:
        """How many jobs the pool can run at once; `None` where there is no pool."""
        return None

    def is_full(self) -> bool:
        """Whether all slots are in use, so that the next job waits until another one ends."""
        return False

    def lets_go(self, delivery: Delivery) -> bool:
        """Take back *delivery*, because its consumer ends; false if the pool runs it or keeps it, and will report."""
        return True

    def withdraw(self, delivery: Delivery) -> bool:
        """Take *delivery* out of the pool's queue; false if the pool keeps it, for example because it runs already."""
        return False

    def is_early(self, task: str) -> bool:
        """Whether a message of *task* is acknowledged before the task runs (``acks_late=False``)."""
        return False

    def is_silent(self, task: str) -> bool:
        """Whether the pool accepts an early *task* without notifying the intake: its requests are not Kathikon's."""
        return False

    def keeps(self, task: str) -> bool:
        """Whether *task* has a `Strategy` of its own, which may keep deliveries before the pool gets them."""
        return False

    def outcome_of(self, task: str) -> Outcome:
        """What an acknowledgement of *task* means, unless the consumer sets `Delivery.outcome` to something else."""
        return DONE

    def on_call(self) -> None:
        """Another process has called all nodes: perhaps a job is due soon. Only the intake's thread calls this."""


class NoPool(Pool):
    """For a plain kombu consumer, which has no pool."""

    def on_call(self) -> None:
        pass
