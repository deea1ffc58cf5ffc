"""Serves the figures: as text, and by HTTP from a worker (``kathikon_metrics_port``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.exposition import choose_encoder

from kathikon_celery.metrics.collecting import Collector

if TYPE_CHECKING:
    from celery import Celery

    from kathikon_celery.storage import Storage

logger = logging.getLogger(__name__)


def registry_of(app: Celery | Storage) -> CollectorRegistry:
    """Return a registry with the figures of *app*, and no others."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(app))
    return registry


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[str, bytes]:
    """Return content type and text of all figures, in the form that the header *accept* asks for."""
    encoder, kind = choose_encoder(accept)
    return kind, encoder(registry)


def serve(app: Celery, host: str, port: int) -> Callable[[], None]:
    """Serve the figures of *app* at ``http://host:port/metrics`` by a thread; return what ends that.

    Logs a warning if the port is taken: perhaps by another worker of this machine, which tells the same.
    """
    try:
        server, thread = start_http_server(port, host, registry_of(app))
    except OSError as error:
        logger.warning("Kathikon: metrics are not served at %s port %s: %s", host, port, error)
        return lambda: None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
