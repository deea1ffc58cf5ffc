"""URLs of databases: which are allowed, and how they are shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

#: For each database its drivers; the first one is the default.
DRIVERS: Mapping[str, tuple[str, ...]] = {
    "sqlite": ("pysqlite",),
    "postgresql": ("psycopg",),
}

#: What is allowed as a URL.
_URLS = (
    "a SQLAlchemy URL such as sqlite:///kathikon.db or postgresql://user:password@host/database; "
    "in user and password, percent-encode the characters @ : / ? #"
)


def mask(text: str) -> str:
    """Return *text*, a URL or something that quotes one, without the password in it.

    >>> mask("postgresql://app:secret@db/jobs?sslpassword=hush")
    'postgresql://app:***@db/jobs?sslpassword=***'
    """
    text = re.sub(r"(\w[\w+.-]*://[^:@]*):.*@", r"\1:***@", text, flags=re.DOTALL)
    if not re.match(r"\W?\w[\w+.-]*://", text):  # a malformed URL
        text = re.sub(r"^([^:@]*):.*@", r"\1:***@", text, flags=re.DOTALL)
    if "@" not in text:  # after host: only a port is shown
        text = re.sub(r"(\w://[^:/?\[]*:)(?!\d+\b).*", r"\1***", text, flags=re.DOTALL)
    return re.sub(r"(?i)([?&][^=&]*(?:passw|pwd|secret|token)[^=&]*=)[^&]*", r"\1***", text)


def shown(url: URL, include_password: bool = False) -> str:
    """Return *url* as text; unless *include_password*, its passwords are masked, also those in its options."""
    text = url.render_as_string(hide_password=not include_password)
    return text if include_password else mask(text)


def absolute(url: URL) -> URL:
    """Return *url*; if it names a SQLite file, with the full path of the file."""
    if url.get_backend_name() == "sqlite" and url.database and not url.database.startswith(("file:", ":memory:")):
        return url.set(database=os.path.abspath(url.database))
    return url


def parse_url(value: str | URL) -> URL:
    """Return the SQLAlchemy URL that *value* means, with the driver that Kathikon uses for its kind of database.

    ``postgres://`` and ``postgresql://`` mean ``postgresql+psycopg://``. Raises `ValueError` saying what is allowed for
    a URL that cannot be parsed and for a database or a driver that Kathikon does not speak.
    """
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):  # its message may quote the password, so it is not chained
        raise ValueError(_URLS) from None
    dialect, _, driver = url.drivername.partition("+")
    dialect = {"postgres": "postgresql"}.get(dialect, dialect)
    is_cut_short = "@" in (url.host or "") or ("@" in (url.database or "") and "%40" not in str(value))
    if dialect != "sqlite" and is_cut_short:
        raise ValueError(_URLS)  # the end of a raw password
    if dialect not in DRIVERS:
        raise ValueError(f"a URL that begins with one of {', '.join(f'{name}://' for name in DRIVERS)}")
    if driver and driver not in DRIVERS[dialect]:
        allowed = " or ".join(f"{dialect}+{name}://" for name in DRIVERS[dialect])
        raise ValueError(f"the driver that Kathikon speaks to this database with: {allowed}, or just {dialect}://")
    if dialect == "sqlite" and (url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"):
        raise ValueError('a file, as in sqlite:///kathikon.db; for tables in memory, set kathikon_copies = "ram"')
    return url.set(drivername=dialect if dialect == "sqlite" else f"{dialect}+{driver or DRIVERS[dialect][0]}")


def checked_url(value: Any) -> str:
    """Return *value*, a URL, as `parse_url` reads it; raises `ValueError` saying what is allowed."""
    if not isinstance(value, str | URL):
        raise ValueError("a SQLAlchemy URL")
    return parse_url(value).render_as_string(hide_password=False)
