"""Installs what joins Kathikon to the web framework in use."""

from __future__ import annotations

import os

from celery import _state
from kombu.utils.imports import symbol_by_name


def install() -> None:
    """Send tasks in Django's open transactions if Django is in use, by Celery's rule. May be called twice."""
    if is_django():
        symbol_by_name("kathikon_celery.django.transactions:install")()
        symbol_by_name("kathikon_celery.django.on_commit:install")()


def register_tasks() -> None:
    """Register the Celery task that runs the tasks of ``django.tasks``, if the setting TASKS names our backend."""
    if is_django():
        symbol_by_name("kathikon_celery.django.task_backends:all_of_ours")()


def is_django() -> bool:
    """Whether this process is one of a Django project."""
    return "DJANGO_SETTINGS_MODULE" in os.environ


def has_app() -> bool:
    """Whether this process has made a Celery app, besides the one that Celery makes for those without one."""
    return _state.default_app is not None and bool(_state.default_app.fixups)
