"""`kathikon_celery.config` for Django: begin the Celery part of ``settings.py`` with this, and override below it.

    from kathikon_celery.django import *
    CELERY_KATHIKON_DATABASE_URL = "postgresql://app@db/jobs"

The app reads it through ``app.config_from_object("django.conf:settings", namespace="CELERY")``.
"""

from kathikon_celery import config as _config

_settings = {f"CELERY_{name.upper()}": getattr(_config, name) for name in _config.__all__}
globals().update(_settings)

__all__ = list(_settings)
