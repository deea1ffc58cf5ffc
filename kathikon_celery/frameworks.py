"""Installs what joins Kathikon to the web framework in use."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from celery import _state
from kombu.utils.imports import symbol_by_name

if TYPE_CHECKING:
    from celery import Celery

    from kathikon_celery.schedules.following import Kept
    from kathikon_celery.storage import Storage
    from kathikon_celery.storage.schedules import Schedule


def install() -> None:
    """Send tasks in Django's open transactions if Django is in use, by Celery's rule. May be called twice."""
    if is_django():
        symbol_by_name("kathikon_celery.django.transactions:install")()
        symbol_by_name("kathikon_celery.django.on_commit:install")()


def register_tasks() -> None:
    """Register the Celery task that runs the tasks of ``django.tasks``, if the setting TASKS names our backend."""
    if is_django():
        symbol_by_name("kathikon_celery.django.task_backends:all_of_ours")()


class Follower(Protocol):
    """Keeps the schedules of a worker and those of a framework together."""

    def look(self) -> None:
        """Take over what has changed there."""

    def sent(self, sent: Iterable[tuple[Schedule, int]], now: datetime) -> None:
        """Note for there how many ticks of which rows were sent at *now*."""


def follower(app: Celery, storage: Storage) -> Follower | None:
    """Return what follows the schedules that the framework has, if any."""
    if not is_django():
        return None
    found: Follower | None = symbol_by_name("kathikon_celery.django.periodic_tasks:follower")(app, storage)
    return found


def periodic_tasks(app: Celery, bad: dict[str, str]) -> Iterable[Kept]:
    """Return the schedules in the tables of django-celery-beat. *bad*: gets the names of unusable ones, and why.

    Raises `ValueError` if the project does not have the tables.
    """
    if is_django():
        symbol_by_name("django:setup")()
    if not is_django() or not symbol_by_name("django.apps:apps").is_installed("django_celery_beat"):
        raise ValueError("there are no tables of django-celery-beat: django_celery_beat is not in INSTALLED_APPS")
    found: Iterable[Kept] = symbol_by_name("kathikon_celery.django.periodic_tasks:kept")(app, bad)
    return found


def is_django() -> bool:
    """Whether this process is one of a Django project."""
    return "DJANGO_SETTINGS_MODULE" in os.environ


def has_app() -> bool:
    """Whether this process has made a Celery app, besides the one that Celery makes for those without one."""
    return _state.default_app is not None and bool(_state.default_app.fixups)
