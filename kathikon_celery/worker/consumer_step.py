"""The steps that join Celery's consumer, its pool and the intake as a worker starts and stops."""

from __future__ import annotations

import logging
from threading import current_thread, main_thread
from typing import Any

from celery import bootsteps
from celery.worker import state
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle
from celery.worker.consumer.tasks import Tasks

from kathikon_celery.publish.limiting import AppLimits
from kathikon_celery.settings import mask
from kathikon_celery.storage import limits
from kathikon_celery.transport.transport import Transport
from kathikon_celery.worker.celery_pool import CeleryPool
from kathikon_celery.worker.completing import end_transactions
from kathikon_celery.worker.in_process import report_errors
from kathikon_celery.worker.prefork.ahead import request_of
from kathikon_celery.worker.prefork.pool import FastPool
from kathikon_celery.worker.shutdown import ThreadPool
from kathikon_celery.worker.tracing import carry_results

logger = logging.getLogger(__name__)


class ConsumerStep(bootsteps.StartStopStep):
    """A step of the consumer, which starts once for each connection."""

    requires = (Tasks,)
    #: The pool, as the present connection's intake sees it.
    pool: CeleryPool | None = None

    def __init__(self, c: Any, without_gossip: bool = False, without_mingle: bool = False, **kwargs: Any) -> None:
        self._off = [
            name
            for step, name, unwanted in ((Mingle, "mingle", without_mingle), (Gossip, "gossip", without_gossip))
            if not unwanted and Transport.driver_type not in step.compatible_transports
        ]
        super().__init__(c, **kwargs)

    def start(self, c: Any) -> None:
        """Give the connection's intake its view of the pool."""
        if self._off:
            off, self._off = " and ".join(self._off), []
            logger.info("Kathikon: without %s, which Celery has for RabbitMQ and Redis only", off)
        transport = c.connection.transport
        transport.is_worker = True
        Transport.on_unreachable = staticmethod(_end_if_asked)
        intake = transport.intake
        intake.own_node.name = c.hostname
        for task in c.app.tasks.values():  # the pools whose tasks run in this process
            end_transactions(task)
            carry_results(task, intake.storage)
        report_errors(c.pool)
        limits.define(intake.storage.database, [limit.use_of(limit.name) for limit in AppLimits.of(c.app).all()])
        self.pool = intake.pool = CeleryPool(c, intake.storage)

    def stop(self, c: Any) -> None:
        """Give back at once the jobs that were claimed and have not begun; the pool goes on with those that it has."""
        if c.connection is not None:
            intake = c.connection.transport.intake
            intake.give_back(lambda delivery: delivery.is_job and intake.pool.lets_go(delivery))

    def info(self, c: Any) -> dict[str, Any]:
        """What ``celery inspect stats`` says of the broker, without the password in the URL, and what is paused."""
        if c.connection is None:
            return {}
        broker = c.connection.info()
        del broker["password"]
        shown = {"hostname": c.connection.as_uri(), "alternates": [mask(url) for url in broker["alternates"]]}
        paused = c.connection.transport.intake.subscriptions.paused
        found = {"everything": paused.everything, "queues": sorted(paused.queues), "tasks": list(paused.tasks)}
        return {"broker": broker | shown, "paused": found}

    def shutdown(self, c: Any) -> None:
        """The pool has ended, so it has no delivery any more: closing the connection gives back all that is left.

        Threads that a cold shutdown cannot end may still end their tasks, until the process ends.
        """
        if self.pool is not None and not (isinstance(c.pool, ThreadPool) and c.pool.is_cold):
            self.pool.has_ended = True


def _end_if_asked() -> None:
    """End the worker if it was asked to end.

    While the broker is away, Celery tries without an end to send an event, such as a heartbeat. Celery does not check
    for shutdown signals there; this function does.
    """
    if current_thread() is main_thread():  # only this thread handles signals
        state.maybe_shutdown()


class SentJobs(bootsteps.StartStopStep):
    """At a warm shutdown, keeps the jobs that pool processes have got and have not yet reported to have begun.

    These jobs run. Celery would forget them, and their results.
    """

    requires = ("celery.worker.components:Pool",)

    def close(self, w: Any) -> None:
        """Called before the consumer makes the pool forget all jobs that no process has accepted."""
        pool = getattr(w.pool, "_pool", None)
        if not isinstance(pool, FastPool):  # other pools send nothing ahead
            return
        pool.maintain_pool()  # a job that was sent to a process that has died waits again
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
