"""Types whose words differ between databases.

`BytewiseName`, `LongText` and, in clock.py, `Instant` are classes of their own, so that the module of a dialect can
register its database's words for them with SQLAlchemy's ``compiles``.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import BigInteger, Dialect, Integer, String, Text, bindparam, column, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement, TableValuedAlias
from sqlalchemy.types import TypeDecorator


class BytewiseName(String):
    """A name that is compared byte by byte, whatever the database's collation."""


class LongText(Text):
    """Payloads, which may have megabytes."""


class _Texts(TypeDecorator[list[str]]):
    """A list of texts, as one parameter."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(postgresql.ARRAY(Text) if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: list[str] | None, dialect: Dialect) -> Any:
        return value if dialect.name == "postgresql" else json.dumps(value)


class _rows_of(FunctionElement[str]):  # noqa: N801 (reads as the SQL function that it might be)
    inherit_cache = True
    name = "rows_of"


@compiles(_rows_of, "sqlite")
def _(element: _rows_of, compiler: Any, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(_rows_of, "postgresql")
def _(element: _rows_of, compiler: Any, **options: Any) -> str:
    return f"unnest({compiler.process(element.clauses, **options)})"


def rows_of(parameter: str, hides_length: bool = False) -> TableValuedAlias:
    """Return the parameter, a list of texts of any length, as a table with the column ``value``.

    *hides_length*: PostgreSQL's planner does not look at the list. If it does, it finds that a plan for a short list
    costs less than the plan for all lists, and plans such a statement each time, which may take longer than to run it.
    """
    given: Any = bindparam(parameter, type_=_Texts())
    if hides_length:
        given = select(given).scalar_subquery()
    # PostgreSQL calls the column by the table's name.
    return _rows_of(given).table_valued(column("value", Text()), name="value")


#: A counter: SQLite numbers rows only in a column that it calls INTEGER.
Serial = BigInteger().with_variant(Integer(), "sqlite")
Name = BytewiseName(200).with_variant(postgresql.TEXT(collation="C"), "postgresql")
Long = LongText()
