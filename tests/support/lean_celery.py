"""``python -m celery`` without Flower's command: each of the many workers of the tests would import all of Flower."""

import importlib.metadata
from collections.abc import Iterable
from typing import Any

_entry_points = importlib.metadata.entry_points


def _without_flower(**asked: Any) -> Iterable[importlib.metadata.EntryPoint]:
    return [found for found in _entry_points(**asked) if found.name != "flower"]


if __name__ == "__main__":
    importlib.metadata.entry_points = _without_flower  # type: ignore[assignment]
    from celery.__main__ import main

    main()
