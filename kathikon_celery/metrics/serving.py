"""Serves the figures: as text, and by HTTP from a worker (``kathikon_metrics_port``)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from socketserver import ThreadingMixIn
from threading import Event, Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kathikon_celery.metrics.collecting import Collector
from kathikon_celery.storage.errors import in_words

if TYPE_CHECKING:
    from celery import Celery

    from kathikon_celery.storage import Storage

logger = logging.getLogger(__name__)

#: Seconds between two attempts to listen at a port that is taken.
PAUSE = 2.0


def registry_of(app: Celery | Storage) -> CollectorRegistry:
    """Return a registry with the figures of *app*, and no others."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(app))
    return registry


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[str, bytes]:
    """Return content type and text of all figures of *registry*, in the form that the header *accept* asks for.

    >>> kind, text = exposition(registry, request.headers.get("accept", ""))

    Raises the database's error if the tables cannot be read.
    """
    encoder, kind = choose_encoder(accept)
    return kind, encoder(registry)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name of the base class)
        """Log nothing: a scrape is no news."""


def serve(app: Celery, host: str, port: int) -> Callable[[], None]:
    """Serve the figures of *app* at ``http://host:port/metrics`` by a thread; return what ends that.

    Logs a warning if the port is taken: perhaps by another worker of this machine, which tells the same. The thread
    tries again every `PAUSE` seconds, and takes the other worker's place when that ends.
    """
    registry = registry_of(app)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        try:
            kind, text = exposition(registry, environ.get("HTTP_ACCEPT", ""))
        except Exception as error:
            start_response("503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"the figures cannot be read: {in_words(error)}\n".encode()]
        start_response("200 OK", [("Content-Type", kind)])
        return [text]

    servers: list[WSGIServer] = []
    ended = Event()

    def listen(level: int = logging.DEBUG) -> None:
        try:
            servers.append(make_server(host, port, answer, _Server, _Handler))
        except OSError as error:
            logger.log(level, "Kathikon: metrics are not served at %s port %s, trying again: %s", host, port, error)

    def run() -> None:
        while not servers and not ended.wait(PAUSE):
            listen()
        if not ended.is_set():
            servers[0].serve_forever()

    def stop() -> None:
        ended.set()
        for server in servers:
            server.shutdown()
        thread.join()
        for server in servers:
            server.server_close()

    listen(logging.WARNING)
    thread = Thread(target=run, name="kathikon-metrics", daemon=True)
    thread.start()
    return stop
