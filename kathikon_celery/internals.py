"""The internals of Celery, billiard, kombu, psycopg and SQLAlchemy that Kathikon uses, and a check that they exist.

Each `Part` of Kathikon replaces code of these packages, and lists the names that it needs. If a name is missing, or has
another signature, the part is left out: the original code runs, and one warning says so. See docs/internals.md.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # hashed by identity, which is fast
class Part:
    """A part of Kathikon that replaces code of another package.

    Each of *needs* is one of

    - ``module:name.of.attribute``: it exists;
    - ``module:function(first, second=)``: it takes these arguments, in this order, and requires no others; an argument
      with ``=`` is passed by keyword;
    - ``module:Class.method > name``: the code of the method mentions *name*, an attribute that it sets or calls.
    """

    name: str
    #: What runs if the part is left out.
    instead: str
    needs: tuple[str, ...]


SENDING = Part(
    "the short way of delay()",
    "Celery's send_task sends every task, in twice the time",
    (
        "celery._state:get_current_worker_task",
        "celery.app.amqp:AMQP.producer_pool",
        "celery.app.amqp:AMQP._producer_pool",
        "celery.app.amqp:AMQP.as_task_v2(self, task_id, name, args=, kwargs=)",
        "celery.app.base:Celery.producer_or_acquire(self, producer)",
        "celery.app.base:Celery.send_task(self, name, args, kwargs)",
        "celery.app.base:Celery.thread_oid",
        "celery.app.routes:MapRoute",
        "celery.backends.base:Backend.on_task_call(self, producer, task_id)",
        "celery.utils.nodenames:anon_nodename()",
        "celery.utils.saferepr:saferepr(o, maxlen, maxlevels=)",
        "kombu.common:maybe_declare(entity, channel)",
        "kombu.entity:maybe_delivery_mode(v)",
        "kombu.messaging:Producer.__connection__",
        "kombu.messaging:Producer.publish(self, body)",
        "kombu.pools:ProducerPool.__init__ > connections",
    ),
)

PREFORK = Part(
    "the prefork pool",
    "Celery's prefork pool runs the tasks, fewer short ones in a second",
    (
        "billiard:Semaphore",
        "billiard.pool:ApplyResult.discard(self)",
        "billiard.pool:ApplyResult.__init__ > _job",
        "billiard.pool:ApplyResult.__init__ > _accepted",
        "billiard.pool:ApplyResult.__init__ > correlation_id",
        "billiard.pool:Pool.__init__ > _cache",
        "billiard.pool:Pool.__init__ > _putlock",
        "billiard.pool:Pool.maintain_pool(self)",
        "billiard.pool:Pool._process_by_pid(self, pid)",
        "billiard.pool:Worker.contribute_to_object(self, obj)",
        "billiard.pool:Worker._make_child_methods(self)",
        "billiard.pool:Worker._make_child_methods > wait_for_job",
        "billiard.pool:LaxBoundedSemaphore.grow(self)",
        "billiard.pool:LaxBoundedSemaphore.shrink(self)",
        "celery.concurrency.asynpool:SCHED_STRATEGIES",
        "celery.concurrency.asynpool:SCHED_STRATEGY_FAIR",
        "celery.concurrency.asynpool:UNAVAIL",
        "celery.concurrency.asynpool:ResultHandler._recv_message(self, add_reader, fd, callback)",
        "celery.concurrency.asynpool:ResultHandler.register_with_event_loop > handle_event",
        "celery.concurrency.asynpool:ResultHandler.__init__ > state_handlers",
        "celery.concurrency.asynpool:AsynPool.ResultHandler",
        "celery.concurrency.asynpool:AsynPool.Worker",
        "celery.concurrency.asynpool:AsynPool.__init__ > _all_inqueues",
        "celery.concurrency.asynpool:AsynPool.__init__ > _fileno_to_inq",
        "celery.concurrency.asynpool:AsynPool.__init__ > _active_writes",
        "celery.concurrency.asynpool:AsynPool.__init__ > _active_writers",
        "celery.concurrency.asynpool:AsynPool.__init__ > _busy_workers",
        "celery.concurrency.asynpool:AsynPool.__init__ > outbound_buffer",
        "celery.concurrency.asynpool:AsynPool._create_write_handlers(self, hub)",
        "celery.concurrency.asynpool:AsynPool._create_write_handlers > _quick_put",
        "celery.concurrency.asynpool:AsynPool.__init__ > _mark_worker_as_available",
        "celery.concurrency.asynpool:AsynPool._create_write_handlers > consolidate_callback",
        "celery.concurrency.asynpool:AsynPool._create_write_handlers > on_poll_start",
        "celery.concurrency.asynpool:AsynPool._on_soft_timeout(self, job, soft, hard, hub)",
        "celery.concurrency.asynpool:AsynPool._on_hard_timeout(self, job)",
        "celery.concurrency.asynpool:AsynPool._process_cleanup_queues(self, proc)",
        "celery.concurrency.asynpool:AsynPool.on_partial_read(self, job, proc)",
        "celery.concurrency.asynpool:AsynPool.create_result_handler(self)",
        "celery.concurrency.asynpool:AsynPool.flush(self)",
        "celery.concurrency.asynpool:AsynPool.on_grow(self, n)",
        "celery.concurrency.asynpool:AsynPool.on_shrink(self, n)",
        "celery.concurrency.asynpool:AsynPool.on_job_ready(self, job, i, obj, inqW_fd)",
        "celery.concurrency.asynpool:AsynPool.terminate_job(self, pid, sig)",
        "celery.concurrency.prefork:TaskPool.Pool",
        "celery.worker.request:Request.execute_using_pool > _apply_result",
        "celery.worker.state:requests",
    ),
)

REQUESTS = Part(
    "the request",
    "Celery's request acknowledges, and a row says less of why a task has ended",
    (
        "celery.concurrency.base:BasePool.apply_async > on_apply",
        "celery.concurrency.base:apply_target(target, args, kwargs, callback, accept_callback)",
        "celery.worker.request:Request.__init__ > _decoded",
        "celery.worker.request:Request.__init__ > _body",
        "celery.worker.request:Request.__init__ > _content_type",
        "celery.worker.request:Request.__init__ > _content_encoding",
        "celery.worker.request:Request.__init__ > _message",
        "celery.worker.request:Request.__init__ > _on_ack",
        "celery.worker.request:Request.__init__ > _on_reject",
        "celery.worker.request:Request.on_success(self, failed__retval__runtime)",
        "celery.worker.request:Request.on_accepted(self, pid, time_accepted)",
        "celery.worker.request:Request.on_failure(self, exc_info, send_failed_event, return_ok)",
        "celery.worker.request:Request.on_timeout(self, soft, timeout)",
        "celery.worker.request:Request._announce_revoked(self, reason, terminated, signum, expired)",
        "celery.worker.request:Request.acknowledge(self)",
        "celery.worker.request:Request.execute_using_pool(self, pool)",
        "celery.worker.request:create_request_cls(base, task, pool, hostname, eventer)",
        "celery.worker.state:requests",
        "celery.worker.state:reserved_requests",
    ),
)

SHUTDOWN = Part(
    "the shutdown",
    "pools of threads and greenlets may run a job twice when their worker ends",
    (
        "celery.concurrency.base:BasePool.apply_async(self, target, args, kwargs)",
        "celery.concurrency.thread:TaskPool.__init__ > executor",
        "celery.platforms:signals",
        "celery.platforms:Signals.__setitem__(self, name, handler)",
        "celery.worker.request:Request._already_revoked",
        "celery.worker.request:Request._already_cancelled",
        "celery.worker.request:Request.cancel(self, pool, signal)",
        "celery.worker.request:Request._announce_cancelled(self)",
        "celery.worker.worker:WorkController.start(self)",
        "celery.worker.worker:WorkController.wait_for_soft_shutdown(self)",
    ),
)

TRACING = Part(
    "the tracer",
    "each task writes its result by itself, and what it sends after its end is sent beside it",
    (
        "celery.app.task:Task.__trace__",
        "celery.app.task:Task.run",
        "celery.app.trace:task_has_custom(task, attr)",
        "celery.app.trace:trace_ok_t.retstr",
        "celery.app.trace:trace_ok_t._replace",
        "celery.app.trace:TraceInfo(state, retval)",
    ),
)

LIBPQ = Part(
    "statements sent by libpq",
    "psycopg's cursors send them, for a third more time",
    (
        "psycopg:Connection.__init__ > pgconn",
        "psycopg:Connection.wait(self, gen)",
        "psycopg.adapt:PyFormat.TEXT",
        "psycopg.adapt:Transformer.dump_sequence",
        "psycopg.adapt:Transformer.set_pgresult",
        "psycopg.adapt:Transformer.load_rows",
        "psycopg.errors:error_from_result(result)",
        "psycopg.generators:execute",
        "psycopg.pq:ExecStatus.TUPLES_OK",
        "psycopg.pq:PGconn.send_prepare",
        "psycopg.pq:PGconn.send_query",
        "psycopg.pq:PGconn.send_query_params",
        "psycopg.pq:PGconn.send_query_prepared",
    ),
)

PREPARED = Part(
    "statements compiled once",
    "SQLAlchemy runs every statement, for more than twice the time",
    (
        "sqlalchemy:Dialect.is_disconnect",
        "sqlalchemy.engine:Connection.__init__ > _has_events",
        "sqlalchemy.engine:Connection.dispatch",
        "sqlalchemy.engine:Engine._has_events",
        "sqlalchemy.exc:DBAPIError.instance(statement, params, orig, dbapi_base_err, hide_parameters=)",
        "sqlalchemy.sql.compiler:SQLCompiler(dialect, statement)",
        "sqlalchemy.sql.compiler:SQLCompiler.positiontup",
        "sqlalchemy.sql.compiler:SQLCompiler.post_compile_params",
        "sqlalchemy.sql.compiler:SQLCompiler.__init__ > bind_names",
        "sqlalchemy.sql.compiler:SQLCompiler.render_literal_value(self, value, type_)",
        "sqlalchemy.sql.compiler:SQLCompiler.visit_bindparam(self, bindparam)",
        "sqlalchemy.sql.expression:BindParameter.__init__ > required",
        "sqlalchemy.sql.expression:BindParameter.__init__ > callable",
        "sqlalchemy.sql.selectable:SelectBase.exported_columns",
        "sqlalchemy.types:TypeEngine.dialect_impl(self, dialect)",
        "sqlalchemy.types:TypeEngine.bind_processor(self, dialect)",
        "sqlalchemy.types:TypeEngine.result_processor(self, dialect, coltype)",
    ),
)

PARTS = (SENDING, PREFORK, REQUESTS, SHUTDOWN, TRACING, LIBPQ, PREPARED)


@cache
def is_usable(part: Part) -> bool:
    """Whether all needs of *part* are met; if not, warn once per process."""
    lacking = missing(part)
    if lacking:
        logger.warning(
            "Kathikon leaves out %s, since this version of what it builds on has no %s (as Kathikon knows it): %s",
            part.name, ", no ".join(lacking), part.instead,
        )  # fmt: skip
    return not lacking


def missing(part: Part) -> list[str]:
    """Return the needs of *part* that are not met."""
    return [need for need in part.needs if not is_met(need)]


def is_met(need: str) -> bool:
    """Whether the installed packages have what *need* describes (see `Part`)."""
    target, _, mentioned = need.partition(" > ")
    target, _, arguments = target.partition("(")
    module, _, path = target.partition(":")
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = _member(found, name)
    except (ImportError, AttributeError):
        return False
    if mentioned:
        return mentioned in _names_in(found)
    return not arguments or _takes(found, [one.strip() for one in arguments.rstrip(")").split(",") if one.strip()])


def _member(owner: Any, name: str) -> Any:
    """Return an attribute of *owner*; `None` if a class only annotates it. Raises `AttributeError`."""
    try:
        return getattr(owner, name)
    except AttributeError:
        if any(name in vars(base).get("__annotations__", {}) for base in getattr(owner, "__mro__", ())):
            return None
        raise


def _names_in(function: Any) -> set[str]:
    """Return the names of attributes and variables in the code of *function* and of its inner functions."""
    found: set[str] = set()
    codes = [inspect.unwrap(function).__code__]
    while codes:
        code = codes.pop()
        found.update(code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars)
        codes += [one for one in code.co_consts if inspect.iscode(one)]
    return found


def _takes(function: Any, arguments: list[str]) -> bool:
    """Whether *function* takes *arguments*, written as in `Part`."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return True
    positional = [one for one in arguments if not one.endswith("=")]
    named = {one[:-1]: None for one in arguments if one.endswith("=")}
    given = list(signature.parameters)[: len(positional)]
    try:
        signature.bind(*positional, **named)
    except TypeError:
        return False
    return given == positional
