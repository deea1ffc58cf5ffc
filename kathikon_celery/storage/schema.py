"""The schema's version: upgrades the tables, prints them as SQL, and refuses tables that are too new for the code."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from sqlalchemy import URL, Column, Connection, MetaData, String, Table, inspect, make_url, select

from kathikon_celery.storage.dialects import dialect_for
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.errors import SchemaError, TablesInUse

logger = logging.getLogger(__name__)

#: The newest migration in ``migrations/versions``, a number of four digits. Code can use the tables of a newer version
#: with the same first digit: such migrations only add what older code does not need. So a fleet may be upgraded worker
#: by worker, and its old workers may restart.
HEAD = "0008"
#: Seconds for which an upgrade is tried while other transactions use the tables, and between two tries.
PATIENCE, PAUSE = 120.0, 0.5
#: Where alembic keeps the version of the tables.
VERSION_TABLE = "kathikon_version"

_version = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))
_MIGRATIONS = Path(__file__).parent / "migrations"
#: Alembic has global state: one thread of a process at a time.
_turn = threading.Lock()
if hasattr(os, "register_at_fork"):  # the thread that has the lock is not in the child
    os.register_at_fork(after_in_child=_turn._at_fork_reinit)  # type: ignore[attr-defined]


def current(connection: Connection) -> str | None:
    """Return the version of the tables, or `None` if there are none."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(select(_version.c.version_num)).scalar()


def setup(database: Database) -> None:
    """Create or upgrade the tables if needed; any number of processes may do so at once.

    A database that is away is tried once, whatever its `patience`: a worker that cannot connect has to log that, and to
    react to signals. Raises `SchemaError` if the code is too old for the tables, `TablesInUse` if other transactions
    use them for `PATIENCE` seconds, `Unavailable`.
    """
    until = monotonic() + PATIENCE
    while True:
        try:
            _upgrade(database)
            with database.read() as connection:
                return database.dialect.see_tables(connection)
        except Exception as error:
            explained = database.explain(error)
            if not isinstance(explained, TablesInUse) or monotonic() > until:
                raise explained from error
            logger.warning("Kathikon: %s; trying again", explained)
            sleep(PAUSE)


def _upgrade(database: Database) -> None:
    with database.read() as connection:
        version = current(connection)
    if version == HEAD or _is_newer_and_usable(version):
        return
    with database.write(durable=True) as connection, database.dialect.migrating(connection):
        version = current(connection)
        if version == HEAD or _is_newer_and_usable(version):
            return
        if version is not None and version not in _known():
            raise SchemaError(
                f"the tables of {database!r} have version {version!r}, this code knows versions up to {HEAD!r}:"
                " they were made by a newer kathikon-celery; install that version or a newer one"
            )
        _alembic(attributes={"connection": connection, "dialect": database.dialect})
    done = "created" if version is None else f"upgraded from version {version!r}"
    logger.info("Kathikon: the tables of %r are %s; their version is %r", database, done, HEAD)


def _is_newer_and_usable(version: str | None) -> bool:
    return version is not None and version > HEAD and version[:-3] == HEAD[:-3] and version.isdigit()


def ddl(url: str | URL, since: str | None = None, schema: str | None = None) -> str:
    """Return the SQL that `setup` would run on a database of *url*'s kind, from version *since* (default: no tables).

    Does not connect. Raises `SchemaError` for a version that does not exist.
    """
    if since is not None and since not in _known():
        known = ", ".join(sorted(_known()))
        raise SchemaError(f"the schema has no version {since!r}; known to this code: {known}")
    out = io.StringIO()
    dialect = dialect_for(make_url(url), schema)
    out.writelines(f"{statement};\n\n" for statement in dialect.before_migrations())
    _alembic(attributes={"url": url, "dialect": dialect}, out=out, since=since)
    return out.getvalue()


def _alembic(attributes: dict[str, Any], out: io.StringIO | None = None, since: str | None = None) -> None:
    with _turn, _quietly():
        from alembic import command  # slow to import, and needed once in the life of a schema

        config = _config()
        config.attributes.update(attributes)
        if out is None:
            command.upgrade(config, HEAD)
        else:
            config.output_buffer = out
            command.upgrade(config, f"{since}:{HEAD}" if since else HEAD, sql=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what alembic says of its own steps out of the user's log."""
    log = logging.getLogger("alembic")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _config() -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _known() -> set[str]:
    with _turn, _quietly():
        from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
