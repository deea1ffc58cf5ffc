"""Statements that are run often: compiled once, and then run by the driver itself.

SQLAlchemy's work for one execution takes longer than most of these statements. A statement must be the same object each
time, and its text must not depend on its parameters (no ``expanding`` ones).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Dialect, Double
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.expression import BindParameter

from kathikon_celery.internals import LIBPQ, PREPARED, is_usable
from kathikon_celery.storage.engine import libpq

#: The option of our engines that names the dialect of their connections.
OPTION = "kathikon_dialect"


@lru_cache(maxsize=8)
def _compiler(dialect: Dialect) -> Any:
    """Return a compiler like the dialect's, but with constants in the text: parameters would be sent each time."""
    usual: Any = dialect.statement_compiler

    class Compiler(usual):
        def visit_bindparam(self, bindparam: BindParameter[Any], *args: Any, **options: Any) -> Any:
            if bindparam.required or bindparam.callable or type(bindparam.value) not in (int, str):
                return super().visit_bindparam(bindparam, *args, **options)
            return self.render_literal_value(bindparam.value, bindparam.type)

    return Compiler


class _Prepared:
    """A statement, compiled for one driver."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled: Any = _compiler(dialect)(dialect, statement)
        if compiled.post_compile_params:
            raise TypeError(f"a statement whose text depends on its parameters cannot be prepared: {compiled}")
        self.text = str(compiled)
        self._names: list[str] = list(compiled.positiontup or compiled.params)
        self._is_positional: bool = compiled.positional
        self._libpq = libpq.Statement(self.text) if _is_libpq_usable(dialect) else None
        self._constants: dict[str, Any] = {}
        self._of_values: dict[str, Any] = {}
        for bind, name in compiled.bind_names.items():
            processor = bind.type.dialect_impl(dialect).bind_processor(dialect)
            if not bind.required:
                self._constants[name] = bind.value if processor is None else processor(bind.value)
            elif processor is not None:
                self._of_values[name] = processor
        # From a copy: SQLAlchemy caches the columns, also in statements that are derived from this one.
        columns = statement.execution_options().exported_columns
        self._returns_rows = bool(columns)
        self._of_columns = [
            (number, processor)
            for number, column in enumerate(columns)
            if not isinstance(column.type, Double)  # every driver gives a float
            and (processor := column.type.dialect_impl(dialect).result_processor(dialect, None)) is not None
        ]

    def run(self, pooled: Any, values: Mapping[str, Any]) -> tuple[list[tuple[Any, ...]], int]:
        """Run the statement on a *pooled* connection; return the driver's rows, and the number of changed rows."""
        parameters = self.parameters(values)
        if self._libpq is not None:
            return libpq.session(pooled).run(self._libpq, parameters)
        cursor = pooled.cursor()
        try:  # an unfinished statement keeps its locks, even if its connection is closed
            cursor.execute(self.text, parameters)
            return (cursor.fetchall() if self._returns_rows else []), cursor.rowcount
        finally:
            cursor.close()

    def prepare(self, pooled: Any) -> None:
        """Have the server parse the statement for a *pooled* connection, if the driver can do that."""
        if self._libpq is not None:
            libpq.session(pooled).prepare(self._libpq)

    def parameters(self, values: Mapping[str, Any]) -> Any:
        """Return *values* as the driver takes them. Raises `KeyError` when one is missing."""
        given = {**self._constants, **values}
        for name, processor in self._of_values.items():
            if (value := given[name]) is not None:  # None is NULL in all our types
                given[name] = processor(value)
        if self._is_positional:
            return [given[name] for name in self._names]
        return {name: given[name] for name in self._names}

    def converted(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return *rows* of the driver as values of the columns' types."""
        if not self._of_columns:
            return rows
        changed = [list(row) for row in rows]
        for row in changed:
            for number, processor in self._of_columns:
                row[number] = processor(row[number])
        return [tuple(row) for row in changed]


_prepared = lru_cache(maxsize=512)(_Prepared)


def rows(connection: Connection, statement: Any, values: Mapping[str, Any]) -> Sequence[Any]:
    """Run *statement*, which returns rows, and return them."""
    if _is_watched(connection):
        return connection.execute(statement, values).all()
    prepared = _prepared(statement, connection.dialect)
    with _errors(connection, prepared.text):
        found, _ = prepared.run(connection.connection, values)
    return prepared.converted(found)


def count(connection: Connection, statement: Any, values: Mapping[str, Any]) -> int:
    """Run *statement* and return the number of changed rows."""
    if _is_watched(connection):
        # Without the option, SQLAlchemy says -1 of an INSERT whose key it has asked for.
        return connection.execute(statement, values, execution_options={"preserve_rowcount": True}).rowcount
    prepared = _prepared(statement, connection.dialect)
    with _errors(connection, prepared.text):
        _, changed = prepared.run(connection.connection, values)
    return changed


def ready(connection: Connection, statement: Any) -> None:
    """Compile *statement* and, if the driver can do that, have the server prepare it before it is run."""
    if not _is_watched(connection):
        prepared = _prepared(statement, connection.dialect)
        with _errors(connection, prepared.text):
            prepared.prepare(connection.connection)


def many(connection: Connection, statement: Any, values: Sequence[Mapping[str, Any]]) -> None:
    """Run *statement*, which returns no rows, once for each of *values*."""
    if _is_watched(connection):
        connection.execute(statement, values)
        return
    prepared = _prepared(statement, connection.dialect)
    with _errors(connection, prepared.text), closing(connection.connection.cursor()) as cursor:
        cursor.executemany(prepared.text, [prepared.parameters(one) for one in values])


def plain(connection: Connection, *texts: str) -> None:
    """Run *texts*, statements that have neither parameters nor rows, at once if the driver can do that."""
    if _is_watched(connection):
        for text in texts:
            connection.exec_driver_sql(text)
        return
    with _errors(connection, texts[0]):
        if _is_libpq_usable(connection.dialect):
            libpq.session(connection.connection).plain("; ".join(texts))
        else:
            for text in texts:
                connection.connection.cursor().execute(text)


def _is_libpq_usable(dialect: Dialect) -> bool:
    return dialect.driver == "psycopg" and is_usable(LIBPQ)


def _is_watched(connection: Connection) -> bool:
    """Whether SQLAlchemy has to run the statement.

    Its events have listeners, or we do not know this version, or the connection is the caller's.
    """
    if not is_usable(PREPARED) or OPTION not in connection.get_execution_options():
        return True
    if not (connection._has_events or connection.engine._has_events):  # SQLAlchemy's own short cut
        return False
    return bool(connection.dispatch.before_cursor_execute or connection.dispatch.after_cursor_execute)


class _errors:  # noqa: N801 (a context manager; as a generator it would cost as much as the rest)
    """Raises the driver's errors as SQLAlchemy's, which say whether the connection is lost."""

    __slots__ = ("connection", "text")

    def __init__(self, connection: Connection, text: str) -> None:
        self.connection, self.text = connection, text

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        connection, driver = self.connection, self.connection.dialect.loaded_dbapi.Error
        if not isinstance(error, driver):  # such as a time limit, perhaps in the middle of the statement
            connection.invalidate(error)
            return
        lost = connection.dialect.is_disconnect(error, connection.connection, None)
        if lost:
            with suppress(DBAPIError):  # SQLAlchemy notices the loss, and drops the connections in its pool
                connection.connection.driver_connection.close()  # type: ignore[union-attr]
                connection.exec_driver_sql("SELECT 1")
            connection.invalidate(error)
        raise DBAPIError.instance(
            self.text,
            None,
            error,
            driver,
            hide_parameters=True,
            connection_invalidated=lost,
            dialect=connection.dialect,
        ) from error
