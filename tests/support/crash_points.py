"""Does something just before the n-th statement of a connection; before the statement after the last: never."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import psycopg


def kill_before(number: int, connection: Any) -> Callable[[], int]:
    """Kill this process with SIGKILL before the *number*-th statement from now on of SQLAlchemy's *connection*."""
    return _before(number, connection, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def lose_at(number: int, connection: Any) -> Callable[[], int]:
    """Lose *connection* to PostgreSQL at its *number*-th statement, which the server may have executed or not."""
    return _before(number, connection, _end_session)


def _end_session(driver: Any) -> None:
    with psycopg.connect(driver.info.dsn, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 10000)", [driver.info.backend_pid])


def _before(number: int, connection: Any, act: Callable[[Any], object]) -> Callable[[], int]:
    """Call *act* with the driver's connection before the *number*-th statement.

    Statements are counted by the driver: those of SQLite as SQLite begins them, those of PostgreSQL as psycopg begins
    to wait for an answer; BEGIN, savepoints and COMMIT are among them. Returns what returns the number so far.
    """
    driver = connection.connection.driver_connection
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            act(driver)

    if hasattr(driver, "set_trace_callback"):
        driver.set_trace_callback(count)
    else:
        wait = driver.wait

        def counted(*args: Any, **options: Any) -> Any:
            count()
            return wait(*args, **options)

        driver.wait = counted
    return lambda: seen
