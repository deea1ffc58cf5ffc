"""Queues and routes of a Celery app, made from its settings when they are first needed.

An app's configuration is complete only when it is used: ``app.conf.update(kathikon_queues=…)`` may come after
``config_from_object``. So the configuration has a `Router` and a `ConfiguredQueues`, which read ``app.conf`` when used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from celery import Celery, current_app
from celery.app.amqp import AMQP
from celery.app.routes import Router as CeleryRouter
from celery.utils.functional import maybe_list
from kombu.entity import Exchange, Queue

import kathikon_celery.hook  # noqa: F401 (adds our parts to a worker that imports this module)
from kathikon_celery.settings import Settings

if TYPE_CHECKING:
    from types import FrameType

    from celery import Task

__all__ = ["ConfiguredQueues", "Router", "TransportOptions", "app_named", "configure", "declare_queues"]

#: The transport option that names the app of a connection.
APP_OPTION = "kathikon_app"
#: Number of task names whose route is cached, for each app.
_MEMO = 4096

_names_of_apps: WeakKeyDictionary[Celery, str] = WeakKeyDictionary()
_named_apps: WeakValueDictionary[str, Celery] = WeakValueDictionary()
_numbers = count(1)


def configure(app: Celery) -> Settings:
    """Return the settings of *app*, and set Celery's ``timezone`` to ``kathikon_timezone``.

    Raises `kathikon_celery.settings.SettingError` for a wrong setting.
    """
    settings = Settings.load(app.conf)
    if "timezone" in settings.sources and str(app.conf.timezone) != settings.timezone:
        app.conf.timezone = settings.timezone
        vars(app).pop("timezone", None)  # a cached property
    return settings


class Router:
    """An entry of Celery's ``task_routes`` that sends each task to the queue whose ``tasks`` name it.

    An exact name comes before every pattern; of several patterns that match, the first configured one counts. A task
    that matches none goes to Celery's ``task_default_queue``, or, if that is no configured queue, to the first queue of
    the settings. ``queue=`` or ``exchange=`` of the caller or the task comes before all routes, as in Celery. The
    settings are read once for each app, when it first publishes.
    """

    def __init__(self) -> None:
        self._routes: WeakKeyDictionary[Celery, Callable[[str], str | None]] = WeakKeyDictionary()

    def __call__(
        self,
        name: str,
        args: Any = None,
        kwargs: Any = None,
        options: Any = None,
        task: Task | None = None,
        **kw: Any,
    ) -> dict[str, str] | None:
        """Return ``{"queue": …}`` for the task called *name*; None leaves it to Celery."""
        app = task.app if task is not None else _asking_app()
        route = self._routes.get(app)
        if route is None:
            route = self._routes[app] = _make_route(app)
        queue = route(name)
        return {"queue": queue} if queue is not None else None

    def __repr__(self) -> str:
        return "Router()"

    def __reduce__(self) -> tuple[type[Router], tuple[()]]:
        return Router, ()


class ConfiguredQueues:
    """An iterable for Celery's ``task_queues``: the queues that the settings name.

    So every process knows them: a worker consumes them unless ``-Q`` or ``-X`` restrict it; ``celery purge`` empties
    them.
    """

    def __iter__(self) -> Iterator[Queue]:
        app = _asking_app()
        return (_queue(app, name) for name in _names(app, configure(app)))

    def __repr__(self) -> str:
        return "ConfiguredQueues()"


class ConfiguredQueue(Queue):
    """A queue that is bound to a channel of ours only once.

    kombu declares the queue for each task that is sent, and binds, that is copies, queue and exchange each time.
    """

    def bind(self, channel: Any) -> Queue:
        """Return this queue bound to *channel*."""
        bound = getattr(channel, "bound", None)
        if bound is None:
            return super().bind(channel)
        known = bound.get(self.name)
        if known is None or known[0] is not self:
            known = bound[self.name] = self, super().bind(channel)
        return known[1]


class TransportOptions(Mapping[str, Any]):
    """Celery's ``broker_transport_options``, which tell the transport the app of a connection.

    ``broker_url`` names no database, so two apps in one process have the same URL. kombu has one pool for all equal
    connections: without this option, the second app would publish to the first app's database.
    """

    def __getitem__(self, name: str) -> str:
        if name != APP_OPTION:
            raise KeyError(name)
        return _name_of(_asking_app())

    def __iter__(self) -> Iterator[str]:
        return iter((APP_OPTION,))

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "TransportOptions()"

    def __reduce__(self) -> tuple[type[TransportOptions], tuple[()]]:
        return TransportOptions, ()


def _name_of(app: Celery) -> str:
    """Return a name of *app* that is unique in this process."""
    name = _names_of_apps.get(app)
    if name is None:
        name = _names_of_apps.setdefault(app, f"{app.main or 'app'}.{next(_numbers)}")
        _named_apps[name] = app
    return name


def app_named(name: str | None) -> Celery | None:
    """Return the app of this process that a connection's `APP_OPTION` names, or `None`."""
    return _named_apps.get(name) if name is not None else None


def declare_queues(app: Celery) -> None:
    """Make a worker of *app* consume the configured queues, beside the queues that it has.

    Does nothing for an app whose ``task_queues`` is a `ConfiguredQueues`. For an app with its own ``task_queues``, the
    queues of an explicit ``kathikon_queues`` are added. After ``-Q`` was applied, added queues serve for routing only.
    For ``-X`` to exclude a queue, call this before, in ``celeryd_init``.
    """
    queues = app.amqp.queues
    add = queues.select_add if queues._consume_from is None else queues.add
    for name in _names(app, configure(app)):
        if name not in queues:
            add(_queue(app, name))


def _asking_app() -> Celery:
    """Return the app for which Celery calls a router, reads queues or reads options.

    Celery passes no app to these, but one of the calling frames has it. The current app may be another one: it is set
    for each thread, and is a default app in other threads of a web server.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Celery):
            return caller
        if isinstance(caller, AMQP | CeleryRouter) and caller.app is not None:
            return caller.app
        frame = frame.f_back
    return current_app._get_current_object()


def _names(app: Celery, settings: Settings) -> list[str]:
    """Names of the queues to consume."""
    names = list(settings.queues) if "queues" in settings.sources else []
    own_queues = app.conf.task_queues and not isinstance(app.conf.task_queues, ConfiguredQueues)
    # Without a Router, Celery sends tasks that no route matches to its default queue.
    routed = names and any(isinstance(route, Router) for route in maybe_list(app.conf.task_routes) or ())
    if not own_queues and not routed and app.conf.task_default_queue not in names:
        names.append(app.conf.task_default_queue)
    return names


def _queue(app: Celery, name: str) -> Queue:
    """Return queue *name* as Celery makes one that is not in ``task_queues``, so that all processes agree."""
    if name == app.conf.task_default_queue:
        return ConfiguredQueue(name, app.amqp.default_exchange, app.conf.task_default_routing_key)
    return ConfiguredQueue(name, Exchange(name), name)


def _make_route(app: Celery) -> Callable[[str], str | None]:
    settings = configure(app)
    exact: dict[str, str] = {}
    patterns: list[tuple[str, str]] = []
    for queue in settings.queues.values():
        for task in queue.tasks:
            if any(character in task for character in "*?["):
                patterns.append((task, queue.name))
            else:
                exact.setdefault(task, queue.name)
    default = None
    if "queues" in settings.sources and app.conf.task_default_queue not in {*settings.queues, *app.amqp.queues}:
        default = next(iter(settings.queues))

    @lru_cache(_MEMO)
    def route(name: str) -> str | None:
        if name in exact:
            return exact[name]
        return next((queue for pattern, queue in patterns if fnmatchcase(name, pattern)), default)

    return route
