"""Adds Kathikon's parts to every worker of this process whose broker is Kathikon, once this module is imported.

The configuration, the transport and the command ``celery kathikon`` import it. A worker imports one of them before
Celery builds it.
"""

from __future__ import annotations

from typing import Any

from celery.signals import worker_init
from kombu.utils.imports import symbol_by_name


@worker_init.connect(weak=False, dispatch_uid="kathikon_celery")
def _install(sender: Any, **_: Any) -> None:
    from click import ClickException

    try:
        symbol_by_name("kathikon_celery.worker.install:install")(sender)
    except ClickException as error:  # Celery would log it and run a worker without our parts
        raise SystemExit(f"Error: {error}") from error
