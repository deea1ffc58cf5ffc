"""Reads PostgreSQL's moments that Python does not have, such as 'infinity', as moments far away.

Otherwise psycopg would raise, and one row with such a moment would make the whole answer unreadable.
"""

from __future__ import annotations

from datetime import datetime, timezone
from functools import cache
from typing import Any

#: Read instead of what is earlier than Python's first year, or later than its last one. Some seconds can be added.
EARLIEST = datetime(2, 1, 1, tzinfo=timezone.utc)
LATEST = datetime(9998, 12, 31, tzinfo=timezone.utc)


def adapt(connection: Any) -> None:
    """Make psycopg's *connection* read such moments."""
    connection.adapters.register_loader("timestamptz", _loader())


@cache
def _loader() -> Any:
    import psycopg
    from psycopg.adapt import Loader

    types = psycopg.adapters
    usual: Any = types.get_loader(types.types["timestamptz"].oid, psycopg.pq.Format.TEXT)

    class MomentLoader(Loader):
        def __init__(self, oid: int, context: Any = None) -> None:
            super().__init__(oid, context)
            self._load = usual(oid, context).load

        def load(self, data: Any) -> datetime:
            try:
                return self._load(data)  # type: ignore[no-any-return]
            except psycopg.DataError:
                text = bytes(data)
                return EARLIEST if text.startswith(b"-") or text.endswith(b" BC") else LATEST

    return MomentLoader
