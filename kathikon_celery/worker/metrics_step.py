"""Serves figures for Prometheus from the worker's main process, if the setting ``metrics_port`` says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from kombu.utils.imports import symbol_by_name

from kathikon_celery.settings import Settings

logger = logging.getLogger(__name__)


class MetricsStep(bootsteps.StartStopStep):
    """A thread of the worker that answers scrapes."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        self._settings = Settings.load(parent.app.conf)
        self._end: Callable[[], None] = lambda: None
        super().__init__(parent, **kwargs)

    def include_if(self, parent: Any) -> bool:
        """Only with a port."""
        return self._settings.metrics_port is not None

    def start(self, parent: Any) -> None:
        """Begin to listen. Without the package that writes the figures, log that, and go on."""
        try:
            serve = symbol_by_name("kathikon_celery.metrics.serving:serve")
        except ImportError as error:
            logger.error("Kathikon: no metrics: %s; pip install 'kathikon-celery[metrics]'", error)
            return
        self._end = serve(parent.app, self._settings.metrics_host, self._settings.metrics_port)

    def stop(self, parent: Any) -> None:
        """End the thread."""
        end, self._end = self._end, lambda: None
        end()

    terminate = stop
