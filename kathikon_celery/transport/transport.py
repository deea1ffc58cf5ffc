"""The kombu transport: one connection of a producer or a consumer."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timezone
from typing import TYPE_CHECKING, Any, ClassVar, cast

import sqlalchemy
from kombu.transport import virtual
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

import kathikon_celery.hook  # noqa: F401 (a worker that has imported this one gets our parts)
from kathikon_celery import frameworks
from kathikon_celery.consume.delivery import Delivery
from kathikon_celery.consume.intake import Intake
from kathikon_celery.publish import fast_path
from kathikon_celery.routing import APP_OPTION, app_named
from kathikon_celery.settings import Settings, absolute, mask, shown
from kathikon_celery.settings.brokers import broker_of, databases_of, is_kathikon
from kathikon_celery.storage import Storage, topology
from kathikon_celery.storage.errors import LOST, StorageError, Unavailable, in_words, is_lost
from kathikon_celery.storage.names import key
from kathikon_celery.transport.channel import Channel

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)


def app_of_connection(options: Mapping[str, Any]) -> Celery | None:
    """Return the app of a connection with these transport *options*.

    If they name none, return an app whose broker is Kathikon, the current app first; `None` if there is none.
    """
    from celery import _state

    app = app_named(options.get(APP_OPTION))
    if app is not None:
        return app
    for app in (_state.get_current_app(), *_state._get_active_apps()):
        if app.configured and is_kathikon(broker_of(app.conf)):
            return cast("Celery", app)
    return None


class Bell:
    """A descriptor that is readable after it was rung."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._rung = False

    def fileno(self) -> int:
        return self._receiver.fileno()

    def ring(self) -> None:
        if not self._rung:
            self._rung = True
            with suppress(OSError):  # closed
                self._sender.send(b"\0")

    def clear(self) -> None:
        with suppress(OSError):
            self._receiver.recv(64)
        self._rung = False

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()


class Transport(virtual.Transport):
    """Messages as rows of a SQL database."""

    Channel = Channel
    can_parse_url = True
    driver_type = "kathikon"
    driver_name = "sqlalchemy"
    polling_interval = None
    connection_errors = (*virtual.Transport.connection_errors, *LOST)
    channel_errors = (*virtual.Transport.channel_errors, DBAPIError)
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"]), heartbeats=False
    )

    #: Called when the database cannot be reached: some of kombu's callers try again without an end, unless it raises.
    on_unreachable: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        #: As those of `client`, which kombu sets to None when it closes the connection.
        self._options = client.transport_options or {}
        client.cycle = None  # `Database` finds the server that can be reached, for all connections
        #: Queues that are deleted when this connection is closed.
        self.exclusive: set[str] = set()
        #: Whether a Celery worker consumes on this connection: then transient messages may be lost without an error.
        self.is_worker = False
        self._storage: Storage | None = None
        self._intake: Intake | None = None
        self._hub: Any = None
        self._bell: Bell | None = None
        self._complained = False

    @property
    def app(self) -> Celery | None:
        """The app of this connection, if there is one."""
        return app_of_connection(self._options)

    @property
    def storage(self) -> Storage:
        """The storage on the database of the connection's URL, or on one of its URLs."""
        if self._storage is None:
            app = self.app
            settings = Settings.load(app.conf if app is not None else None)
            given = [url for url in self.client.alt or [self.client.hostname] if url is not None]
            # Kombu has cut the scheme off the first URL. If the transport was given as a class, no URL has a scheme.
            cut = given[:1] if any(map(is_kathikon, given[1:])) else given
            urls = [f"kathikon+{url}" if url in cut and not is_kathikon(url) else url for url in given]
            self._storage = Storage.shared(databases_of(urls), settings, self.client.connect_timeout)
        return self._storage

    @property
    def intake(self) -> Intake:
        """What claims for this connection's consumers."""
        if self._intake is None:
            queues = self.storage.settings.queues if "queues" in self.storage.settings.sources else {}
            limits = {name: queue.concurrency for name, queue in queues.items()}
            self._intake = Intake(self.storage, limits.get, self.ring)
        return self._intake

    def driver_version(self) -> str:
        return sqlalchemy.__version__

    def as_uri(self, uri: str | None, include_password: bool = False, mask_with: str = "**") -> str:
        """Return the URL of the database, also if only the settings name it; its password if *include_password*."""
        full = uri if uri and is_kathikon(uri) else f"kathikon+{uri}" if uri else "kathikon://"
        try:
            named = databases_of(full)
            url = absolute(make_url(full.partition("+")[2])) if named else self.storage.database.url
        except (ValueError, StorageError):  # the connection's first use says what is wrong
            return full if include_password else mask(full)
        return f"kathikon+{shown(url, include_password)}"

    def establish_connection(self) -> Transport:
        """Connect to the database, and create its tables if needed. Raises `Unavailable`."""
        try:
            self.storage.setup()
        except Unavailable:
            type(self).on_unreachable()
            raise
        if (app := app_named(self._options.get(APP_OPTION))) is not None:
            fast_path.install(app)
        frameworks.install()
        return cast("Transport", super().establish_connection())

    def verify_connection(self, connection: Any) -> bool:
        """Return true: the code that uses the database notices a loss, and waits by itself."""
        return True

    def close_connection(self, connection: Any) -> None:
        """Close the channels, and give back the deliveries that the pool does not have."""
        super().close_connection(connection)
        self._delete_exclusive()
        if self._intake is not None:
            self._intake.stop()
        if self._bell is not None:
            self._hub.remove_reader(self._bell.fileno())
            self._bell.close()
            self._bell = self._hub = None

    def _delete_exclusive(self) -> None:
        if self.exclusive:
            names, self.exclusive = self.exclusive, set()
            with suppress(*LOST), self.storage.database.write() as connection:  # deleted with the node at the latest
                for name in names:
                    topology.delete_queue(connection, key(name))

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Deliver from the worker's event loop, as it reads: what a tick adds is seen only after the next sleep."""
        self._bell = Bell()
        loop.add_reader(self._bell.fileno(), self._on_bell)
        self._hub = loop

    def _on_bell(self) -> None:
        if self._bell is not None:
            self._bell.clear()
            self.intake.pump()

    def ring(self) -> None:
        """Make the event loop hand out the deliveries that wait. Any thread may call this."""
        bell = self._bell
        if bell is not None:
            bell.ring()

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver one message, as callers rely on. Raises `TimeoutError` if none comes within *timeout* seconds."""
        if self.intake.pump(1):
            return
        while not self.intake.wait(timeout if timeout is not None else 1.0):
            if timeout is not None:
                raise TimeoutError
        if not self.intake.pump(1) and timeout is not None:
            raise TimeoutError

    def local_zone(self) -> timezone:
        """Return the time zone of times without one: the app's."""
        app = self.app
        return cast(timezone, app.timezone) if app is not None else timezone.utc

    def corrupt(self, delivery: Delivery, error: Exception) -> None:
        """Log that a row cannot be read."""
        what = "job" if delivery.is_job else "message"
        logger.error("Kathikon: %s %s is dead: %s", what, getattr(delivery.item, "id", delivery.item.seq), error)

    def lost_transient(self, error: Exception) -> None:
        """Log once that events and replies are lost while the database is away; raise any other *error*."""
        if not is_lost(error):
            raise error
        if not self._complained:
            self._complained = True
            logger.warning("Kathikon: events and replies are lost while the database is away: %s", in_words(error))
