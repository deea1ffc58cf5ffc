"""The app config: ``"kathikon_celery.django"`` in ``INSTALLED_APPS``."""

from __future__ import annotations

from typing import Any

from celery import current_app
from django.apps import AppConfig, apps
from django.core import checks
from django.db import connections
from django.db.models.signals import post_migrate

from kathikon_celery import frameworks
from kathikon_celery.django import periodic_tasks, transactions
from kathikon_celery.settings import SettingError, Settings
from kathikon_celery.settings.brokers import broker_of, is_kathikon
from kathikon_celery.storage import Storage
from kathikon_celery.storage.engine.guest import same_database
from kathikon_celery.storage.errors import is_lost


class KathikonConfig(AppConfig):
    """Checks the settings, and makes the tables with ``manage.py migrate``."""

    name = "kathikon_celery.django"
    label = "kathikon"
    verbose_name = "Kathikon"

    def ready(self) -> None:
        """Connect the checks, what follows a migration, and what follows changes of periodic tasks."""
        if apps.is_installed("django_celery_beat"):
            periodic_tasks.install()
        checks.register(check_settings)
        post_migrate.connect(make_permission, dispatch_uid="kathikon permission")
        post_migrate.connect(make_tables, dispatch_uid="kathikon")  # Django sends none for an app without models


def check_settings(**kwargs: Any) -> list[checks.CheckMessage]:
    """Return an error for a wrong setting, and a warning if the project has no Celery app."""
    if not frameworks.has_app():
        hint = "Import the app in the project's __init__.py: from proj.celery import app as celery_app"
        return [checks.Warning("The project makes no Celery app.", hint=hint, id="kathikon.W001")]
    try:
        Settings.load(current_app.conf)
    except SettingError as error:
        return [checks.Error(error.message, id="kathikon.E001")]
    return []


def make_permission(using: str, **kwargs: Any) -> None:
    """Make the permission ``kathikon.act``, for the dashboard, which has no model."""
    if not (apps.is_installed("django.contrib.auth") and apps.is_installed("django.contrib.contenttypes")):
        return
    kinds, permissions = apps.get_model("contenttypes.ContentType"), apps.get_model("auth.Permission")
    tables = connections[using].introspection.table_names()
    if kinds._meta.db_table in tables and permissions._meta.db_table in tables:
        kind, _ = kinds.objects.using(using).get_or_create(app_label="kathikon", model="job")
        given = {"content_type": kind, "codename": "act"}
        permissions.objects.using(using).get_or_create(**given, defaults={"name": "Can act on jobs"})


def make_tables(using: str, **kwargs: Any) -> None:
    """Make or upgrade the tables if the database *using*, which was migrated, is Kathikon's."""
    if not frameworks.has_app() or not is_kathikon(broker_of(current_app.conf)):
        return
    storage = Storage.for_app(current_app, setup=False)
    if not storage.settings.migrate or storage.settings.in_tests:
        return
    connection = connections[using]
    connection.ensure_connection()
    joined = transactions.connected_to(connection)
    try:
        is_ours = joined is not None and same_database(storage.database, joined)
    except Exception as error:
        if not is_lost(error):
            raise
        return  # a database that is away is not the one that was migrated
    if is_ours:
        storage.setup()
