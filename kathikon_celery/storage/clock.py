"""The database's clock, UTC, as SQL expressions; each dialect registers its words for `now` and `seconds_until`."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import DateTime, Double, bindparam
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
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
