"""A TCP proxy before a database server, which a test can cut off, make silent, or point to another server."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from sqlalchemy import make_url


class Proxy:
    """Listens on a port of its own and passes everything on to the server of *url*."""

    def __init__(self, url: str) -> None:
        behind = make_url(url)
        self._behind = (behind.host, behind.port or 5432)
        self._sockets: list[socket.socket] = []
        self._silent: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        #: The URL of the database by way of the proxy.
        self.url = behind.set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # cut
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._behind)
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if source not in self._silent:
                    target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """Take all that the open connections send, and pass nothing on. New connections work."""
        self._silent.update(self._sockets)

    def switch(self, url: str) -> None:
        """Pass new connections on to the server of *url*."""
        behind = make_url(url)
        self._behind = (behind.host, behind.port or 5432)

    def cut(self) -> None:
        """Refuse new connections, and end the open ones."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cut()
        for one in self._sockets:
            one.close()
