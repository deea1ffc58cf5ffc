"""A connection of psycopg that waits for no answer without an end: a server that is silent is asked what it does.

TCP does not notice every loss: a proxy, or a machine that hangs, may acknowledge what it never answers.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import suppress
from functools import cache
from math import inf
from time import monotonic
from typing import Any

logger = logging.getLogger(__name__)

#: So many times the silence that makes us ask, a server may work on one statement.
MOST_PERIODS = 6
#: What the backend of a connection does: a row, if it works on a statement.
_AT_WORK = """
SELECT wait_event FROM pg_stat_activity
WHERE pid = %s AND state IN ('active', 'fastpath function call') AND pg_postmaster_start_time() = %s
"""
#: The wait of a commit for a synchronous standby.
_STANDBY = "SyncRep"


def connect(arguments: Mapping[str, Any], silence: float) -> Any:
    """Return a connection of psycopg.

    Arguments:
        arguments: of psycopg's connect().
        silence: seconds without an answer after which a second connection asks whether the server still works on the
            statement. If not, or if there is no answer, the connection is closed, and the statement fails with
            psycopg's `OperationalError`. If so, the first connection waits on, `MOST_PERIODS` times as long at most.
    """
    connection = _connection_class().connect(**arguments)
    connection.asked_with, connection.silence = arguments, silence
    return connection


@cache
def _connection_class() -> Any:
    import psycopg

    class Connection(psycopg.Connection[Any]):
        """Its `wait`, through which psycopg waits for each answer, has an end."""

        silence = inf
        #: Seconds that the server may work on one statement.
        longest: float | None = None
        #: The arguments of connect() for the second connection; `None`: silence alone is enough.
        asked_with: Mapping[str, Any] | None = None
        #: The backend's process, and the time of its server's start: what the second connection asks for.
        identity: tuple[Any, ...] | None = None

        def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
            return super().wait(self._limited(gen), *args, **options)

        def _limited(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            """As *generator*, which psycopg resumes with 0 each tenth of a second while the socket is silent."""
            silent_since = asked = None
            try:
                wanted = next(generator)
                while True:
                    ready = yield wanted
                    if ready:
                        silent_since = None
                    elif silent_since is None:
                        silent_since = asked = monotonic()
                    elif monotonic() - asked > self.silence:  # type: ignore[operator]
                        self._ask(monotonic() - silent_since)
                        asked = monotonic()
                    wanted = generator.send(ready)
            except StopIteration as end:
                return end.value

        def _ask(self, waited: float) -> None:
            """Return if the server works on the statement for which we have *waited*, else raise the loss."""
            at_work, why = None, "and it does not work on a statement of this connection"
            if self.asked_with is None or self.identity is None:
                why = "at all"
            else:
                try:
                    with connect({**self.asked_with, "autocommit": True}, self.silence) as other:
                        other.asked_with = None
                        at_work = other.execute(_AT_WORK, self.identity).fetchone()
                        longest = self.longest or MOST_PERIODS * self.silence
                        if at_work is not None and waited > longest:
                            why, at_work = f"and it has worked for {waited:g} s on a statement, which is ended", None
                            other.execute("SELECT pg_terminate_backend(%s)", self.identity[:1])
                except psycopg.Error as error:
                    why = f"and does not answer another connection: {error}"
            if at_work is None:
                with suppress(psycopg.Error):
                    self.close()
                raise psycopg.OperationalError(f"the server has been silent for {waited:.0f} s, {why}")
            if at_work[0] == _STANDBY:
                logger.warning(
                    "Kathikon: a commit has waited for %.0f s for a synchronous standby, and none is there; see"
                    " synchronous_standby_names of the server", waited,
                )  # fmt: skip

    return Connection
