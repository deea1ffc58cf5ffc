"""The database's clock, UTC, as SQL expressions that every dialect understands."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import DateTime, Double, bindparam
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ColumnElement, FunctionElement
from sqlalchemy.types import TypeDecorator

#: `seconds_until` a moment in the future that the database cannot compute with.
FAR = 1e12


class Instant(TypeDecorator[datetime]):
    """A moment in UTC with microseconds; aware datetimes in Python."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.TIMESTAMP(timezone=True))
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        value = value.astimezone(timezone.utc)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(timezone.utc) if value.tzinfo else value.replace(tzinfo=timezone.utc)


class now(FunctionElement[datetime]):  # noqa: N801 (reads as the SQL function it is)
    """The present; with an argument, the present plus so many seconds."""

    type = Instant()
    inherit_cache = True
    name = "now"


class seconds_until(FunctionElement[float]):  # noqa: N801
    """Seconds from now to a moment, negative when it is past."""

    type = Double()
    inherit_cache = True
    name = "seconds_until"


def seconds(name: str) -> ColumnElement[float]:
    """A bind parameter for the argument of `now`."""
    return bindparam(name, type_=Double())


# Not clock_timestamp(): a value that changes within a statement is compared with each row, without an index.
@compiles(now, "postgresql")
def _(element: now, compiler: Any, **kw: Any) -> str:
    if not len(element.clauses):
        return "statement_timestamp()"
    return f"(statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)}))"


@compiles(seconds_until, "postgresql")
def _(element: seconds_until, compiler: Any, **kw: Any) -> str:
    moment = compiler.process(element.clauses, **kw)
    return f"extract(epoch from {moment} - statement_timestamp())::double precision"


@compiles(now, "sqlite")
def _(element: now, compiler: Any, **kw: Any) -> str:
    shift = ""
    if len(element.clauses):
        shift = f", printf('%+.3f seconds', {compiler.process(element.clauses, **kw)})"
    # Milliseconds, padded to the microseconds in which times are stored, so that text compares as time.
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now'{shift})"


@compiles(seconds_until, "sqlite")
def _(element: seconds_until, compiler: Any, **kw: Any) -> str:
    moment = compiler.process(element.clauses, **kw)
    # julianday() is NULL for a text that is no moment, and for Python's last one, which SQLite rounds up beyond its
    # range. Such a text compares as past, and is promoted, since others wait behind it; or as far ahead.
    past = f"{moment} <= strftime('%Y-%m-%d %H:%M:%f000', 'now')"
    other = f"CASE WHEN {past} THEN -1.0 WHEN {moment} IS NOT NULL THEN {FAR} END"
    return f"coalesce((julianday({moment}) - julianday('now')) * 86400.0, {other})"
