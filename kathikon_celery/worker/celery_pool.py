"""The pool of a Celery worker as the intake sees it: its slots, and which deliveries are in its hands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery.app.task import Task
from celery.worker import state
from celery.worker.strategy import default
from kombu.utils.imports import symbol_by_name

from kathikon_celery.consume.delivery import DONE, Delivery, Outcome, Verdict
from kathikon_celery.consume.pool import Pool
from kathikon_celery.consume.subscriptions import UNLIMITED
from kathikon_celery.job import Cause, Job, State
from kathikon_celery.storage import Storage
from kathikon_celery.storage.idle_query import Asker
from kathikon_celery.storage.sql import SQLBackend
from kathikon_celery.worker.prefork.pool import TaskPool
from kathikon_celery.worker.request import Request, is_early
from kathikon_celery.worker.services.registry import services_of
from kathikon_celery.worker.shutdown import InProcessPool

#: How a job ends if Celery cannot make a request of its message: Celery acknowledges or rejects that.
UNREADABLE = Outcome(
    Verdict.ENDED, State.DEAD, Cause.UNREADABLE, "the worker could not read the message; its log says why"
)


class CeleryPool(Pool):
    """The pool of one worker, for one connection of its consumer.

    Threads: all attributes stay as they are made, but for `has_ended`, which the worker's thread sets once, and the
    caches, in which two threads may write the same value; for `kept` see `Pool`. Celery's own books, such as
    ``state.active_requests``, are the worker's; other threads only read them.

    Arguments:
        consumer: Celery's, with its app, its controller (the worker) and its pool.
        storage: the database of the connection.
    """

    def __init__(self, consumer: Any, storage: Storage) -> None:
        self.claims_ahead = not consumer.app.conf.get("worker_disable_prefetch")
        #: The pool has ended, and has no delivery any more.
        self.has_ended = False
        self._consumer = consumer
        self._tasks = consumer.app.tasks
        self._services = services_of(consumer.controller)
        # With a backend that is no SQLBackend, each service calls the backend's methods instead.
        self.askers: Sequence[Asker] = self._services if isinstance(storage.backend, SQLBackend) else ()
        self._earlier = tuple(state.active_requests)  # requests of a lost connection that still run
        self._outcomes: dict[str, Outcome] = {}
        self._keeps: dict[Any, bool] = {}
        #: Celery's token buckets of rate limits, by identity: those in use, and replaced ones in which jobs wait.
        self._buckets: dict[int, Any] = {}

    def slots(self) -> int:
        """How many jobs the consumer may have from this connection. Jobs of an earlier one that still run take slots.

        A job that waits for its rate limit, or that a strategy keeps, needs no slot yet. As with any broker, the
        prefetch count limits those jobs.
        """
        consumer = self._consumer
        slots = processes(consumer) - sum(request in state.active_requests for request in self._earlier)
        buckets = {id(bucket): bucket for bucket in list(consumer.task_buckets.values()) if bucket is not None}
        # A new rate limit replaces all buckets. The jobs in an old one wait there until its timer comes.
        old = {name: bucket for name, bucket in self._buckets.items() if name not in buckets and bucket.contents}
        self._buckets = buckets | old
        limited = sum(len(bucket.contents) for bucket in self._buckets.values())
        if not (limited or self.kept):
            return slots
        return max(slots, min(slots + limited + self.kept, consumer.qos.value or UNLIMITED + self.kept))

    def is_full(self) -> bool:
        return len(state.active_requests) >= processes(self._consumer)

    def lets_go(self, delivery: Delivery) -> bool:
        if delivery.is_kept:  # perhaps the pool runs a batch of its strategy
            return self.has_ended or getattr(self._consumer.pool, "is_cold", False)
        if isinstance(self._consumer.pool, InProcessPool) and delivery.decision is not None:
            return delivery.decision.acquire(blocking=False) or self.has_ended
        return self.has_ended or not self._has(delivery) or self.withdraw(delivery)

    def _has(self, delivery: Delivery) -> bool:
        if not isinstance(delivery.item, Job):
            return False
        request = state.requests.get(delivery.item.id)
        if isinstance(request, Request):
            return request._delivery is delivery and (
                request in state.active_requests or request._apply_result is not None
            )
        message = getattr(request, "_message", None)  # of Celery's own request less is known
        return getattr(message, "delivery_tag", None) == delivery.tag and (
            request in state.active_requests or getattr(request, "_apply_result", True) is not None
        )

    def withdraw(self, delivery: Delivery) -> bool:
        """Take back a job that has not begun; false if it runs, or if it waits for its rate limit."""
        request = state.requests.get(delivery.item.id) if isinstance(delivery.item, Job) else None
        if not isinstance(request, Request) or request._delivery is not delivery:
            return False
        pool = self._consumer.pool
        return request.take() or (isinstance(pool, TaskPool) and pool.give_back(request))

    def is_early(self, task: str) -> bool:
        found = self._tasks.get(task)
        return found is not None and is_early(found)

    def is_silent(self, task: str) -> bool:
        found = self._tasks.get(task)
        return found is not None and not issubclass(symbol_by_name(found.Request), Request)

    def keeps(self, task: str) -> bool:
        found = self._tasks.get(task)
        keeps = self._keeps.get(found)
        if keeps is None:
            keeps = self._keeps[found] = found is not None and has_own_strategy(found)
        return keeps

    def outcome_of(self, task: str) -> Outcome:
        outcome = self._outcomes.get(task)
        if outcome is None:
            outcome = self._outcomes[task] = self._found_outcome(task)
        return outcome

    def _found_outcome(self, name: str) -> Outcome:
        task = self._tasks.get(name)
        if task is None:
            return Outcome(Verdict.ENDED, State.DEAD, Cause.UNREGISTERED, f"NotRegistered({name!r})")
        is_ours = issubclass(symbol_by_name(task.Request), Request) and not has_own_strategy(task)
        return UNREADABLE if is_ours else DONE

    def on_call(self) -> None:
        for service in self._services:
            if service.heeds_calls:
                service.nudge()


def has_own_strategy(task: Any) -> bool:
    """Whether code of *task* decides what becomes of its messages, as that of celery-batches does.

    A task whose requests are not Kathikon's is not meant: nothing would tell when the pool gets such a request.
    """
    is_own = type(task).start_strategy is not Task.start_strategy or symbol_by_name(task.Strategy) is not default
    return is_own and issubclass(symbol_by_name(task.Request), Request)


def processes(consumer: Any) -> int:
    """How many jobs the pool can run at once, when it has grown as far as it may."""
    autoscaler, pool = getattr(consumer.controller, "autoscaler", None), consumer.pool
    # The autoscaler grows the pool when delivered jobs find no free process.
    if autoscaler is not None:
        return int(autoscaler.max_concurrency)
    if getattr(pool, "is_green", False):  # below Celery 5.7, num_processes is how many greenlets are at work
        return int(getattr(pool._pool, "size", pool.limit)) if pool._pool is not None else 0
    return int(getattr(pool, "num_processes", 0))  # a pool that has ended has no such number
