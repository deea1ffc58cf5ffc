"""What differs between databases: one module for each, behind one small interface."""

from __future__ import annotations

from sqlalchemy import URL

from kathikon_celery.storage.dialects.base import Dialect
from kathikon_celery.storage.errors import UnknownDatabase

__all__ = ["Dialect", "dialect_for"]


def dialect_for(url: URL) -> Dialect:
    """Return the dialect of *url*. Raises `UnknownDatabase` when there is none."""
    name = url.get_backend_name()
    if name == "sqlite":
        from kathikon_celery.storage.dialects.sqlite import SQLite

        return SQLite(url)
    if name == "postgresql":
        from kathikon_celery.storage.dialects.postgresql import PostgreSQL

        return PostgreSQL(url)
    raise UnknownDatabase(f"Kathikon does not speak {name!r}; give the URL of a sqlite or postgresql database")
