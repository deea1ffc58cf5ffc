"""What differs between databases: one module for each, behind one interface of verbs."""

from __future__ import annotations

from importlib import import_module

from sqlalchemy import URL, Connection

from kathikon_celery.storage.dialects.base import ON_DISK, Dialect
from kathikon_celery.storage.engine.prepared import OPTION
from kathikon_celery.storage.errors import UnknownDatabase

__all__ = ["ON_DISK", "OPTION", "Dialect", "dialect_class", "dialect_for", "dialect_of"]

#: By the name that URLs begin with: the module of the dialect, and the class in it.
_DIALECTS = {
    "sqlite": ("sqlite", "SQLite"),
    "postgresql": ("postgresql", "PostgreSQL"),
}


def dialect_class(url: URL) -> type[Dialect]:
    """Return the class of the dialect of *url*. Raises `UnknownDatabase` when there is none."""
    name = url.get_backend_name()
    if name not in _DIALECTS:
        raise UnknownDatabase(f"Kathikon does not speak {name!r}; give the URL of a {' or '.join(_DIALECTS)} database")
    module, found = _DIALECTS[name]
    kind: type[Dialect] = getattr(import_module(f"{__name__}.{module}"), found)
    return kind


def dialect_of(connection: Connection) -> Dialect:
    """Return the dialect of the database that *connection* belongs to."""
    dialect: Dialect = connection.get_execution_options()[OPTION]
    return dialect


def dialect_for(url: URL, schema: str | None = None, wake: str = "auto") -> Dialect:
    """Return the dialect of *url*; the other arguments are settings. Raises `UnknownDatabase` when there is none."""
    return dialect_class(url)(url, schema, wake)
