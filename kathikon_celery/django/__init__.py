"""Kathikon for Django.

As a configuration: begin the Celery part of ``settings.py`` with this, and override below it.

    from kathikon_celery.django import *
    CELERY_KATHIKON_DATABASE_URL = "postgresql://app@db/jobs"

The app reads it through ``app.config_from_object("django.conf:settings", namespace="CELERY")``. As an app,
``"kathikon_celery.django"`` in ``INSTALLED_APPS`` brings checks, ``manage.py kathikon`` and the tables by ``migrate``.
`TasksBackend` is imported at its first use.
"""

import sys as _sys
from typing import Any as _Any

from kathikon_celery import config as _config

_settings = {f"CELERY_{name.upper()}": getattr(_config, name) for name in _config.__all__}
globals().update(_settings)

__all__ = list(_settings)

if "django.conf" in _sys.modules:  # a Django project reads its settings
    from kathikon_celery.django.on_commit import install as _install

    _install()


def __getattr__(name: str) -> _Any:
    if name == "TasksBackend":
        from kathikon_celery.django.task_backends import TasksBackend

        return TasksBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
