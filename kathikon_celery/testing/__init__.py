"""Tools for tests of an app on Kathikon. See ``docs/test-your-app.md``.

- `kathikon_celery.testing.plugin`: fixtures, which pytest finds wherever this package is installed
- `kathikon_celery.testing.isolation`: an app of your own on a database of its own
- `kathikon_celery.testing.doubles`: a double of the storage
- `kathikon_celery.testing.drain`: runs here, without a worker, what was sent
- `kathikon_celery.testing.components`: broker, backend and worker for the ``celery_setup`` of pytest-celery, no Docker

Nothing here changes a setting for longer than a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kathikon_celery.testing.draining import drain

__all__ = ["drain"]


def __getattr__(name: str) -> Any:
    if name == "drain":
        from kathikon_celery.testing.draining import drain

        return drain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
