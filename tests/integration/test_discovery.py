"""Every way in which an application names its broker, where nothing of it ever imports Kathikon."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.projects import Project

#: The app, the URL being filled in as ``{url}``.
FORMS = {
    "url": """
        from celery import Celery
        app = Celery("proj", broker="{broker}", backend="kathikon")
    """,
    "both urls": """
        from celery import Celery
        app = Celery("proj", broker="{broker}", backend="{broker}")
    """,
    "settings object": """
        from celery import Celery
        class Config:
            broker_url = "{broker}"
            result_backend = "kathikon"
        app = Celery("proj")
        app.config_from_object(Config)
    """,
    "app.conf": """
        from celery import Celery
        app = Celery("proj")
        app.conf.update(broker_url="{broker}", result_backend="kathikon")
    """,
    "environment": """
        from celery import Celery
        app = Celery("proj")
    """,
    "read and write": """
        from celery import Celery
        app = Celery("proj", backend="kathikon")
        app.conf.broker_read_url = app.conf.broker_write_url = app.conf.broker_url = "{broker}"
    """,
    "only read and write": """
        from celery import Celery
        app = Celery("proj", backend="kathikon")
        app.conf.broker_read_url = app.conf.broker_write_url = "{broker}"
    """,
    "one of a list": """
        from celery import Celery
        app = Celery("proj", broker=["{broker}"], backend="kathikon")
    """,
    "a list whose first server is down": """
        from celery import Celery
        app = Celery("proj", broker=["{down}", "{broker}"], backend="kathikon")
    """,
    "a text with two servers": """
        from celery import Celery
        app = Celery("proj", broker="{down};{broker}", backend="kathikon")
        app.conf.broker_failover_strategy = "shuffle"
    """,
    "django": """
        import django
        from celery import Celery
        django.setup()
        app = Celery("proj")
        app.config_from_object("django.conf:settings", namespace="CELERY")
    """,
    "kombu first": """
        from kombu import Queue
        from celery import Celery
        app = Celery("proj", broker="{broker}", backend="kathikon")
    """,
}
#: A server that is down, with an option of libpq's in its URL.
DOWN = "kathikon+postgresql+psycopg://nobody:secret@127.0.0.1:1/none?sslmode=prefer"
USE = """
    import sys
    from proj.celery import app
    from proj.tasks import add
    before = [name for name in sys.modules if name.startswith(("kathikon_celery.worker", "sqlalchemy"))]
    sent = app.send_task("proj.tasks.add", (5, 6))
    answer = [
        add.delay(2, 3).get(timeout=60),
        app.AsyncResult(sent.id).get(timeout=60),
        add.apply_async((4, 4), countdown=0.2).get(timeout=60),  # which a worker without our parts never runs
        [reply["ok"] for one in app.control.ping(timeout=10, limit=1) for reply in one.values()],
        before,
    ]
"""


@pytest.fixture
def form() -> str:
    return "url"


@pytest.fixture
def project(tmp_path: Path, database_url: str, form: str) -> Project:
    project = Project(tmp_path)
    broker = f"kathikon+{database_url}"
    app = dedent(FORMS[form]).replace("{broker}", broker).replace("{down}", DOWN) + "app.autodiscover_tasks(['proj'])\n"
    assert "kathikon_celery" not in app
    project.write("proj/celery.py", app)
    if form == "environment":
        project.environment |= {"CELERY_BROKER_URL": broker, "CELERY_RESULT_BACKEND": "kathikon"}
    if form == "django":
        project.environment["DJANGO_SETTINGS_MODULE"] = "proj.settings"
        project.write(
            "proj/settings.py",
            f"""
            SECRET_KEY = "not needed"
            INSTALLED_APPS = ["proj"]
            CELERY_BROKER_URL = "{broker}"
            CELERY_RESULT_BACKEND = "kathikon"
            """,
        )
    return project


#: On PostgreSQL one form is enough, and those with several servers: what others differ in ends before one is asked.
BOTH = [("url", "postgresql")]
BOTH += [(form, "postgresql" if "server" in form else "sqlite") for form in FORMS]


@pytest.mark.parametrize(("form", "database_url"), BOTH, indirect=["database_url"])
def test_an_application(project: Project) -> None:
    with project.worker():
        assert project.run(USE) == [5, 11, 8, ["pong"], []]


def test_a_worker_that_a_program_starts_has_all_parts(project: Project) -> None:
    """Not by the command line, which loads every plug-in of Celery's."""
    parts = """
        import threading
        from celery.contrib.testing.worker import start_worker
        from proj.celery import app
        with start_worker(app, perform_ping_check=False, pool="solo"):
            answer = sorted(one.name for one in threading.enumerate() if one.name.startswith("kathikon-"))
    """
    assert {"kathikon-lifeline", "kathikon-promoter", "kathikon-pruner"} <= set(project.run(parts))


def test_the_first_embedded_worker_of_a_program_has_all_parts(project: Project) -> None:
    code = """
        from kathikon_celery import EmbeddedWorker
        from proj.celery import app
        from proj.tasks import add
        with EmbeddedWorker(app):
            answer = add.apply_async((4, 4), countdown=0.2).get(timeout=60)
    """
    assert project.run(code) == 8


PLAIN_KOMBU = """
    from kombu import Connection, Queue
    queue = Queue("plain")
    with Connection("{broker}") as connection, connection.Producer() as producer:
        producer.publish({"n": 1}, routing_key="plain", declare=[queue])
        with connection.SimpleQueue(queue) as simple:
            message = simple.get(timeout=10)
            message.ack()
    answer = message.payload
"""


def test_a_kombu_program(project: Project, database_url: str) -> None:
    assert project.run(PLAIN_KOMBU.replace("{broker}", f"kathikon+{database_url}")) == {"n": 1}


def test_a_kombu_program_that_has_a_connection_and_nothing_else(project: Project, database_url: str) -> None:
    """Kombu loads no plug-in then, but takes the transport's class by its name."""
    code = """
        import kombu
        connection = kombu.Connection("{url}", transport="kathikon_celery.transport:Transport")
        connection.connect()
        answer = connection.connected
    """
    assert project.run(code.replace("{url}", database_url.replace("+psycopg", ""))) is True


def test_a_process_with_another_broker_pays_for_two_small_modules(project: Project) -> None:
    code = """
        import sys
        from celery import Celery
        app = Celery("other", broker="memory://", backend="cache+memory://")
        app.send_task("something")
        answer = sorted(name for name in sys.modules if name.startswith(("kathikon", "sqlalchemy", "alembic")))
    """
    assert project.run(code) == ["kathikon_celery", "kathikon_celery.discovery"]


def test_what_kombu_is_told_is_no_serializer(project: Project) -> None:
    code = """
        from kombu.exceptions import SerializerNotInstalled
        from kombu.serialization import dumps
        try:
            dumps({}, serializer="kathikon")
        except SerializerNotInstalled:
            answer = sys.version_info[:2] >= (3, 10)
    """
    assert project.run(f"import sys\n{dedent(code)}") is (sys.version_info[:2] >= (3, 10))
