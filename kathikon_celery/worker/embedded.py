"""A worker inside this process: for notebooks, scripts and tests.

It is Celery's own worker with all of Kathikon's steps, run in a thread. It leaves out what ``celery worker`` does to a
whole process: signal handlers, the setup of logging, and the event loop, of which a process has only one.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any

from celery._state import _set_task_join_will_block, task_join_will_block
from celery.bootsteps import RUN
from celery.concurrency import thread
from celery.exceptions import WorkerShutdown
from celery.utils.nodenames import gethostname, nodename
from celery.worker import WorkController
from celery.worker.consumer import Consumer as CeleryConsumer

import kathikon_celery.hook  # noqa: F401 (so that the first worker of a process has our parts too)
from kathikon_celery.settings import mask
from kathikon_celery.settings.brokers import broker_urls, is_kathikon
from kathikon_celery.storage import Storage

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["EmbeddedWorker"]

_numbers = count(1)


class ThreadPool(thread.TaskPool):
    """Celery's threads pool, which makes its app the current one in its threads: otherwise that is a default app."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.executor = ThreadPoolExecutor(self.limit, "kathikon-task", initializer=self.app.set_current)


_POOLS = {"threads": ThreadPool, "solo": "solo"}


class Strategies(dict[str, tuple[Any, Any]]):
    """Celery's strategy for each task, as it is registered now: a notebook defines tasks while its worker runs."""

    def __init__(self, consumer: Consumer) -> None:
        super().__init__()
        self._consumer = consumer

    def __getitem__(self, name: str) -> Any:
        consumer = self._consumer
        task = consumer.app.tasks[name]  # with the KeyError Celery logs that the task is unknown
        made_for, strategy = self.get(name, (None, None))
        if made_for is not task:
            consumer.task_buckets[name] = consumer.bucket_for_task(task)
            strategy = task.start_strategy(consumer.app, consumer)
            self[name] = task, strategy
        return strategy


class Consumer(CeleryConsumer):
    """Celery's consumer, which can be asked to stop from another thread."""

    def update_strategies(self) -> None:
        """Called by Celery before it consumes."""
        self.strategies = Strategies(self)

    def perform_pending_operations(self) -> None:
        """Called by Celery's loop before each wait for messages."""
        if self.blueprint.state == RUN:
            self.controller.heed()
        super().perform_pending_operations()

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, trying until the database is there."""
        return conn.ensure_connection(self._on_lost, callback=self.controller.heed)

    def _on_lost(self, error: Exception, interval: float) -> None:
        self.on_connection_error_before_connected(error)


class Controller(WorkController):
    """Celery's worker, which keeps the error that ended it."""

    def __init__(self, **options: Any) -> None:
        self.is_ready = threading.Event()
        #: The error that ended the worker, if any.
        self.failure: BaseException | None = None
        self._is_to_stop = threading.Event()
        super().__init__(ready_callback=lambda _: self.is_ready.set(), **options)

    def run(self) -> None:
        """Work until `ask_to_stop`; the body of the worker's thread."""
        try:
            self.app.set_current()
            self.start()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.is_ready.set()

    def ask_to_stop(self) -> None:
        """Stop the worker warmly: its running tasks finish. Any thread may call it."""
        self._is_to_stop.set()
        connection = self.consumer.connection
        if connection is not None:
            connection.transport.intake.interrupt()

    def heed(self) -> None:
        """In the worker's thread: raise `WorkerShutdown` after `ask_to_stop`."""
        if self._is_to_stop.is_set():
            raise WorkerShutdown(0)

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        """Stop the worker. Celery calls this while it handles the error that ended the worker."""
        error = sys.exc_info()[1]
        if not isinstance(error, SystemExit):
            self.failure = error
        super().stop(in_sighandler, exitcode)


class EmbeddedWorker:
    """A Celery worker in a thread of this process.

    >>> from celery import Celery
    >>> app = Celery("notebook")
    >>> app.config_from_object("kathikon_celery.config")
    >>> app.conf.kathikon_copies = "ram"
    >>> @app.task
    ... def add(x, y):
    ...     return x + y
    >>> with EmbeddedWorker(app):
    ...     add.delay(2, 2).get(timeout=10)
    4

    When the ``with`` block is entered the worker is ready. When the block is left, the running tasks have ended, jobs
    that were claimed and not begun are given back, and the worker's threads are gone. The block may be entered again,
    and there may be several workers at once. Without a block, as in a notebook, use `start` and `stop`.

    Tasks may be defined while the worker runs. Celery keeps the first task of a name; to define it again, as when the
    cell of a notebook runs again, call ``app.tasks.unregister("__main__.add")`` before.

    Logging is left as it is, and no signal handler is set. Time limits need a pool of processes: they have no effect
    here, as in any worker with these pools.

    Arguments:
        app: a Celery app whose broker is Kathikon, in RAM or in a database.
        pool: ``threads``, or ``solo``: one task at a time.
        concurrency: how many tasks run at once.
        worker_options: options of Celery's worker, such as ``queues="default,emails"``, ``hostname``, ``task_events``
            or ``prefetch_multiplier``. Mingle, gossip and the heartbeat event are off by default.

    Raises `ValueError` for another pool, another broker or a concurrency below 1.
    """

    def __init__(self, app: Celery, pool: str = "threads", concurrency: int = 4, **worker_options: Any) -> None:
        if pool not in _POOLS:
            raise ValueError(
                f"pool of EmbeddedWorker is {pool!r}; allowed is {' or '.join(_POOLS)}."
                " Other pools need a process of their own: start `celery worker`"
            )
        if not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency of EmbeddedWorker is {concurrency!r}; allowed is a whole number from 1")
        if not is_kathikon(app.conf.broker_read_url):
            brokers = ";".join(map(mask, broker_urls(app.conf.broker_read_url)))
            raise ValueError(
                f"EmbeddedWorker needs an app whose broker is Kathikon; broker_url of {app.main!r} is {brokers!r}."
                ' Say app.config_from_object("kathikon_celery.config")'
            )
        self.app = app
        #: Celery's name of this worker, for `celery inspect` and the like.
        self.hostname = worker_options.pop("hostname", None) or nodename(
            f"embedded{next(_numbers)}.{os.getpid()}", gethostname()
        )
        self._options = {
            "pool": _POOLS[pool],
            "concurrency": 1 if pool == "solo" else concurrency,
            "without_mingle": True,
            "without_gossip": True,
            "without_heartbeat": True,
            **worker_options,
        }
        self._controller: Controller | None = None
        self._thread: threading.Thread | None = None
        self._patience = 0.0

    def __repr__(self) -> str:
        return f"<EmbeddedWorker {self.hostname} {'running' if self.is_running else 'stopped'}>"

    @property
    def is_running(self) -> bool:
        """Whether its thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, timeout: float = 30.0) -> EmbeddedWorker:
        """Start, and return when the worker is ready.

        Raises the database's error when that cannot be reached, `TimeoutError` when the worker is not ready after
        *timeout* seconds, `RuntimeError` when the worker ended before, or runs already.
        """
        if self._thread is not None:
            raise RuntimeError(f"{self.hostname} runs already; another EmbeddedWorker may be started beside it")
        self.app.finalize()
        database = Storage.for_app(self.app).database
        self._patience = database.patience
        queues, blocks = self.app.amqp.queues, task_join_will_block()
        selected, by_default = queues._consume_from, dict(getattr(queues, "_default_consume_from", {}))
        queues._consume_from = None
        try:
            try:
                self._controller = Controller(
                    app=self.app, hostname=self.hostname, consumer_cls=Consumer, use_eventloop=False, **self._options
                )
            finally:  # the pool has forbidden result.get() in the whole process, also to code outside of tasks
                _set_task_join_will_block(blocks)
            self._thread = threading.Thread(target=self._controller.run, name="kathikon-worker", daemon=True)
            self._thread.start()
            if not self._controller.is_ready.wait(timeout):
                raise TimeoutError(f"{self.hostname} is not ready after {timeout:g} s")
            if self._controller.failure is not None:
                raise RuntimeError(f"{self.hostname} ended before it was ready") from self._controller.failure
        except BaseException:
            with suppress(RuntimeError):
                self.stop()
            raise
        finally:  # a selection of queues is this worker's, not the app's
            queues._consume_from = selected
            for name, queue in by_default.items():
                queues._default_consume_from.setdefault(name, queue)
        return self

    def stop(self, timeout: float | None = None) -> None:
        """Stop warmly: return when the running tasks have ended. Does nothing when the worker is stopped.

        Raises `TimeoutError` when that takes longer than *timeout* seconds (the worker goes on stopping, call again to
        wait for it), `RuntimeError` when the worker had ended by an error.
        """
        controller, thread = self._controller, self._thread
        if controller is None or thread is None:
            return
        controller.ask_to_stop()
        thread.join(timeout)
        if thread.is_alive():
            running = ", ".join(sorted(map(str, controller.state.active_requests)))
            raise TimeoutError(f"{self.hostname} has not ended after {timeout:g} s; tasks that run here: {running}")
        self._controller = self._thread = None
        Storage.for_app(self.app, setup=False).database.patience = self._patience
        if controller.failure is not None:
            raise RuntimeError(f"{self.hostname} had ended by an error") from controller.failure

    def __enter__(self) -> EmbeddedWorker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        else:
            with suppress(RuntimeError):  # the worker's error is in the log; the block's error is raised
                self.stop()
