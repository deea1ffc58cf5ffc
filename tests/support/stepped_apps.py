"""The sample app, in a process whose database has the clock of `tests.support.clocks`."""

from kathikon_celery.storage.dialects.sqlite import SQLite
from tests.support.apps import app
from tests.support.clocks import ahead_by_file, clock_replaced

__all__ = ["app"]

SQLite.on_connect = clock_replaced(ahead_by_file)  # type: ignore[method-assign]
