"""Connections to PostgreSQL: the parameters of libpq, and what every session, or every transaction, is told first.

A parameter of the URL, of its service or of the environment (``PGOPTIONS``, ``PGAPPNAME``, …) comes before ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import URL

from kathikon_celery.settings import shown
from kathikon_celery.storage.errors import UnknownDatabase, in_words

#: Milliseconds after which a connection whose data is not acknowledged is lost; TCP itself takes minutes.
UNANSWERED = 25_000
#: The parameters that a connection has if nothing else gives them.
DEFAULTS: Mapping[str, str | int] = {
    "fallback_application_name": "kathikon",
    # The loss of an idle connection is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": UNANSWERED,
}
#: libpq's parameter for the kind of server that is wanted, and its value for one that can be written to.
TARGET, WRITABLE = "target_session_attrs", "read-write"
#: Begins a transaction, whatever isolation is the default of the role or of the database.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
#: A folder of sockets that does not exist: libpq completes the parameters, and then reaches no server.
_NOWHERE = "/kathikon-asks-libpq"
#: Parameters that libpq reads only when it is connected.
_NUMBERS = ("connect_timeout", "keepalives", *(name for name, value in DEFAULTS.items() if isinstance(value, int)))
#: The schema of the tables that the search path leads to; NULL if there are none.
SCHEMA = (
    "(SELECT nspname::text FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
    " WHERE pg_class.oid = to_regclass('kathikon_nodes'))"
)
#: The name of a setting in libpq's ``options``: ``-c name=value``, ``-cname=value``, ``--name=value``.
_OPTION = re.compile(r"(?:^|\s)(?:-c\s*|--)([\w.-]+)\s*=")


def import_psycopg(url: URL) -> Any:
    """Return the module psycopg. Raises `UnknownDatabase`, saying how to install it."""
    try:
        import psycopg
    except ImportError as error:
        raise UnknownDatabase(
            f"{shown(url)} needs the package psycopg, which cannot be imported"
            f" ({error}); say pip install 'kathikon-celery[postgresql]', or set another kathikon_database_url"
        ) from None
    return psycopg


def given(url: URL) -> dict[str, str]:
    """Return the parameters that *url*, its service and the environment give, as libpq itself reads them.

    Raises `UnknownDatabase` for a parameter that libpq does not know, and for a value that it refuses.
    """
    psycopg = import_psycopg(url)
    for name, value in url.query.items():
        if not isinstance(value, str) and name not in ("host", "port"):
            raise UnknownDatabase(f"{shown(url)}: {name!r} is given {len(value)} times; give it once")
    _, own = url.get_dialect()().create_connect_args(url)
    named = {**own, "host": _NOWHERE, "hostaddr": "", "port": 1}
    try:
        asked = psycopg.pq.PGconn.connect_start(psycopg.conninfo.make_conninfo(**named).encode())
    except psycopg.ProgrammingError as error:
        raise UnknownDatabase(f"{shown(url)}: {in_words(error)}; allowed are the parameters of libpq") from None
    if _NOWHERE.encode() not in asked.error_message:
        raise UnknownDatabase(f"{shown(url)}: {asked.error_message.decode(errors='replace').strip()}")
    # A default of libpq's counts as not given, unless the URL says it.
    found = {
        name: option.val.decode()
        for option in asked.info
        if option.val is not None and ((name := option.keyword.decode()) in url.query or option.val != option.compiled)
    }
    asked.finish()
    for name in _NUMBERS:
        if name in found and not found[name].strip().isdigit():
            raise UnknownDatabase(f"{shown(url)}: {name} = {found[name]!r}: allowed is a whole number")
    return found


def connect_args(known: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """Return what psycopg's connect() takes besides the *known* parameters. *timeout*: seconds."""
    ours = {"connect_timeout": max(2, round(timeout)), **DEFAULTS}
    ours = {name: value for name, value in ours.items() if name not in known}
    if must_be_writable(known):
        ours[TARGET] = WRITABLE
    return {**ours, "client_encoding": "UTF8"}  # whatever the database's own encoding is


def must_be_writable(known: Mapping[str, str]) -> bool:
    """Whether only a server that can be written to is wanted: unless URL, service or environment say otherwise."""
    return known.get(TARGET, os.environ.get("PGTARGETSESSIONATTRS", WRITABLE)) == WRITABLE


def session(known: Mapping[str, str], schema: str | None, on_disk: bool, publishes: bool) -> dict[str, str]:
    """Return the settings of a session. What the user gives as ``options`` comes before those that are not needed."""
    ours = {"synchronous_commit": "on" if on_disk else "off", "timezone": "UTC"}
    if publishes:  # else PostgreSQL plans each of the first five INSERTs, which takes as long as the INSERT
        ours["plan_cache_mode"] = "force_generic_plan"
    options = {name.replace("-", "_").lower() for name in _OPTION.findall(known.get("options", ""))}
    return {name: value for name, value in ours.items() if name not in options} | dict(_needed(schema))


def _needed(schema: str | None) -> Iterator[tuple[str, str]]:
    yield "default_transaction_isolation", "read committed"
    yield "datestyle", "ISO"  # psycopg reads no other one
    if schema is not None:
        yield "search_path", quoted(schema)


def begin_pooled(on_disk: bool, schema: str | None) -> list[str]:
    """Return the statements that begin a transaction on a session that is not ours."""
    path = [f"SET LOCAL search_path = {quoted(schema)}"] if schema is not None else []
    return [BEGIN, commit_on_disk(on_disk), "SET LOCAL datestyle = 'ISO'", *path]


def commit_on_disk(on_disk: bool) -> str:
    """Return the statement that says whether the commit of this transaction waits for the disk."""
    return f"SET LOCAL synchronous_commit = {'on' if on_disk else 'off'}"


def tell(connection: Any, settings: Mapping[str, str], trusted: bool) -> tuple[bool, str | None]:
    """Give a new *connection* of psycopg its *settings*, if it has its server process for itself.

    A pooler such as pgbouncer answers with a process id of its own. It may hand the server process to another client
    after each transaction, with our settings. *trusted*: it keeps the process for us.

    Returns whether the settings were given, and the schema of the tables, if there are tables.
    """
    told = ", ".join("CASE WHEN is_ours THEN set_config(%s, %s, false) END" for _ in settings)
    query = f"SELECT is_ours, {told}, {SCHEMA} FROM (SELECT %s OR pg_backend_pid() = %s AS is_ours) AS way"  # noqa: S608
    values = [text for setting in settings.items() for text in setting]
    row = connection.execute(query, [*values, trusted, connection.info.backend_pid]).fetchone()
    return bool(row[0]), row[-1]


def quoted(name: str) -> str:
    """Return *name* as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'
