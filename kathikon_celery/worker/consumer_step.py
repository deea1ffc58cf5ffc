"""Joins Celery's consumer and the transport's intake: how many slots there are, and what the pool has in its hands."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache, partial
from threading import current_thread, main_thread
from typing import Any

from celery import bootsteps
from celery.worker import state
from celery.worker.consumer.tasks import Tasks
from kombu.utils.imports import symbol_by_name

from kathikon_celery.consume.delivery import DONE, Delivery, Outcome, Verdict
from kathikon_celery.consume.subscriptions import UNLIMITED
from kathikon_celery.job import Cause, Job, State
from kathikon_celery.settings import mask
from kathikon_celery.storage.sql import SQLBackend
from kathikon_celery.transport.transport import Transport
from kathikon_celery.worker.prefork.ahead import request_of
from kathikon_celery.worker.prefork.pool import FastPool, TaskPool
from kathikon_celery.worker.request import Request, is_early
from kathikon_celery.worker.services.registry import services_of
from kathikon_celery.worker.tracing import carry_results

#: Celery acknowledges, or rejects, what it cannot make a request of.
UNREADABLE = Outcome(
    Verdict.ENDED, State.DEAD, Cause.UNREADABLE, "the worker could not read the message; its log says why"
)


class ConsumerStep(bootsteps.StartStopStep):
    """A step of the consumer, started for each connection."""

    requires = (Tasks,)

    def start(self, c: Any) -> None:
        """Tell the intake of the pool."""
        transport = c.connection.transport
        transport.is_worker = True
        Transport.on_unreachable = staticmethod(_end_if_asked)
        intake = transport.intake
        intake.own_node.name = c.hostname
        tasks = c.app.tasks

        def is_early_task(name: str) -> bool:
            task = tasks.get(name)
            return task is not None and is_early(task)

        @cache
        def outcome_of(name: str) -> Outcome:
            task = tasks.get(name)
            if task is None:
                return Outcome(Verdict.ENDED, State.DEAD, Cause.UNREGISTERED, f"NotRegistered({name!r})")
            return UNREADABLE if issubclass(symbol_by_name(task.Request), Request) else DONE

        for task in tasks.values():  # the pools whose tasks run in this process
            carry_results(task, intake.storage)
        intake.is_early = is_early_task
        intake.outcome_of = outcome_of
        intake.is_in_pool = is_in_pool
        intake.withdraw = partial(withdraw, c.pool)
        intake.subscriptions.claims_ahead = not c.app.conf.get("worker_disable_prefetch")
        earlier = tuple(state.active_requests)  # what runs for a connection that was lost
        intake.subscriptions.slots = lambda: _slots(c, earlier)
        intake.is_pool_full = lambda: len(state.active_requests) >= _processes(c)
        services = services_of(c.controller)

        def on_call() -> None:
            for service in services:
                if service.heeds_calls:
                    service.nudge()

        intake.on_call = on_call
        if type(intake.storage.backend) is SQLBackend:  # another one is asked by its methods
            intake.askers = services

    def stop(self, c: Any) -> None:
        """Give back at once what was claimed and not begun; the pool goes on with what it has."""
        if c.connection is not None:
            intake = c.connection.transport.intake
            intake.give_back(lambda delivery: delivery.is_job and not is_in_pool(delivery))

    def info(self, c: Any) -> dict[str, Any]:
        """What ``celery inspect stats`` says of the broker: what Celery says, without the password in the URL."""
        if c.connection is None:
            return {}
        broker = c.connection.info()
        del broker["password"]
        shown = {"hostname": c.connection.as_uri(), "alternates": [mask(url) for url in broker["alternates"]]}
        return {"broker": broker | shown}

    def shutdown(self, c: Any) -> None:
        """The pool has ended: what is left is nobody's."""
        if c.connection is not None:
            c.connection.transport.intake.is_in_pool = lambda delivery: False


def _end_if_asked() -> None:
    """As Celery does where it waits for the broker. It sends an event, such as its heartbeat, until it is sent."""
    if current_thread() is main_thread():  # which hears the signals
        state.maybe_shutdown()


class SentJobs(bootsteps.StartStopStep):
    """At a warm shutdown, keeps the jobs that pool children were sent and have not yet told to have begun.

    They run. Celery would forget them, and their results.
    """

    requires = ("celery.worker.components:Pool",)

    def close(self, w: Any) -> None:
        """Called before the consumer has the pool forget all that was not accepted."""
        pool = getattr(w.pool, "_pool", None)
        if not isinstance(pool, FastPool):  # only the processes of prefork are sent anything
            return
        pool.maintain_pool()  # what was sent to a process that is gone waits again
        for job in list(pool._cache.values()):
            request, writer = request_of(job), getattr(job, "_writer", None)
            if request is None:
                continue
            if pool.take_back(job):
                job.discard()
                request._leave()
            elif job._write_to is not None and not (writer and writer() in pool._active_writers):
                job._accepted = True
                state.active_requests.add(request)


def _processes(c: Any) -> int:
    """How many jobs the pool can run at once, when it has grown as far as it may."""
    autoscaler = getattr(c.controller, "autoscaler", None)
    # The autoscaler grows the pool for what was delivered and finds no process.
    if autoscaler is not None:
        return int(autoscaler.max_concurrency)
    if getattr(c.pool, "is_green", False):  # below Celery 5.7, num_processes is how many greenlets are at work
        return int(getattr(c.pool._pool, "size", c.pool.limit)) if c.pool._pool is not None else 0
    return int(getattr(c.pool, "num_processes", 0))  # a pool that has ended has no such number


def _slots(c: Any, earlier: Collection[Any]) -> int:
    """How many jobs the consumer may have from us. Those that began *earlier*, and still run, have their slots."""
    slots = _processes(c) - sum(request in state.active_requests for request in earlier)
    # What waits for its rate limit needs no slot yet. As with any broker, the prefetch count limits how much that is.
    limited = sum(len(bucket.contents) for bucket in list(c.task_buckets.values()) if bucket is not None)
    return max(slots, min(slots + limited, c.qos.value or UNLIMITED)) if limited else slots


def is_in_pool(delivery: Delivery) -> bool:
    """Whether the pool works on the delivery, or has it in its own queue."""
    if not isinstance(delivery.item, Job):
        return False
    request = state.requests.get(delivery.item.id)
    if request is None or getattr(request, "_delivery", None) is not delivery:
        return False
    return request in state.active_requests or request._apply_result is not None


def withdraw(pool: Any, delivery: Delivery) -> bool:
    """Take a job back that nothing has begun; false if it runs, or if it waits for its rate limit."""
    request = state.requests.get(delivery.item.id) if isinstance(delivery.item, Job) else None
    if not isinstance(request, Request) or request._delivery is not delivery:
        return False
    return request.withdraw() or (isinstance(pool, TaskPool) and pool.give_back(request))
