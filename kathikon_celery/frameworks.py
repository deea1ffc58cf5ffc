"""Installs what finds the open transactions of the web framework in use."""

from __future__ import annotations

import os


def install() -> None:
    """Send tasks in Django's open transactions if Django is in use, by Celery's rule. May be called twice."""
    if "DJANGO_SETTINGS_MODULE" in os.environ:
        from kathikon_celery.django import transactions

        transactions.install()
