"""A double of the storage, for tests that need no database."""

from __future__ import annotations

from datetime import datetime, timezone
from inspect import getmembers, isfunction
from typing import cast
from unittest.mock import create_autospec

from sqlalchemy.engine import make_url

from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from kathikon_celery.storage.dialects import dialect_for
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.engine.wakeup import Wakeup

__all__ = ["storage_double"]

#: Declared return type of a method -> type of the empty value that the double returns.
_NOTHING = {"int": int, "list": list, "dict": dict}


def storage_double(settings: Settings | None = None) -> Storage:
    """Return a mock of `Storage` that has no jobs, and only the methods of `Storage`.

    >>> storage = storage_double()
    >>> storage.next_due.return_value = -0.5
    >>> storage.promote_scheduled.return_value = 3
    >>> Promoter(storage=storage, interval=1.0).step()

    Its ``database`` is a mock as well, whose queries return nothing.

    Arguments:
        settings: default: every setting has its default, whatever the environment says.
    """
    storage = create_autospec(Storage, instance=True)
    storage.settings = settings or Settings()
    storage.database = _database_double()
    for name, verb in getmembers(Storage, isfunction):
        if not name.startswith("_"):
            kind = str(verb.__annotations__["return"]).partition("[")[0]
            getattr(storage, name).return_value = _NOTHING[kind]() if kind in _NOTHING else None
    return cast("Storage", storage)


def _database_double() -> Database:
    database = create_autospec(Database, instance=True)
    # A real dialect, since statements are built with it. It opens no file: only a database would.
    database.url = make_url("sqlite:///no-file")
    database.dialect = dialect_for(database.url)
    database.patience, database.has_limits_to_prune = 0.0, False
    database.on_close, database.on_replaced = [], []
    database.hearing.side_effect = lambda listener: Wakeup()
    database.patiently.side_effect = lambda call, patient=True: call(False)
    for way in (database.read, database.once, database.write):
        result = way.return_value.__enter__.return_value.execute.return_value
        result.rowcount = 0
        result.scalar.return_value = result.first.return_value = result.one_or_none.return_value = None
        result.all.return_value = []
        result.scalar_one.return_value = datetime.now(timezone.utc)  # the database's clock
    return cast("Database", database)
