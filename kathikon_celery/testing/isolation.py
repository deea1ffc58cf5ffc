"""An app on a database of its own, for one test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import kombu.pools
from celery import Celery, _state

from kathikon_celery.settings import mask
from kathikon_celery.storage import Storage

__all__ = ["ScratchApp", "disconnect", "isolated"]


class ScratchApp(Celery):
    """An app for one test: tasks that are declared with its ``task`` are not shared with the apps of other tests.

    >>> with ScratchApp("scratch", set_as_current=False) as app:
    ...     app.config_from_object("kathikon_celery.config")
    """

    def task(self, *args: Any, **options: Any) -> Any:
        """Celery's decorator, with its arguments and options."""
        return super().task(*args, **{"shared": False, **options})


@contextmanager
def isolated(app: Celery, url: str) -> Iterator[Celery]:
    """Have *app* publish to, consume from and store its results in the database *url* inside the ``with`` block.

    >>> with isolated(app, "sqlite:////tmp/scratch.db"):
    ...     add.delay(2, 2)

    Inside it *app* is the current app, so that shared tasks are its own. Afterwards its configuration is restored, also
    where the block has changed it, and the connections to *url* are closed. Publishing does not wait for the disk. No
    worker sends what ``beat_schedule`` says.

    Raises `RuntimeError` when an environment variable would lead the app to another broker or backend.
    """
    broker, current = f"kathikon+{url}", _state._tls.current_app
    _ = app.conf["broker_url"]  # makes Celery read the configuration, which replaces app.conf
    ours = {
        "broker_url": broker,
        "broker_read_url": broker,
        "broker_write_url": broker,
        "result_backend": "kathikon",
        "kathikon_copies": "disc",  # this very database, also in Django's tests
        "kathikon_publish_durability": "server",
        "beat_scheduler": "celery.beat:PersistentScheduler",  # which nobody runs: workers send no schedules
    }
    # Up to Celery 5.6, a name with the namespace, wherever it is set, comes before the name without it.
    prefix: str = app.conf.prefix or ""
    namespaced = {(prefix + name).upper() if prefix.isupper() else prefix + name: value for name, value in ours.items()}
    with patch.dict(app.conf.changes, ours | namespaced):
        for name in ("broker_url", "broker_read_url", "broker_write_url", "result_backend"):
            if (found := getattr(app.conf, name)) != ours[name]:
                raise RuntimeError(
                    f"CELERY_{name.upper()} in the environment leads {app.main!r} to {mask(str(found))!r};"
                    " take it out of the environment of the tests"
                )
        _forget(app)
        app.set_current()
        try:
            yield app
        finally:
            disconnect(app)
            _forget(app)
            _state._tls.current_app = current


def _forget(app: Celery) -> None:
    """Make *app* read its configuration again when it next needs a connection or its result backend."""
    app._after_fork()
    app._backend_cache = None
    app._local = threading.local()  # where each thread has its backend
    for name in ("control", "events"):  # they keep a pool of connections
        vars(app).pop(name, None)


def disconnect(app: Celery) -> None:
    """Close all connections of *app* in this process. It connects again when it needs to.

    >>> disconnect(app)     # before a test drops the database
    """
    pool = app._pool
    if pool is not None:
        pool.force_close_all()
        for group in (kombu.pools.producers, kombu.pools.connections):
            for key, found in list(group.items()):
                if pool in (found, getattr(found, "connections", None)):
                    dict.pop(group, key)  # kombu's own `pop` would hash the key again
    Storage.for_app(app, setup=False).close()
