"""Celery's settings for an app that runs on Kathikon: ``app.config_from_object("kathikon_celery.config")``.

A configuration module of one's own begins with ``from kathikon_celery.config import *``. For Django see
`kathikon_celery.django`. Everything here may be overridden, and what is not here has Celery's default.
"""

from typing import Any

from kathikon_celery.routing import ConfiguredQueues, Router, TransportOptions
from kathikon_celery.settings import Settings

__all__ = [
    "broker_connection_max_retries",
    "broker_connection_retry_on_startup",
    "broker_transport_options",
    "broker_url",
    "result_backend",
    "task_acks_late",
    "task_always_eager",
    "task_default_queue",
    "task_queues",
    "task_reject_on_worker_lost",
    "task_routes",
    "task_store_errors_even_if_ignored",
    "timezone",  # noqa: F822  (made by __getattr__)
    "worker_cancel_long_running_tasks_on_connection_loss",
]

# No database in it: that is kathikon_database_url, which may still be set after this module was read.
broker_url = "kathikon://"

# Which app a connection is for: the URL does not tell two apps in one process apart.
broker_transport_options = TransportOptions()

# The same database.
result_backend = "kathikon"

# A job is an obligation: one whose process is lost, by kill -9 or for want of memory, is run again.
task_acks_late = True
task_reject_on_worker_lost = True

# A task with ignore_result that raises for good is a dead job like any other, and its error is to be read there.
task_store_errors_even_if_ignored = True

task_default_queue = "default"  # Kathikon's name for it, where Celery says "celery"
task_queues = ConfiguredQueues()
task_routes = (Router(),)

# Celery's default. It asks for it at each call, and finds sooner what is said here.
task_always_eager = False

# A worker waits for its database as long as that takes. Celery would give up after 100 attempts, and leave it idle.
broker_connection_retry_on_startup = True
broker_connection_max_retries = None

# What runs while the database is away is finished, and acknowledged when it is back.
worker_cancel_long_running_tasks_on_connection_loss = False


def __getattr__(name: str) -> Any:
    # Looked up when Celery asks for it, not when this module is imported. None leaves it to Celery: UTC, or Django's
    # TIME_ZONE. A kathikon_timezone in app.conf is seen to by kathikon_celery.routing.configure.
    if name == "timezone":
        return Settings.given("timezone")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
