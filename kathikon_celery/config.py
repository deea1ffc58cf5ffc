"""Celery's settings for an app that runs on Kathikon: ``app.config_from_object("kathikon_celery.config")``.

A configuration module of one's own begins with ``from kathikon_celery.config import *``. For Django see
`kathikon_celery.django`. Every setting here may be overridden; all others have Celery's defaults.
"""

from typing import Any

from kathikon_celery.routing import ConfiguredQueues, Router, TransportOptions
from kathikon_celery.settings import Settings

__all__ = [
    "beat_scheduler",
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

# The URL names no database: kathikon_database_url does, and it may be set after this module was read.
broker_url = "kathikon://"

# Names the app of a connection: two apps in one process have the same URL.
broker_transport_options = TransportOptions()

# The broker's database.
result_backend = "kathikon"

# A job whose process is lost, by kill -9 or for want of memory, is run again.
task_acks_late = True
task_reject_on_worker_lost = True

# A task with ignore_result that raises for good is a dead job too, and its row has the error.
task_store_errors_even_if_ignored = True

# The workers send what beat_schedule says, each tick once; a beat beside them does nothing.
beat_scheduler = "kathikon_celery.beat:Scheduler"

task_default_queue = "default"  # Kathikon's default; Celery's is "celery"
task_queues = ConfiguredQueues()
task_routes = (Router(),)

# Celery's default. Celery reads this setting at each call, and finds it sooner if it is set.
task_always_eager = False

# A worker waits for its database without limit. Celery would give up after 100 attempts, and leave the worker idle.
broker_connection_retry_on_startup = True
broker_connection_max_retries = None

# Tasks that run while the database is away go on, and are acknowledged when it is back.
worker_cancel_long_running_tasks_on_connection_loss = False


def __getattr__(name: str) -> Any:
    # Looked up when Celery reads it, not when this module is imported. None leaves the time zone to Celery: UTC, or
    # Django's TIME_ZONE. kathikon_celery.routing.configure handles a kathikon_timezone in app.conf.
    if name == "timezone":
        return Settings.given("timezone")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
