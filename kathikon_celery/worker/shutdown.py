"""The pools whose tasks run in the worker's own process: which tasks have begun, and how a shutdown ends them."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from threading import Timer
from time import monotonic
from typing import Any

from celery import platforms
from celery.concurrency import solo, thread
from celery.concurrency.base import BasePool
from celery.exceptions import WorkerTerminate
from celery.platforms import EX_FAILURE
from celery.worker import state

from kathikon_celery.nodes.own import OwnNode

logger = logging.getLogger(__name__)

#: What a run returns if the job was given back before the task began, and if the task's greenlet was killed.
NOT_BEGUN, KILLED = object(), object()


class InProcessPool(BasePool):
    """What is added to a pool of Celery whose tasks run in the worker's own process.

    Celery's pools do not say which of their tasks have begun, and report that a task whose greenlet was killed has
    returned None.
    """

    #: A cold shutdown has begun. Its handler of signals stops the pool as well, and must not wait for tasks there.
    is_cold = False

    def apply_async(self, target: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run the task of one of our requests, unless the job is given back before a thread or greenlet is free."""
        request: Any = getattr(options.get("callback"), "__self__", None)
        if hasattr(request, "take"):
            args, kwargs = (request, target, args or (), kwargs or {}), {}
            target, options["accept_callback"], options["callback"] = self._run, None, request.on_returned
        return super().apply_async(target, args, kwargs, **options)

    def _run(self, request: Any, target: Any, args: Any, kwargs: Any) -> Any:
        if not request.take():
            return NOT_BEGUN
        request.on_accepted(self.own_pid(), monotonic())
        return target(*args, **kwargs)

    def own_pid(self) -> int:
        """The name that the pool has for what runs the task."""
        return os.getpid()

    def can_cut(self) -> bool:
        """Whether `terminate_job` ends a task that runs. A cold shutdown asks this for each of them."""
        return False

    def wait_softly(self, worker: Any, wait: Any) -> None:
        """Let tasks end for the time of a soft shutdown. *wait* is Celery's way to do so."""
        wait()

    def handle(self, call: Callable[[], None]) -> None:
        """Handle a signal that ends the worker, by *call*."""
        call()


class ThreadPool(InProcessPool):
    """Threads cannot be killed: a cold shutdown gives their jobs back, and ends the process without them."""

    def on_stop(self) -> None:
        """Wait for the tasks that run, until a cold shutdown begins."""
        if self.is_cold:  # perhaps in a handler of signals, which has interrupted a call of the executor
            return
        self.executor.shutdown(wait=False, cancel_futures=True)
        for one in tuple(self.executor._threads):
            while one.is_alive() and not self.is_cold:
                one.join(0.1)
        if not self.is_cold:
            super().on_stop()


class SoloPool(InProcessPool):
    """A task runs in the worker's main thread, where the signals of a shutdown interrupt it."""

    #: A soft shutdown lets the task that was interrupted go on.
    _is_patient = False
    _runs = False
    #: The task ends when the handler of the signal, which has interrupted the task, is done.
    _ends_task = False

    def _run(self, *args: Any) -> Any:
        self._runs = True
        try:
            return super()._run(*args)
        finally:
            self._runs = False

    def can_cut(self) -> bool:
        """Note whether the task, which a signal has interrupted, is to end; it cannot while its signal is handled."""
        self._ends_task = self._runs and not self._is_patient
        self._is_patient = False
        return False

    def wait_softly(self, worker: Any, wait: Any) -> None:
        """Send another signal later: a handler that waits would keep the task from its end."""
        timeout = worker.app.conf.worker_soft_shutdown_timeout
        if not self._runs or not timeout:
            wait()
            return
        logger.warning("Initiating Soft Shutdown, terminating in %s seconds", timeout)
        self._is_patient = True
        again = Timer(timeout, os.kill, (os.getpid(), signal.SIGQUIT))
        again.daemon = True
        again.start()

    def handle(self, call: Callable[[], None]) -> None:
        call()
        if self._ends_task:
            self._ends_task = False
            raise WorkerTerminate(EX_FAILURE)


class GreenPool(InProcessPool):
    """Greenlets can be killed."""

    def _run(self, *args: Any) -> Any:
        from greenlet import GreenletExit  # type: ignore[import-untyped]

        try:
            return super()._run(*args)
        except GreenletExit:
            return KILLED

    def own_pid(self) -> int:
        return int(self.getpid())

    def can_cut(self) -> bool:
        return True

    def on_stop(self) -> None:
        """Wait for the tasks that run, but not in a cold shutdown, which kills them."""
        if not self.is_cold:
            super().on_stop()

    def wait_softly(self, worker: Any, wait: Any) -> None:
        """Take no new tasks meanwhile: the greenlet of the consumer goes on."""
        if worker.consumer.task_consumer:
            worker.consumer.task_consumer.cancel()
        wait()

    def handle(self, call: Callable[[], None]) -> None:
        """As any pool, in a greenlet of its own: the greenlet of the event loop may not wait."""
        if type(self).__module__.endswith("eventlet"):
            from eventlet import spawn  # type: ignore[import-not-found]
        else:
            from gevent import spawn
        spawn(call)


class Signals(platforms.Signals):
    """Celery's table of the handlers of signals: the pool of *worker* calls those that end the worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __setitem__(self, name: str, handler: Any) -> None:
        if name in ("SIGTERM", "SIGINT", "SIGQUIT") and callable(handler):
            handler = partial(self._handle, handler)
        super().__setitem__(name, handler)

    def _handle(self, handler: Any, *args: Any) -> None:
        def call() -> None:
            try:
                handler(*args)
            finally:  # Celery looks for what its handler has noted when the consumer's wait has ended, perhaps twice
                connection = self._worker.consumer.connection
                if connection is not None:
                    connection.transport.intake.interrupt(for_good=True)

        self._worker.pool.handle(call)


def in_process(pool: type) -> type | None:
    """Return Celery's class *pool* with what is added here; `None` if its tasks run in other processes."""
    if issubclass(pool, InProcessPool):
        return pool
    if getattr(pool, "is_green", False):
        added: type = GreenPool
    elif issubclass(pool, thread.TaskPool):
        added = ThreadPool
    elif issubclass(pool, solo.TaskPool):
        added = SoloPool
    else:
        return None
    return type(pool.__name__, (added, pool), {"__module__": pool.__module__})


def prepare(worker: Any) -> None:
    """Make *worker*, Celery's `WorkController`, end as its pool can. Called before the worker has a pool."""
    if (
        hasattr(worker, "install_platform_tweaks")
        and isinstance(worker.pool_cls, type)
        and issubclass(worker.pool_cls, InProcessPool)
    ):
        platforms.signals = Signals(worker)
    wait, start = worker.wait_for_soft_shutdown, worker.start

    def wait_for_soft_shutdown() -> None:  # what each handler of Celery for a cold shutdown calls first
        worker.pool.is_cold = True
        if isinstance(worker.pool, InProcessPool):
            worker.pool.wait_softly(worker, wait)
        else:
            wait()

    def start_and_leave_threads() -> None:
        start()
        running = tuple(state.active_requests)
        if isinstance(worker.pool, ThreadPool) and worker.pool.is_cold and running:
            atexit.unregister(OwnNode.leave_all)  # would count what runs as crashed
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for request in running:  # at the very end: a task that ends before does not run again
                request.abandon()
            os._exit(worker.exitcode or 0)

    worker.wait_for_soft_shutdown, worker.start = wait_for_soft_shutdown, start_and_leave_threads
