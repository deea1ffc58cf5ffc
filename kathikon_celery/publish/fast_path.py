"""Sends an app's plain calls in fewer steps than Celery. Celery sends all other calls.

Most calls are plain: a task of the app, with no options but `_PLAIN`, no receiver of a signal of publishing, and no
replaced method of Celery or kombu. Celery looks up settings, route, connection and declared queue for each call. Here
they are cached, until something that they depend on changes. The rows are the same.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

from amqp import AMQPError
from celery import VERSION, Celery, Task, signals
from celery._state import get_current_worker_task
from celery.app.amqp import AMQP
from celery.app.routes import MapRoute
from celery.backends.base import Backend
from celery.utils.nodenames import anon_nodename
from celery.utils.saferepr import saferepr
from kombu import Producer, Queue
from kombu.common import Broadcast, maybe_declare
from kombu.entity import maybe_delivery_mode
from kombu.exceptions import KombuError
from kombu.pools import ProducerPool
from sqlalchemy.exc import DBAPIError

from kathikon_celery.internals import SENDING, is_usable
from kathikon_celery.job import Job
from kathikon_celery.publish.destination import publish_new
from kathikon_celery.publish.envelope import PUBLICATION, checked_priority, common, dumps_call, fold_call
from kathikon_celery.publish.limiting import AppLimits
from kathikon_celery.publish.unconsumed import watch
from kathikon_celery.routing import Router
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import LOST, StorageError
from kathikon_celery.unique import answering

#: Options of a plain call. With any other option that is not None, a call is not plain.
_PLAIN = {
    *("task_id", "task_type", "result_cls", "ignore_result", "queue", "priority", "serializer", "shadow", "producer"),
    *("time_limit", "soft_time_limit", "add_to_parent", "group_id", "group_index", "root_id", "parent_id"),
}
#: Those options that are ids. If one is not text, Celery sends, and makes it text.
_IDS = {"task_id", "group_id", "root_id", "parent_id"}
#: Errors of the broker. Any other, such as the time limit of the sending task, is raised to the caller.
_REFUSALS = (*LOST, DBAPIError, StorageError, KombuError, AMQPError)
#: How many routes are cached, and how many encoded common parts of messages.
_MEMO = 512
#: Celery's default of ``ignore_result``: None from 5.7 on, False before.
_IGNORES = None if VERSION[:2] >= (5, 7) else False
#: Types whose `str` is what `saferepr` makes of them.
_SIMPLE = frozenset({int, float, bool, type(None)})


def _is_own(owner: type, name: str, module: str) -> bool:
    """Whether a method is the original one. Tracing libraries, for example, replace some."""
    method = getattr(owner, name)
    # A proxy has the attributes of the original, but another type.
    return type(method) is FunctionType and method.__globals__.get("__name__") == module


#: Methods that a plain call leaves out. If one was replaced, Celery sends.
_LEFT_OUT = [
    (Celery, "send_task", "celery.app.base"),
    (AMQP, "as_task_v2", "celery.app.amqp"),
    (Producer, "publish", "kombu.messaging"),
]
_ORIGINALS = [(owner, name, getattr(owner, name)) for owner, name, module in _LEFT_OUT]
_SIGNALS = (signals.before_task_publish, signals.after_task_publish, signals.task_sent)


def _is_hooked() -> bool:
    """Whether a signal of publishing has receivers, or a method of `_LEFT_OUT` was replaced."""
    for one in _SIGNALS:  # as expressions, the loops would take twice as long
        if one.receivers:
            return True
    for owner, name, original in _ORIGINALS:  # noqa: SIM110
        if getattr(owner, name) is not original:
            return True
    return False


class _Route(NamedTuple):
    """Where a plain call goes."""

    queue: str
    delivery_mode: int
    is_marked: bool


@dataclass(frozen=True)
class _Cache:
    """What was looked up, and what it depends on."""

    pool: Any
    conf: Any
    changes: dict[str, Any]
    storage: Storage
    serializer: str
    reprs: tuple[int, int, int]
    #: Whether the backend does something for each call whose result is kept.
    calls_backend: bool
    #: Task name and queue of the call -> route; `None`: Celery sends.
    ways: dict[tuple[str, str | None], _Route | None] = field(default_factory=dict)


class Sender:
    """``app.send_task``: the same arguments, the same result, the same row."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._cache: _Cache | None = None

    def __call__(self, name: str, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Send the task called *name*; see `celery.Celery.send_task`."""
        app, parent = self._app, get_current_worker_task()
        if more or not _is_plain(args, kwargs, options) or (parent is not None and not _is_child(parent, options)):
            return self._by_celery(name, args, kwargs, *more, **options)
        known, key = self._cache, (name, options.get("queue"))
        if known is None or not self._is_current(known) or key not in known.ways:
            known = self._lookup(name, args, kwargs, options)
        way = known.ways.get(key) if known is not None else None
        if known is None or way is None or (known.calls_backend and not options.get("ignore_result")):
            return self._by_celery(name, args, kwargs, **options)
        producer = options.get("producer")
        if producer is not None and not _is_for(producer, known.storage):
            return self._by_celery(name, args, kwargs, **options)
        if parent is not None:
            options["root_id"] = options.get("root_id") or parent.request.root_id or parent.request.id
            options["parent_id"] = options.get("parent_id") or parent.request.id
        task_id = options.get("task_id") or new_id()
        job = self._job(known, way, task_id, name, args or (), kwargs or {}, options)
        if way.is_marked:
            AppLimits.of(app).mark(job, args, kwargs)
        try:
            if job.unique is None:
                publish_new(known.storage, job)
            else:
                with answering(options.get("task_id") is None):
                    publish_new(known.storage, job)
        except (*LOST, DBAPIError):  # kombu tries again, and raises its own error
            options |= {"task_id": task_id, PUBLICATION: job.publication}
            return self._by_celery(name, args, kwargs, **options)
        if job.duplicate_of is not None:
            task_id = job.duplicate_of
        result = (options.get("result_cls") or app.AsyncResult)(task_id)
        result.ignored = options.get("ignore_result", _IGNORES)
        if parent is not None and options.get("add_to_parent", True):
            parent.add_trail(result)
        return result

    def _by_celery(self, name: str, args: Any, kwargs: Any, *more: Any, **options: Any) -> Any:
        app = self._app
        is_unique = AppLimits.of(app).unique_of(name) is not None
        with answering(is_unique and options.get("task_id") is None) as found:
            result = type(app).send_task(app, name, args, kwargs, *more, **options)
        return (options.get("result_cls") or app.AsyncResult)(found[0]) if found else result

    def _job(
        self, known: _Cache, way: _Route, task_id: str, name: str, args: Any, kwargs: Any, options: dict[str, Any]
    ) -> Job:
        """Return the job that Celery and kombu would make of the call."""
        given = options.get
        root, group, parent = given("root_id") or task_id, given("group_id"), given("parent_id")
        root = root if root != task_id else None
        of_args, of_kwargs, levels = known.reprs
        own = {"id": task_id, "argsrepr": _simple_repr(args, of_args) or saferepr(args, of_args, maxlevels=levels)}
        if kwargs:
            own["kwargsrepr"] = saferepr(kwargs, of_kwargs, maxlevels=levels)
        priority = checked_priority(given("priority") or 0)
        said = (name, _origin(os.getpid()), self._app.thread_oid, way, given("ignore_result", _IGNORES), priority)
        more = (given("time_limit"), given("soft_time_limit"), given("group_index"), given("shadow"))
        try:
            shared = _common(*said, *more, root, parent, group)
        except TypeError:  # some value is not hashable
            shared = _common.__wrapped__(*said, *more, root, parent, group)
        content_type, encoding, body = dumps_call(args, kwargs, given("serializer") or known.serializer)
        envelope, body = fold_call(own, shared, body, content_type, encoding)
        return Job(
            id=task_id,
            queue=way.queue,
            task=name,
            priority=priority,
            envelope=envelope,
            body=body,
            max_attempts=known.storage.settings.max_attempts,
            root_id=root,
            parent_id=parent,
            group_id=group,
        )

    def _is_current(self, known: _Cache) -> bool:
        """Whether all that *known* depends on is unchanged."""
        return (
            self._app.amqp._producer_pool is known.pool
            and self._app.conf is known.conf
            and known.conf.changes == known.changes
            and not _is_hooked()
        )

    def _lookup(self, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> _Cache | None:
        """Look up the route of such a call, declare its queue, and return the cache with the route.

        `None` without a connection, and after an error of the broker: Celery sends then, and says why.
        """
        app = self._app
        if not self._is_usual():
            return None
        queue = self._queue(name, args, kwargs, options)
        with suppress(*_REFUSALS), app.producer_or_acquire(options.get("producer")) as producer:
            connection = producer.__connection__ if type(producer) is Producer else None
            pool = getattr(connection, "_pool", None)
            if connection is None or pool is not app.amqp.producer_pool.connections or not connection.connected:
                return None
            known = self._cache
            if known is None or not self._is_current(known):
                known = self._build_cache(producer.channel)
            if known is not None:
                if queue is not None:
                    maybe_declare(queue, producer.channel)
                    watch(known.storage, queue.name)
                if len(known.ways) >= _MEMO:
                    known.ways.clear()
                known.ways[name, options.get("queue")] = self._way(name, queue) if queue is not None else None
                self._cache = known
            return known
        return None

    def _is_usual(self) -> bool:
        """Whether the app uses nothing that a plain call leaves out."""
        amqp, conf = self._app.amqp, self._app.conf
        return (
            type(amqp) is AMQP
            and type(amqp.producer_pool) is ProducerPool
            and conf.task_protocol == 2
            and not conf.task_send_sent_event
            and not conf.task_compression
            and not conf.task_inherit_parent_priority
            and all(_is_own(*method) for method in _LEFT_OUT)
            and not _is_hooked()
            and all(isinstance(one, Router | MapRoute) for one in amqp.router.routes)
        )

    def _build_cache(self, channel: Any) -> _Cache | None:
        """Return the cache of a usual app; `None` if its open *channel* is not Kathikon's."""
        app = self._app
        amqp, conf, storage = app.amqp, app.conf, getattr(channel, "storage", None)
        if not isinstance(storage, Storage):
            return None
        return _Cache(
            pool=amqp.producer_pool,
            conf=conf,
            changes=dict(conf.changes),
            storage=storage,
            serializer=conf.task_serializer,
            reprs=(amqp.argsrepr_maxsize, amqp.kwargsrepr_maxsize, conf.get("task_repr_maxlevels", 3)),
            calls_backend=type(app.backend).on_task_call is not Backend.on_task_call,
        )

    def _queue(self, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> Queue | None:
        """Return the queue of such calls; `None` if they need an exchange, or a declaration for each call."""
        route = self._app.amqp.router.route({"queue": options.get("queue")}, name, args, kwargs, options["task_type"])
        queue = route.pop("queue", None)
        if (
            not isinstance(queue, Queue)
            or isinstance(queue, Broadcast)
            or any(value is not None for value in route.values())
            or queue.exchange.type != "direct"
            or not queue.can_cache_declaration
        ):
            return None
        return queue

    def _way(self, name: str, queue: Queue) -> _Route:
        mode = queue.exchange.delivery_mode or self._app.conf.task_default_delivery_mode
        is_marked = AppLimits.of(self._app).is_marked(name, queue.name)
        return _Route(queue.name, maybe_delivery_mode(mode), is_marked)


@lru_cache(maxsize=_MEMO, typed=True)
def _common(
    name: str,
    origin: str,
    reply_to: str,
    way: _Route,
    ignored: Any,
    priority: int,
    time_limit: Any,
    soft_time_limit: Any,
    group_index: Any,
    shadow: Any,
    root: Any,
    parent: Any,
    group: Any,
) -> str:
    """Encode what the messages of calls with these options have in common."""
    of_workflow = {"root_id": root, "parent_id": parent, "group": group, "group_index": group_index}
    given = {**of_workflow, "shadow": shadow}
    headers = {"task": name, "origin": origin} | {key: value for key, value in given.items() if value is not None}
    if ignored is not False:
        headers["ignore_result"] = ignored
    if (time_limit, soft_time_limit) != (None, None):
        headers["timelimit"] = [time_limit, soft_time_limit]
    properties: dict[str, Any] = {
        "reply_to": reply_to,
        "delivery_info": {"exchange": "", "routing_key": way.queue},
    }
    if way.delivery_mode != 2:
        properties["delivery_mode"] = way.delivery_mode
    if priority:
        properties["priority"] = priority
    return common(headers, properties)


def new_id() -> str:
    """Return a random UUID (RFC 9562, version 4), in a third of the time of kombu's `uuid`."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


@lru_cache(maxsize=1)
def _origin(pid: int) -> str:
    return str(anon_nodename())


def _is_plain(args: Any, kwargs: Any, options: dict[str, Any]) -> bool:
    """Whether a call is plain, as far as its arguments and options tell."""
    for name, value in options.items():
        if value is not None and (name not in _PLAIN or (name in _IDS and type(value) is not str)):
            return False
    queue = options.get("queue")
    return (
        options.get("task_type") is not None
        and (queue is None or type(queue) is str)
        and (args is None or type(args) in (tuple, list))
        and (kwargs is None or type(kwargs) is dict)
    )


def _is_child(parent: Task, options: dict[str, Any]) -> bool:
    """Whether the task *parent* sends another job than itself."""
    request = parent.request
    return type(request.id) is str and options.get("task_id") != request.id and type(request.root_id or "") is str


def _is_for(producer: Any, storage: Storage) -> bool:
    """Whether the caller's *producer* does nothing but publish to *storage*."""
    return (
        type(producer) is Producer
        and not producer.compression
        and getattr(getattr(producer, "_batch_local", None), "current", None) is None
        and getattr(producer.channel, "storage", None) is storage
    )


def _simple_repr(args: Any, longest: int) -> str | None:
    """Return what `saferepr` makes of simple arguments; `None` for others, or beyond *longest* characters."""
    parts = []
    for value in args:
        if type(value) in _SIMPLE:
            parts.append(str(value))
        elif type(value) is str and len(value) < longest:
            parts.append("'" + value.replace("'", "\\'") + "'")
        else:
            return None
    joined = ", ".join(parts)
    if len(joined) + 3 > longest:
        return None
    if type(args) is list:
        return f"[{joined}]"
    return f"({joined},)" if len(parts) == 1 else f"({joined})"


#: The headers of Celery's task messages. We would not know the value of any other.
_HEADERS = {
    *("lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id"),
    *("parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers"),
    "stamps",
}


def _are_messages_known(app: Celery) -> bool:
    return set(app.amqp.as_task_v2("id", "name").headers) == _HEADERS


def install(app: Celery) -> None:
    """Make *app* send by a `Sender`, unless it has its own ``send_task``, or Celery's messages have other headers."""
    if (
        type(app).send_task is Celery.send_task
        and "send_task" not in vars(app)
        and is_usable(SENDING)
        and _are_messages_known(app)
    ):
        app.send_task = Sender(app)
