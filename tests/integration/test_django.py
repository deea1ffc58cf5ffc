"""Django: tasks of `django.tasks`, the app config, and tests of a project that `drain`."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.projects import MANAGE, Project, django_database

pytest.importorskip("django")

SETTINGS = """
    from kathikon_celery.django import *

    SECRET_KEY = "not needed"
    USE_TZ = True
    INSTALLED_APPS = [{api}"kathikon_celery.django", "proj"]
    DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
    DATABASES = {{"default": {database}}}
    CELERY_KATHIKON_DATABASE_URL = {url!r}
    CELERY_KATHIKON_QUEUES = "default:4,mail:2"
    TASKS = {{"default": {{"BACKEND": "kathikon_celery.django.TasksBackend", "QUEUES": ["default", "mail"]}}}}
"""
MODELS = """
    from django.db import models

    class Order(models.Model):
        state = models.TextField(default="new")
"""
MIGRATION = """
    from django.db import migrations, models

    class Migration(migrations.Migration):
        operations = [migrations.CreateModel(
            "Order", [("id", models.AutoField(primary_key=True)), ("state", models.TextField(default="new"))]
        )]
"""
TASKS = """
    import asyncio
    from celery import shared_task
    from proj.api import task

    @task
    def add(x, y=0):
        return x + y

    @task(priority=7, queue_name="mail")
    async def greet(name):
        await asyncio.sleep(0)
        return f"hello {name}"

    @task(takes_context=True)
    def who(context):
        result = context.task_result
        return [result.id, str(result.status), context.attempt, result.worker_ids]

    class Bad(Exception):
        pass

    @task
    def fails():
        raise Bad("no")

    @task
    def no_json():
        return object()

    @shared_task
    def plus(x, y):
        return x + y

    @shared_task(bind=True, max_retries=1)
    def busy(self):
        if not self.request.retries:
            raise self.retry(countdown=60)
        return "done"

    @shared_task
    def raises():
        raise ValueError("no")

    @shared_task(ignore_result=True, transaction="default")
    def ship(order_id, state):
        from proj.models import Order
        Order.objects.filter(id=order_id).update(state=state)
        if state == "lost":
            raise ValueError(state)
        if state == "calls":
            from django.db import transaction
            transaction.on_commit(lambda: 1 / 0)
        if state == "closes":
            from django.db import connection
            connection.close()
        plus.delay(order_id, 0)
"""
API = """
    try:
        from django.tasks import *
        from django.tasks import exceptions, signals
    except ImportError:
        from django_tasks import *
        from django_tasks import exceptions, signals
"""
CELERY = """
    from celery import Celery
    app = Celery("proj")
    app.config_from_object("django.conf:settings", namespace="CELERY")
    app.autodiscover_tasks()
"""
SETUP = "import django; django.setup(); from proj.tasks import *; from proj.api import *\n"


@pytest.fixture
def project(tmp_path: Path, database_url: str) -> Project:
    import django

    parts = django_database(database_url)
    project = Project(tmp_path)
    project.environment["DJANGO_SETTINGS_MODULE"] = "proj.settings"
    api = '"django_tasks", ' if django.VERSION < (6,) else ""
    project.write("proj/settings.py", dedent(SETTINGS).format(api=api, database=parts, url=database_url))
    for name, text in {
        "models": MODELS, "tasks": TASKS, "api": API, "celery": CELERY,
        "migrations/__init__": "", "migrations/0001_initial": MIGRATION,
    }.items():  # fmt: skip
        project.write(f"proj/{name}.py", text)
    project.write("manage.py", MANAGE)
    return project


def test_tasks_of_django_run_beside_those_of_celery(project: Project) -> None:
    project.call("manage.py", "migrate", "-v0")
    sent = project.run(
        SETUP
        + dedent("""
        from datetime import timedelta
        from django.db import transaction
        from django.utils import timezone

        enqueued = []
        def note(sender, task_result, **_):
            enqueued.append(task_result.id)
        signals.task_enqueued.connect(note)
        answer = {}
        with transaction.atomic():
            answer["add"] = add.enqueue(1, y=2).id
            inside = add.get_result(answer["add"])
            assert inside.status == "READY" and inside.kwargs == {"y": 2} and inside.enqueued_at, inside
            try:
                with transaction.atomic():
                    lost = add.enqueue(3).id
                    raise ZeroDivisionError
            except ZeroDivisionError:
                pass
        for missing in (lost, "nonsense"):
            try:
                add.get_result(missing)
            except exceptions.TaskResultDoesNotExist:
                pass
            else:
                raise AssertionError(missing)
        assert enqueued == [answer["add"], lost], enqueued
        due = timezone.now() + timedelta(hours=1)
        later = add.using(run_after=due, priority=-100).enqueue(1)
        found = add.get_result(later.id).task
        assert abs(found.run_after - due) < timedelta(milliseconds=1) and found.priority == -100, found
        try:
            greet.get_result(later.id)
        except exceptions.TaskResultMismatch:
            pass
        else:
            raise AssertionError("another task's result")
        try:
            add.enqueue(object())
        except TypeError:
            pass
        else:
            raise AssertionError("no JSON")
        import asyncio
        answer["greet"] = asyncio.run(greet.aenqueue("you")).id
        for one in (who, fails, no_json):
            answer[one.name] = one.enqueue().id
        answer["plus"] = plus.delay(1, 2).id
        """)
    )
    with project.worker():
        found = project.run(
            SETUP
            + f"sent = {sent!r}\n"
            + dedent("""
            import asyncio
            from proj.celery import app
            answer = {}
            for name, one in sent.items():
                app.AsyncResult(one).get(timeout=60, propagate=False)
                if name == "plus":
                    continue
                result = asyncio.run(default_task_backend.aget_result(one))
                assert result.enqueued_at <= result.started_at <= result.finished_at, result
                assert result.is_finished and result.attempts == 1, result
                errors = [(error.exception_class_path, "Traceback" in error.traceback) for error in result.errors]
                answer[name] = [str(result.status), result._return_value, errors, result.worker_ids]
            assert default_task_backend.get_result(sent["greet"]).task.priority == 7
            """)
        )
    (worker,) = found["add"][3]
    ok = "SUCCESSFUL"
    assert worker
    assert found == {
        "add": [ok, 3, [], [worker]],
        "greet": [ok, "hello you", [], [worker]],
        "who": [ok, [sent["who"], "RUNNING", 1, [worker]], [], [worker]],
        "fails": ["FAILED", None, [["proj.tasks.Bad", True]], [worker]],
        "no_json": ["FAILED", None, [["builtins.TypeError", True]], [worker]],
    }


USERS_TESTS = """
    import pytest
    from celery import chain, chord
    from django.db import transaction
    from django.test import TestCase
    from kathikon_celery.testing import drain
    from proj.models import Order
    from proj.tasks import add, busy, greet, plus, raises, ship
    from proj.api import signals

    def order():
        with transaction.atomic():
            made = Order.objects.create()
            results = [ship.delay(made.id, "shipped"), plus.delay_on_commit(made.id, 1)]
            try:
                with transaction.atomic():
                    plus.delay(0, 0)
                    raise ZeroDivisionError
            except ZeroDivisionError:
                pass
        results.append(plus.delay(made.id, 2))
        return made, results

    def check():
        made, sent = order()
        assert sent[1].id
        ran = drain()
        assert [one.id for one in ran[:3]] == [one.id for one in sent]
        assert [one.result for one in ran] == [None, made.id + 1, made.id + 2, made.id]
        made.refresh_from_db()
        assert made.state == "shipped"
        assert drain() == []

    @pytest.mark.django_db
    def test_first():
        check()
        plus.delay(1, 1)  # is gone with this test

    def test_second(db):
        assert drain() == []
        check()

    class Tests(TestCase):
        def test_canvas(self):
            body = chord([plus.s(1, 1), plus.s(2, 2)])(plus_all.s())
            last = chain(plus.s(1, 1), plus.s(1)).delay()
            drain()
            self.assertEqual((body.get(), last.get()), (6, 3))

        def test_failures(self):
            made = Order.objects.create()
            lost, failed, retried = ship.delay(made.id, "lost"), raises.delay(), busy.delay()
            drain()
            made.refresh_from_db()
            self.assertEqual((made.state, failed.state, retried.state), ("new", "FAILURE", "RETRY"))
            self.assertEqual([one.result for one in drain(scheduled=True)], ["done"])

        def test_tasks_of_django(self):
            heard = []
            receivers = {}
            for name in ("task_enqueued", "task_started", "task_finished"):
                def note(sender, task_result, name=name, **_):
                    heard.append((name, str(task_result.status)))
                receivers[name] = note
                getattr(signals, name).connect(note)
            with transaction.atomic():
                result = greet.enqueue("you")
            drain()
            for name, one in receivers.items():
                getattr(signals, name).disconnect(one)
            result.refresh()
            self.assertEqual(result.return_value, "hello you")
            self.assertEqual(heard, [
                ("task_enqueued", "READY"), ("task_started", "RUNNING"), ("task_finished", "SUCCESSFUL")
            ])

    from celery import shared_task

    @shared_task
    def plus_all(numbers):
        return sum(numbers)
"""


def test_a_project_s_tests_drain(project: Project) -> None:
    project.write("test_proj.py", USERS_TESTS)
    output = project.call("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_proj.py")
    assert "5 passed" in output
    project.write("proj/tests.py", USERS_TESTS)
    assert "Ran 3 tests" in project.call("manage.py", "test", "proj")


def test_what_a_body_does_beside_its_end(project: Project) -> None:
    """A function of ``on_commit`` that raises undoes nothing; a connection that the body closes is no lost process."""
    project.call("manage.py", "migrate", "-v0")
    with project.worker() as worker:
        found = project.run(
            SETUP
            + dedent("""
            from kathikon_celery.job import TERMINAL
            from kathikon_celery.storage import Storage
            from proj.celery import app
            from proj.models import Order
            from time import sleep
            storage, answer = Storage.for_app(app), []
            for state in ("calls", "closes"):
                order = Order.objects.create(state="new")
                result = ship.delay(order.id, state)
                while (job := storage.fetch(result.id)).state not in TERMINAL:  # it has no result to wait for
                    sleep(0.02)
                order.refresh_from_db()
                answer.append([order.state, str(job.state), job.crashes])
            """)
        )
        assert found == [["calls", "completed", 0], ["new", "dead", 0]]
        assert "the task is committed" in worker.log


def test_manage(project: Project) -> None:
    tables = (
        "from sqlalchemy import create_engine, inspect\n"
        "from proj.celery import app; engine = create_engine(app.conf.kathikon_database_url)\n"
        "answer = [one for one in inspect(engine).get_table_names() if one.startswith('kathikon')]"
    )
    project.environment["KATHIKON_MIGRATE"] = "false"
    project.call("manage.py", "migrate", "-v0")
    assert project.run(tables) == []
    del project.environment["KATHIKON_MIGRATE"]
    project.call("manage.py", "migrate", "-v0")
    assert "kathikon_jobs" in project.run(tables)
    assert "no issues" in project.call("manage.py", "check")
    assert "There are no jobs." in project.call("manage.py", "kathikon", "counts")
    assert "CREATE TABLE" in project.call("manage.py", "kathikon", "schema", "--sql")
    assert "Look after the jobs" in project.call("manage.py", "kathikon", "--help")
    called = SETUP + (
        "import io; from django.core.management import call_command; text = io.StringIO()\n"
        "call_command('kathikon', 'counts', stdout=text); answer = text.getvalue()"
    )
    assert project.run(called) == "There are no jobs.\n"
    with pytest.raises(AssertionError, match="No such command 'nothing'"):
        project.call("manage.py", "kathikon", "nothing")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("CELERY_KATHIKON_LEASE = 'for ever'", "kathikon.E001"),
        ("CELERY_BROKER_URL = 'memory://'", "kathikon.E003"),
        ("CELERY_RESULT_BACKEND = 'cache+memory://'", "kathikon.E004"),
        ("CELERY_KATHIKON_RESULT = 'discard'", "kathikon.W002"),
        ("CELERY_KATHIKON_QUEUES = 'default:4'", r"kathikon.W003\) No worker consumes the queue 'mail'"),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_checks(project: Project, line: str, said: str) -> None:
    with (project.directory / "proj/settings.py").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(AssertionError, match=said):
        project.call("manage.py", "check", "--fail-level", "WARNING")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_project_without_an_app_is_told(project: Project) -> None:
    project.write("proj/__init__.py", "")
    with pytest.raises(AssertionError, match=r"(?s)kathikon.E002.*kathikon.W001"):
        project.call("manage.py", "check", "--fail-level", "WARNING")
