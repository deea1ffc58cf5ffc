"""Where jobs live: the facade, and behind it the only code that speaks SQL."""

from __future__ import annotations

from kathikon_celery.storage.errors import Forbidden, MovedOn, NotFound, SchemaError, StorageError, Unavailable
from kathikon_celery.storage.facade import Storage

__all__ = ["Forbidden", "MovedOn", "NotFound", "SchemaError", "Storage", "StorageError", "Unavailable"]
