"""Types of columns whose words differ between databases.

`BytewiseName`, `LongText` and, in clock.py, `Instant` are classes of their own, so that the module of a dialect can
register its database's words for them with SQLAlchemy's ``compiles``.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Integer, String, Text
from sqlalchemy.dialects import postgresql


class BytewiseName(String):
    """A name that is compared byte by byte, whatever the database's collation."""


class LongText(Text):
    """Payloads, which may have megabytes."""


#: A counter: SQLite numbers rows only in a column that it calls INTEGER.
Serial = BigInteger().with_variant(Integer(), "sqlite")
Name = BytewiseName(200).with_variant(postgresql.TEXT(collation="C"), "postgresql")
Long = LongText()
