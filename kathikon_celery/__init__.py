"""Kathikon for Celery: jobs as rows of the SQL database that you already run.

Importing this package registers the transport ``kathikon://`` with kombu. A Celery app needs no more than
``app.config_from_object("kathikon_celery.config")``. An app whose configuration can only set the broker uses
``kathikon+postgresql://…`` as its broker's URL (see `kathikon_celery.discovery`).

`EmbeddedWorker`, a worker inside this process, `Kathikon`, an operator's verbs, `bulk`, for sending many tasks at once,
and `enqueue_in`, for sending tasks in a transaction of the application's, are imported at their first use: importing
this package is light, and needs neither Celery nor SQLAlchemy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kombu.transport import TRANSPORT_ALIASES

if TYPE_CHECKING:
    from kathikon_celery.limits import Limit, RateLimited
    from kathikon_celery.operate.kathikon import Kathikon
    from kathikon_celery.publish.bulk import bulk
    from kathikon_celery.publish.enqueue_in import enqueue_in
    from kathikon_celery.results.completion import current_session
    from kathikon_celery.unique import NotUnique, Unique
    from kathikon_celery.worker.embedded import EmbeddedWorker

__all__ = [
    "EmbeddedWorker",
    "Kathikon",
    "Limit",
    "NotUnique",
    "RateLimited",
    "Unique",
    "bulk",
    "current_session",
    "enqueue_in",
]

__version__ = "0.1.0"

TRANSPORT_ALIASES["kathikon"] = "kathikon_celery.transport:Transport"


#: Public name -> the module that is imported at the first use of that name.
_AT_FIRST_USE = {
    "EmbeddedWorker": "kathikon_celery.worker.embedded",
    "Kathikon": "kathikon_celery.operate.kathikon",
    "Limit": "kathikon_celery.limits",
    "NotUnique": "kathikon_celery.unique",
    "RateLimited": "kathikon_celery.limits",
    "Unique": "kathikon_celery.unique",
    "bulk": "kathikon_celery.publish.bulk",
    "current_session": "kathikon_celery.results.completion",
    "enqueue_in": "kathikon_celery.publish.enqueue_in",
}


def __getattr__(name: str) -> Any:
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_AT_FIRST_USE[name]), name)
