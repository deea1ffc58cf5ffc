"""django-celery-beat's tables are followed: changed in its own admin while a worker runs."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage, schedules
from kathikon_celery.storage.schedules import Schedule
from tests.integration.conftest import Journal, on_one_database
from tests.support.projects import MANAGE, Project, django_database
from tests.support.waiting import wait_until

pytest.importorskip("django_celery_beat")
django = pytest.importorskip("django")

SETTINGS = """
    from kathikon_celery.django import *

    SECRET_KEY = "not needed"
    USE_TZ = True
    ALLOWED_HOSTS = ["*"]
    ROOT_URLCONF = "proj.urls"
    INSTALLED_APPS = [
        *(f"django.contrib.{{name}}" for name in ("admin", "auth", "contenttypes", "sessions", "messages")),
        "kathikon_celery.django", "django_celery_beat", "proj",
    ]
    MIDDLEWARE = [
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ]
    TEMPLATES = [{{
        "BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True,
        "OPTIONS": {{"context_processors": [
            "django.contrib.auth.context_processors.auth", "django.contrib.messages.context_processors.messages",
            "django.template.context_processors.request",
        ]}},
    }}]
    DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
    DATABASES = {{"default": {database}}}
    CELERY_KATHIKON_DATABASE_URL = {url!r}
    CELERY_BEAT_SCHEDULE = {{
        "of the code": {{"task": "proj.tasks.tick", "schedule": 0.5, "args": ({journal!r},)}},
    }}
"""
CELERY = """
    from celery import Celery
    app = Celery("proj")
    app.config_from_object("django.conf:settings", namespace="CELERY")
    app.autodiscover_tasks()
"""
TASKS = """
    from celery import shared_task

    @shared_task(bind=True)
    def tick(self, path, line="code"):
        with open(path, "a") as file:
            file.write(f"{line} {self.request.headers.get('periodic_task_name')}\\n")
"""
URLS = """
    from django.contrib import admin
    from django.urls import path
    urlpatterns = [path("admin/", admin.site.urls)]
"""
SETUP = """
import django; django.setup()
import json
from datetime import timedelta
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone
from django_celery_beat.models import ClockedSchedule, CrontabSchedule, IntervalSchedule, PeriodicTask, PeriodicTasks

user, _ = User.objects.get_or_create(username="ada", is_superuser=True, is_staff=True)
admin = Client()
admin.force_login(user)

def save(name, **changed):
    '''Save a periodic task in the admin, as its form does.'''
    task = PeriodicTask.objects.filter(name=name).first()
    form = {"name": name, "task": "proj.tasks.tick", "args": "[]", "kwargs": "{}", "headers": "{}", "enabled": "on"}
    if task is not None:
        form |= {"args": task.args, "interval": task.interval_id or "", "crontab": task.crontab_id or ""}
    form = {key: value for key, value in (form | changed).items() if value is not None}
    path = f"{task.id}/change" if task is not None else "add"
    response = admin.post(f"/admin/django_celery_beat/periodictask/{path}/", form)
    assert response.status_code == 302, response.context["errors"]

def second():
    return IntervalSchedule.objects.get_or_create(every=1, period="seconds")[0].id

answer = None
"""


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


@pytest.fixture
def project(tmp_path: Path, database_url: str, journal: Journal) -> Project:
    """On PostgreSQL in Kathikon's own database; on SQLite in a file of its own."""
    is_file = database_url.startswith("sqlite")
    project = Project(tmp_path)
    project.environment["DJANGO_SETTINGS_MODULE"] = "proj.settings"
    parts: dict[str, Any] = django_database(f"sqlite:///{tmp_path}/django.db" if is_file else database_url)
    if is_file and django.VERSION >= (5, 1):
        parts["OPTIONS"] = {"transaction_mode": "IMMEDIATE"}
    settings = dedent(SETTINGS).format(database=parts, url=database_url, journal=journal.path)
    for name, text in {"settings": settings, "celery": CELERY, "tasks": TASKS, "urls": URLS}.items():
        project.write(f"proj/{name}.py", text)
    project.write("manage.py", MANAGE)
    project.call("manage.py", "migrate", "-v0")
    return project


def row(storage: Storage, name: str) -> Schedule | None:
    with storage.database.read() as connection:
        return schedules.fetch(connection, name)


def run(project: Project, code: str) -> Any:
    return project.run(SETUP + dedent(code))


@on_one_database
def test_what_the_admin_changes_is_obeyed_at_once(project: Project, journal: Journal, database_url: str) -> None:
    storage = Storage(database_url, Settings())
    with project.worker(concurrency=2):
        run(project, f'save("quick", interval=second(), args=json.dumps([{journal.path!r}, "first"]))')
        wait_until(lambda: journal.lines.count("first quick") >= 2, what="two ticks")
        run(project, f'save("quick", args=json.dumps([{journal.path!r}, "second"]))')
        wait_until(lambda: "second quick" in journal.lines, what="a tick with other arguments")

        def is_told() -> bool:
            count, last = run(
                project,
                """
                task = PeriodicTask.objects.get(name="quick")
                answer = [task.total_run_count, str(task.last_run_at)]
                """,
            )
            return count >= 2 and last != "None"

        wait_until(is_told, what="the tables know of it")
        run(project, 'save("quick", enabled=None)')
        paused = row(storage, "quick")
        assert paused is not None
        assert (paused.paused, paused.next_at, paused.source) == (True, None, "django")
        run(project, 'save("quick", enabled="on")')
        seen = journal.lines.count("second quick")
        wait_until(lambda: journal.lines.count("second quick") > seen, what="a tick after the pause")
        run(project, 'PeriodicTask.objects.get(name="quick").delete()')
        assert row(storage, "quick") is None
    storage.close()


@on_one_database
def test_each_kind_of_periodic_task(project: Project, journal: Journal, database_url: str) -> None:
    storage = Storage(database_url, Settings())
    run(
        project,
        f"""
        clocked = ClockedSchedule.objects.create(clocked_time=timezone.now() + timedelta(seconds=2))
        args = json.dumps([{journal.path!r}, "clocked"])
        save("once", clocked=clocked.id, one_off="on", args=args, expire_seconds=600)
        crontab = CrontabSchedule.objects.create(minute="30", hour="2", timezone="Europe/Berlin")
        save("nightly", crontab=crontab.id, priority=7, queue="mail", headers='{{"colour": "red"}}')
        PeriodicTask.objects.create(name="no list", task="proj.tasks.tick", interval_id=second(), args='{{"a": 1}}')
        PeriodicTask.objects.create(name="of the code", task="other", interval_id=second(), enabled=False)
        """,
    )
    with project.worker(concurrency=2) as worker:
        wait_until(lambda: "clocked once" in journal.lines, what="the tick at a moment")

        def is_done() -> bool:
            return run(project, 'answer = not PeriodicTask.objects.get(name="once").enabled') is True

        wait_until(is_done, what="it is disabled in the tables")
        wait_until(lambda: (of_code := row(storage, "of the code")) is not None and of_code.paused, what="it is paused")
        seen = journal.lines.count("code None")
        nightly = row(storage, "nightly")
        assert nightly is not None
        assert (nightly.zone, '"hour": "2"' in nightly.timing) == ("Europe/Berlin", True)
        assert '"priority": 7' in nightly.options
        assert '"queue": "mail"' in nightly.options
        assert "The periodic task 'no list' is not sent" in worker.log.replace("the p", "The p")
        assert row(storage, "no list") is None
        run(
            project,
            """
            PeriodicTask.objects.filter(name="nightly").update(priority=3)
            PeriodicTasks.update_changed()  # as django-celery-beat wants it after a bulk update
            PeriodicTask.objects.filter(name="of the code").update(enabled=True)
            PeriodicTasks.update_changed()
            """,
        )
        assert '"priority": 3' in row(storage, "nightly").options  # type: ignore[union-attr]
        wait_until(lambda: journal.lines.count("code None") > seen, what="the code's entry goes on")
        assert journal.lines.count("clocked once") == 1
    storage.close()


@on_one_database
def test_taken_over_for_good(project: Project, journal: Journal, database_url: str) -> None:
    storage = Storage(database_url, Settings())
    run(project, f'save("quick", interval=second(), args=json.dumps([{journal.path!r}, "line"]))')
    with pytest.raises(AssertionError, match="'quick' is a periodic task of django-celery-beat; change it there"):
        project.celery("kathikon", "schedule", "pause", "quick")
    assert "quick  added" in project.celery("kathikon", "schedule", "import", "django-celery-beat", "--dry-run")
    assert row(storage, "quick").source == "django"  # type: ignore[union-attr]
    assert "quick  added" in project.celery("kathikon", "schedule", "import", "django-celery-beat")
    assert "quick  is there" in project.celery("kathikon", "schedule", "import", "django-celery-beat")
    run(project, 'PeriodicTask.objects.get(name="quick").delete()')
    with project.worker(concurrency=1):
        wait_until(lambda: "line quick" in journal.lines, what="a tick of its own")
    project.celery("kathikon", "schedule", "pause", "quick")
    storage.close()
