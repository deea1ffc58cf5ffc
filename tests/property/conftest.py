"""The storages of the storage tests, and how long hypothesis may search."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.storage.conftest import _postgresql_storage, _sqlite_storage, storage

__all__ = ["_postgresql_storage", "_sqlite_storage", "storage"]

# A database on a busy machine has no speed that could be promised, and each example empties it by itself.
options = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
# The suite tries the same examples each time: a change is not held up by what it has not caused.
settings.register_profile("kathikon", max_examples=50, derandomize=True, **options)
# To search: pytest tests/property, with KATHIKON_TEST_SEARCH set to a number of examples.
settings.register_profile("search", max_examples=int(os.environ.get("KATHIKON_TEST_SEARCH", 0)) or 1, **options)
settings.load_profile("search" if "KATHIKON_TEST_SEARCH" in os.environ else "kathikon")
