"""The sample app, without the names that Kathikon's parts need: every part is left out."""

from __future__ import annotations

from kathikon_celery import internals

internals.is_met = lambda need: False

from tests.support.apps import app  # noqa: E402

__all__ = ["app"]
