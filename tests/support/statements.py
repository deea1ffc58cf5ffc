"""The statements that a test's own process sends to the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine


@contextmanager
def heard(hear: Callable[[str, Any, bool], None]) -> Iterator[None]:
    """Call *hear*(statement, values, whether it is an ``executemany``) before each statement."""

    def listener(_conn: Any, _cursor: Any, statement: str, values: Any, _context: Any, many: bool) -> None:
        hear(statement, values, many)

    event.listen(Engine, "before_cursor_execute", listener)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", listener)


@contextmanager
def counted(containing: str = "") -> Iterator[list[str]]:
    """Collect the statements that contain the text *containing*."""
    statements: list[str] = []
    with heard(lambda statement, _values, _many: statements.append(statement) if containing in statement else None):
        yield statements
