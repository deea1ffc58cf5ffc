"""Kills this process just before the n-th statement of a connection; before the statement after the last: after all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def kill_before(number: int, connection: Any) -> Callable[[], int]:
    """Kill this process with SIGKILL before the *number*-th statement from now on of SQLAlchemy's *connection*.

    Statements are counted by the driver: those of SQLite as SQLite begins them, those of PostgreSQL as psycopg begins
    to wait for an answer; BEGIN, savepoints and COMMIT are among them. Returns what returns the number so far.
    """
    driver = connection.connection.driver_connection
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if hasattr(driver, "set_trace_callback"):
        driver.set_trace_callback(count)
    else:
        wait = driver.wait

        def counted(*args: Any, **options: Any) -> Any:
            count()
            return wait(*args, **options)

        driver.wait = counted
    return lambda: seen
