"""The statements that a test's own process sends to the database."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine


@contextmanager
def heard(hear: Callable[[str, Any, bool], None], all_threads: bool = False) -> Iterator[None]:
    """Call *hear*(statement, values, whether it is an ``executemany``) before each statement of this thread.

    With *all_threads*, also of others: such as those of an earlier test, on another database.
    """
    own = threading.get_ident()

    def listener(_conn: Any, _cursor: Any, statement: str, values: Any, _context: Any, many: bool) -> None:
        if all_threads or threading.get_ident() == own:
            hear(statement, values, many)

    event.listen(Engine, "before_cursor_execute", listener)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", listener)


@contextmanager
def counted(containing: str = "", all_threads: bool = False) -> Iterator[list[str]]:
    """Collect the statements that contain the text *containing*, of this thread or of *all_threads*."""
    statements: list[str] = []

    def hear(statement: str, _values: Any, _many: bool) -> None:
        if containing in statement:
            statements.append(statement)

    with heard(hear, all_threads):
        yield statements
