"""What a test's own process asks of the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine


@contextmanager
def heard(hear: Callable[[str, Any, bool], None]) -> Iterator[None]:
    """*hear* is called before each statement, with its values and whether it is run for many."""

    def listener(_conn: Any, _cursor: Any, statement: str, values: Any, _context: Any, many: bool) -> None:
        hear(statement, values, many)

    event.listen(Engine, "before_cursor_execute", listener)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", listener)


@contextmanager
def counted(containing: str = "") -> Iterator[list[str]]:
    """The statements that are run, of which *containing* is a part."""
    statements: list[str] = []
    with heard(lambda statement, _values, _many: statements.append(statement) if containing in statement else None):
        yield statements
