"""Kathikon for Celery: jobs as rows of the SQL database that you already run.

Importing this package registers the transport ``kathikon://`` with kombu. A Celery app needs no more than
``app.config_from_object("kathikon_celery.config")``. An app whose configuration can only set the broker uses
``kathikon+postgresql://…`` as its broker's URL (see `kathikon_celery.discovery`).

`EmbeddedWorker`, a worker inside this process, `bulk`, for sending many tasks at once, and `enqueue_in`, for sending
tasks in a transaction of the application's, are imported at their first use: importing this package is light, and needs
neither Celery nor SQLAlchemy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu.transport import TRANSPORT_ALIASES

if TYPE_CHECKING:
    from kathikon_celery.publish.bulk import bulk
    from kathikon_celery.publish.enqueue_in import enqueue_in
    from kathikon_celery.results.completion import current_session
    from kathikon_celery.worker.embedded import EmbeddedWorker

__all__ = ["EmbeddedWorker", "bulk", "current_session", "enqueue_in"]

__version__ = "0.1.0"

TRANSPORT_ALIASES["kathikon"] = "kathikon_celery.transport:Transport"


def __getattr__(name: str) -> Any:
    if name == "EmbeddedWorker":
        from kathikon_celery.worker.embedded import EmbeddedWorker

        return EmbeddedWorker
    if name == "bulk":
        from kathikon_celery.publish.bulk import bulk

        return bulk
    if name == "enqueue_in":
        from kathikon_celery.publish.enqueue_in import enqueue_in

        return enqueue_in
    if name == "current_session":
        from kathikon_celery.results.completion import current_session

        return current_session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
