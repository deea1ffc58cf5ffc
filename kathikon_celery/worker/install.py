"""Adds Kathikon's steps to a worker whose broker is Kathikon, before Celery builds it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.concurrency import get_implementation, prefork
from kombu.utils.imports import symbol_by_name

from kathikon_celery import frameworks
from kathikon_celery.backports import mark_what_is_revoked
from kathikon_celery.internals import LIBPQ, PARTS, PREFORK, REQUESTS, SHUTDOWN, is_usable
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.publish.limiting import AppLimits
from kathikon_celery.routing import configure, declare_queues
from kathikon_celery.settings import Settings
from kathikon_celery.settings.brokers import is_kathikon
from kathikon_celery.storage import Storage
from kathikon_celery.worker import shutdown
from kathikon_celery.worker.completing import complete_in_transaction, end_transactions
from kathikon_celery.worker.consumer_step import ConsumerStep, SentJobs
from kathikon_celery.worker.log_filters import add_filters
from kathikon_celery.worker.metrics_step import MetricsStep
from kathikon_celery.worker.panel import replace_commands
from kathikon_celery.worker.prefork.pool import TaskPool
from kathikon_celery.worker.request import Request, acknowledge_at_the_end, joined
from kathikon_celery.worker.retrying import retry_failed
from kathikon_celery.worker.services.registry import STEPS
from kathikon_celery.worker.tracing import carry_results, collect_successors

if TYPE_CHECKING:
    from celery import Celery

#: Seconds for which a task that publishes, or stores its result, waits for a database that is away.
PATIENCE = 3600.0


def _in_child(app: Celery, storage: Storage, **kwargs: Any) -> None:
    """Called in a pool child, which has built its tracers."""
    for task in app.tasks.values():
        end_transactions(task)
        carry_results(task, storage)


def install(sender: Any, **kwargs: Any) -> None:
    """Handler of Celery's ``worker_init``: *sender* is the worker, its steps not yet built."""
    app = sender.app
    if not is_kathikon(app.conf.broker_read_url):
        return
    configure(app)
    declare_queues(app)
    mark_what_is_revoked()
    replace_commands()
    app.steps["worker"].update([*STEPS, SentJobs, MetricsStep])
    app.steps["consumer"].add(ConsumerStep)
    if Settings.load(app.conf).rate_limits == "fleet":
        # Those of each worker for itself. The worker has read its setting before this.
        sender.disable_rate_limits = app.conf.worker_disable_rate_limits = True
    has_requests = is_usable(REQUESTS)
    if has_requests and app.Task.Request == "celery.worker.request:Request":
        app.Task.Request = "kathikon_celery.worker.request:Request"
    storage = Storage.for_app(app, setup=False)
    storage.database.patience = PATIENCE
    for part in PARTS:  # before the pool has processes, each of which would log the same
        if part is not LIBPQ or storage.database.url.get_driver_name() == "psycopg":
            is_usable(part)
    app.finalize()
    frameworks.register_tasks()
    AppLimits.of(app).all()  # a wrong one ends the worker here
    signals.worker_process_init.connect(partial(_in_child, app, storage), weak=False, dispatch_uid="kathikon-tracers")
    for task in app.tasks.values():
        if has_requests:
            task.Request = joined(symbol_by_name(task.Request))
        if not issubclass(symbol_by_name(task.Request), Request):
            acknowledge_at_the_end(task)
        complete_in_transaction(task, storage)
        collect_successors(task, storage)
        if storage.settings.retry_failed and not task.name.startswith("celery."):
            retry_failed(task, storage.settings.max_attempts)
    pool = get_implementation(sender.pool_cls)
    if pool is prefork.TaskPool and has_requests and is_usable(PREFORK):
        sender.pool_cls = TaskPool
    elif has_requests and is_usable(SHUTDOWN):
        sender.pool_cls = shutdown.in_process(pool) or sender.pool_cls
    if has_requests and is_usable(SHUTDOWN):
        shutdown.prepare(sender)
    OwnNode.of(storage).name = sender.hostname
    add_filters()
