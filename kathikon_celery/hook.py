"""Has Kathikon's parts added to every worker of this process whose broker is Kathikon.

Importing this module is all. Whatever a worker imports of Kathikon before Celery builds it does so: the configuration,
the transport, the command ``celery kathikon``.
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
    except ClickException as error:  # Celery would log it and run a worker that is none of ours
        raise SystemExit(f"Error: {error}") from error
