"""The clock of a database, set by a test: as when a machine's time is corrected, or a laptop wakes.

On SQLite our own ``strftime`` and ``julianday`` take the place of SQLite's, on each connection of the process. On
PostgreSQL a function of the database takes the place of ``statement_timestamp``, for all that connect later.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from time import time
from typing import Any

from sqlalchemy import NullPool, create_engine, make_url, text

from kathikon_celery.storage.dialects.sqlite import SQLite

#: Names the file that has the seconds by which the database's clock is ahead.
VARIABLE = "KATHIKON_TEST_AHEAD"

_POSTGRESQL = """
    CREATE SCHEMA clock;
    CREATE TABLE clock.ahead AS SELECT 0.0::double precision AS seconds;
    CREATE FUNCTION clock.statement_timestamp() RETURNS timestamptz STABLE LANGUAGE sql AS
    'SELECT pg_catalog.statement_timestamp() + make_interval(secs => seconds) FROM clock.ahead';
"""


def replace_clock(connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
    """Have *clock*, in epoch seconds, tell the time on this connection."""
    plain = sqlite3.connect(":memory:", check_same_thread=False)
    lock = threading.Lock()

    def ask(function: str, before: tuple[Any, ...], moment: Any, shifts: tuple[Any, ...]) -> Any:
        if moment == "now":
            moment, shifts = clock(), ("unixepoch", *shifts)
        values = (*before, moment, *shifts)
        with lock:
            return plain.execute(f"SELECT {function}({', '.join('?' * len(values))})", values).fetchone()[0]

    connection.create_function("strftime", -1, lambda form, moment, *shifts: ask("strftime", (form,), moment, shifts))
    connection.create_function("julianday", -1, lambda moment, *shifts: ask("julianday", (), moment, shifts))


def clock_replaced(clock: Callable[[], float]) -> Callable[..., None]:
    """Return a replacement of `SQLite.on_connect` for connections with this *clock*."""
    original = SQLite.on_connect

    def on_connect(self: SQLite, connection: Any, on_disk: bool, publishes: bool) -> None:
        replace_clock(connection, clock)
        original(self, connection, on_disk, publishes)

    return on_connect


def ahead_by_file() -> float:
    """The present, as the file of `VARIABLE` has it."""
    return time() + float(Path(os.environ[VARIABLE]).read_text())


class SteppedClock:
    """The clock of an empty database. Workers need the app ``tests.support.stepped_apps`` and the `environment`."""

    def __init__(self, url: str, directory: Path) -> None:
        self._file = directory / "ahead"
        self._file.write_text("0")
        self.environment = {VARIABLE: str(self._file)}
        self._url, self._is_file = url, url.startswith("sqlite")
        if not self._is_file:
            name = make_url(url).database
            self._run(f'{_POSTGRESQL} ALTER DATABASE "{name}" SET search_path = clock, pg_catalog, public')

    def set_ahead(self, seconds: float) -> None:
        """Set the clock *seconds* ahead of the true time, or behind it."""
        if self._is_file:
            written = self._file.with_suffix(".new")
            written.write_text(str(seconds))
            written.rename(self._file)
        else:
            self._run("UPDATE clock.ahead SET seconds = :seconds", seconds=seconds)

    def _run(self, statements: str, **values: float) -> None:
        url = make_url(self._url).set(drivername="postgresql+psycopg")
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statements), values)
