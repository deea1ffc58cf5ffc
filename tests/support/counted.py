"""The sample app, in a process that writes the statements it sends to the file ``KATHIKON_TEST_STATEMENTS``."""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from tests.support.apps import app, append_line

__all__ = ["app"]

PATH = os.environ["KATHIKON_TEST_STATEMENTS"]


@event.listens_for(Engine, "before_cursor_execute")
def _hear(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
    append_line(PATH, " ".join(statement.split()))


try:
    import psycopg
except ImportError:
    pass
else:

    class _Connection(psycopg.Connection[Any]):
        """Hears also the statements that bypass SQLAlchemy."""

        def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            append_line(PATH, str(query))
            return super().execute(query, *args, **kwargs)

    psycopg.connect = _Connection.connect
