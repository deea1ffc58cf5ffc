"""Connection poolers before PostgreSQL: pgbouncer, where it is installed, and a stand-in that is always there."""

from __future__ import annotations

import os
import pwd
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from tests.support.waiting import wait_until

#: What pgbouncer takes at the start of a connection, besides what it ignores if it is told to.
TRACKED = {"user", "database", "client_encoding", "datestyle", "timezone", "standard_conforming_strings",
           "application_name"}  # fmt: skip
PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


class PgBouncer:
    """pgbouncer on a free port; *mode* is its ``pool_mode``. In turn, a transaction gets each of its connections."""

    def __init__(self, url: str, mode: str) -> None:
        behind = make_url(url)
        self._folder = Path(tempfile.mkdtemp(prefix="kathikon-pgbouncer-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        (self._folder / "ini").write_text(
            f"[databases]\n{behind.database} = host={behind.host} port={behind.port or 5432} user={behind.username}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {mode}\nserver_round_robin = 1\nmin_pool_size = 3\n"
        )
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            self._folder.chmod(0o755)
        self.url = behind.set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    def __enter__(self) -> PgBouncer:
        assert PGBOUNCER is not None
        self._process = subprocess.Popen(
            [PGBOUNCER, str(self._folder / "ini")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            **self._identity,
        )  # fmt: skip
        wait_until(self._answers, 20, "pgbouncer listens")
        return self

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def __exit__(self, *exc_info: object) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder)


class StandIn:
    """What our clients notice of pgbouncer: it refuses parameters that it does not track, has process ids of its own,
    and in transaction mode passes each transaction to the connection that was unused for longest."""

    def __init__(self, url: str, mode: str) -> None:
        behind = make_url(url)
        self._behind, self._mode = (behind.host, behind.port or 5432), mode
        self._startup = _startup({"user": behind.username or "", "database": behind.database or ""})
        self._free: deque[socket.socket] = deque()
        self._sockets: list[socket.socket] = []
        self._welcome = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = behind.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)

    def __enter__(self) -> StandIn:
        self._free.extend([self._new_server() for _ in range(3 if self._mode == "transaction" else 1)])
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            one.close()

    def _new_server(self) -> socket.socket:
        server = self._noted(socket.create_connection(self._behind))
        server.sendall(self._startup)
        self._welcome = b""
        while (message := _message(server))[:1] != b"Z":
            if message[:1] == b"S":
                self._welcome += message
        return server

    def _noted(self, one: socket.socket) -> socket.socket:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.append(one)
        return one

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client = self._noted(self._listener.accept()[0])
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server: socket.socket | None = None
        with suppress(OSError, ValueError):  # closed
            if not self._welcomes(client):
                client.close()
                return
            unanswered = 0
            while True:
                ready = select.select([client, server] if server else [client], [], [])[0]
                if client in ready:
                    message = _message(client)
                    if message[:1] == b"X":
                        break
                    if server is None:
                        server = self._free.popleft() if self._free else self._new_server()
                    unanswered += message[:1] in (b"Q", b"S")
                    server.sendall(message)
                elif server is not None:
                    message = _message(server)
                    client.sendall(message)
                    unanswered -= message[:1] == b"Z"
                    if message[:1] == b"Z" and message[-1:] == b"I" and not unanswered and self._mode == "transaction":
                        self._free.append(server)
                        server = None
        client.close()
        if server is not None:
            server.close()

    def _welcomes(self, client: socket.socket) -> bool:
        while (code := struct.unpack("!i", (body := _body(client))[:4])[0]) != 196608:
            if code == 80877102:  # a request to cancel
                return False
            client.sendall(b"N")  # neither TLS nor GSS
        words = body[4:].rstrip(b"\0").split(b"\0")
        for name in words[::2]:
            if name.decode().lower() not in TRACKED:
                said = b"SFATAL\0C08P01\0Munsupported startup parameter: " + name + b"\0\0"
                client.sendall(b"E" + struct.pack("!i", len(said) + 4) + said)
                return False
        ours = b"K" + struct.pack("!i", 12) + os.urandom(8)
        client.sendall(b"R" + struct.pack("!ii", 8, 0) + self._welcome + ours + b"Z" + struct.pack("!i", 5) + b"I")
        return True


def _startup(parameters: dict[str, str]) -> bytes:
    words = b"".join(word.encode() + b"\0" for pair in parameters.items() for word in pair) + b"\0"
    return struct.pack("!ii", len(words) + 8, 196608) + words


def _read(source: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        if not (more := source.recv(length - len(data))):
            raise OSError("closed")
        data += more
    return data


def _body(source: socket.socket) -> bytes:
    return _read(source, struct.unpack("!i", _read(source, 4))[0] - 4)


def _message(source: socket.socket) -> bytes:
    kind, body = _read(source, 1), _body(source)
    return kind + struct.pack("!i", len(body) + 4) + body
