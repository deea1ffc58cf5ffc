"""Runs prepared statements on a psycopg connection without its cursors, which take as much time as the server.

Psycopg still converts the values and the rows, waits for the answer, and makes the errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from typing import Any

_PARAMETER = re.compile(r"%\((\w+)\)s|%%")
_numbers = count(1)


class Statement:
    """A statement for libpq, made of a *text* with psycopg's parameters: ``%(name)s``."""

    def __init__(self, text: str) -> None:
        names: dict[str, int] = {}

        def numbered(found: re.Match[str]) -> str:
            return f"${names.setdefault(found[1], len(names) + 1)}" if found[1] else "%"

        self.text = _PARAMETER.sub(numbered, text).encode()
        self.name = b"kathikon_%d" % next(_numbers)
        self.parameters = list(names)


class Session:
    """A connection, and the statements prepared there. Raises psycopg's errors."""

    def __init__(self, connection: Any) -> None:
        from psycopg import errors, generators, pq
        from psycopg.adapt import PyFormat, Transformer

        self._pgconn, self._wait = connection.pgconn, connection.wait
        self._answer, self._error = generators.execute, errors.error_from_result
        self._text, self._rows, self._done = PyFormat.TEXT, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK
        self._converter = Transformer(connection)
        #: None where the next transaction may have another session: what is prepared here would not be known there.
        self._prepared: set[bytes] | None = set() if connection.prepare_threshold is not None else None

    def run(self, statement: Statement, values: Mapping[str, Any]) -> tuple[list[tuple[Any, ...]], int]:
        """Run *statement*; return its rows, and the number of rows that it returned or changed."""
        converter, parameters = self._converter, [_array(values[name]) for name in statement.parameters]
        self.prepare(statement)
        sent = converter.dump_sequence(parameters, [self._text] * len(parameters))
        if self._prepared is None:
            self._pgconn.send_query_params(statement.text, sent)
        else:
            self._pgconn.send_query_prepared(statement.name, sent)
        result = self._result()
        if result.status != self._rows:
            return [], result.command_tuples or 0
        try:
            converter.set_pgresult(result)
            return converter.load_rows(0, result.ntuples, tuple), result.ntuples
        finally:
            converter.set_pgresult(None)  # large payloads must not stay in memory

    def prepare(self, statement: Statement) -> None:
        """Have the server parse *statement*, unless it has done so."""
        if self._prepared is not None and statement.name not in self._prepared:
            self._pgconn.send_prepare(statement.name, statement.text)
            self._result()
            self._prepared.add(statement.name)

    def plain(self, text: str) -> None:
        """Run *text*, which has neither parameters nor rows."""
        self._pgconn.send_query(text.encode())
        self._result()

    def _result(self) -> Any:
        result = self._wait(self._answer(self._pgconn))[-1]
        if result.status not in (self._rows, self._done):
            raise self._error(result)
        return result


def session(pooled: Any) -> Session:
    """Return the session of SQLAlchemy's *pooled* connection, which keeps it while connected."""
    known: Session | None = pooled.info.get(Session)
    if known is None:
        known = pooled.info[Session] = Session(pooled.driver_connection)
    return known


def _array(value: Any) -> Any:
    """Return a list of ints as the text of an array: psycopg would convert the ints one by one."""
    if type(value) is list and set(map(type, value)) == {int}:
        return f"{{{','.join(map(str, value))}}}"
    return value
