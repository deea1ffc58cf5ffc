"""What Kathikon says to somebody who uses it for the first time, and when it says nothing."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.utils import bugreport
from sqlalchemy import make_url

from kathikon_celery.publish import unconsumed
from kathikon_celery.settings import shown
from kathikon_celery.storage import Storage, nodes
from tests.support.projects import Project
from tests.support.waiting import wait_until

PASSWORD = "hush-hush"
DELAY = "from proj.tasks import add\nfor _ in range(3):\n    answer = add.apply_async((1, 2), queue={!r}).id"
NO_WORKER = "no worker consumes there"
NO_CONSUMER = "no worker of"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def output(project: Project, code: str, *options: str) -> str:
    """All that a process of the project prints."""
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=project.directory, env=project.environment, timeout=60, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ).stdout  # fmt: skip


def test_what_a_new_user_sees(project: Project) -> None:
    """No variable is set: which file holds the jobs, and what is said of it."""
    file = project.directory / "kathikon.db"
    url = f"kathikon+sqlite:///{file}"

    alone = output(project, DELAY.format("default"))
    assert alone.count(NO_WORKER) == 1, alone
    assert str(file) in alone
    assert "kathikon_database_url" in alone
    assert "KATHIKON_DATABASE_URL" in alone

    project.environment["KATHIKON_QEUES"] = "x"
    with project.worker(pool="prefork", concurrency=2) as worker:
        assert f"transport:   {url}" in worker.log
        assert f"results:     {url}" in worker.log
        worker.wait_for_log(f"Connected to {url}")
        project.run("from proj.tasks import add\nanswer = [add.delay(1, n).get(timeout=30) for n in range(4)]")
        assert worker.log.count("<environment>:1: SettingWarning: KATHIKON_QEUES") == 1, worker.log
        del project.environment["KATHIKON_QEUES"]

        storage = Storage(f"sqlite:///{file}")
        wait_until(lambda: consumed(storage) == [{"default"}], 30)
        assert output(project, DELAY.format("default")) == ""
        told = output(project, DELAY.format("nobodys"))
        assert told.count(NO_CONSUMER) == 1, told
        assert "'nobodys'" in told
        assert "No worker consumes nobodys." in project.celery("kathikon", "counts")
        assert f'"hostname": "{url}"' in project.celery("inspect", "stats")
        assert f"broker_url: '{url}'" in project.celery("report")
        storage.close()


def consumed(storage: Storage) -> list[set[str] | None]:
    with storage.database.read() as connection:
        return nodes.consumed(connection)


def test_the_first_start_is_quiet(project: Project) -> None:
    with project.worker() as worker:
        pass
    assert "alembic" not in worker.log
    assert "Impl" not in worker.log
    assert re.search(r"the tables of <Database sqlite:///.*/kathikon\.db> are created; their version is", worker.log)


class TestUnconsumed:
    """The warnings, in this process."""

    @pytest.fixture
    def app(self, kathikon_app: Celery, caplog: pytest.LogCaptureFixture) -> Celery:
        caplog.set_level(logging.WARNING, "kathikon_celery")
        return kathikon_app

    @pytest.fixture
    def kathikon_database_url(self, database_url: str) -> str:
        return database_url

    def look(self, app: Celery, caplog: pytest.LogCaptureFixture) -> list[str]:
        """What is said when the time has come."""
        caplog.clear()
        unconsumed._watches[Storage.for_app(app)].look()
        return [record.getMessage() for record in caplog.records]

    def test_nothing_is_said_without_workers(self, app: Celery, caplog: pytest.LogCaptureFixture) -> None:
        app.send_task("any", queue="mail")
        assert self.look(app, caplog) == []

    def test_each_queue_once(self, app: Celery, caplog: pytest.LogCaptureFixture) -> None:
        storage = Storage.for_app(app)

        def nothing() -> None: ...

        any_task = app.task(name="any")(nothing)
        worker = nodes.register(storage.database, "worker", "here", 1, 1.0, lease=60.0)
        nodes.consume(storage.database, worker.id, ["default", "mail"])
        for queue in ("default", "mail", "post", "post", "parcels"):
            for send in (any_task.apply_async, lambda queue: app.send_task("other", queue=queue)):
                send(queue=queue)
        (said,) = self.look(app, caplog)
        assert "'post', 'parcels'" in said
        assert repr(storage.database) in said
        any_task.apply_async(queue="post")
        assert self.look(app, caplog) == []
        any_task.apply_async(queue="letters")
        (said,) = self.look(app, caplog)
        assert "'letters'" in said

    def test_nothing_is_said_of_unknown_workers(self, app: Celery, caplog: pytest.LogCaptureFixture) -> None:
        nodes.register(Storage.for_app(app).database, "older version", "here", 1, 1.0, lease=60.0)
        app.send_task("any", queue="mail")
        assert self.look(app, caplog) == []

    def test_nothing_is_said_of_what_does_not_wait(self, app: Celery, caplog: pytest.LogCaptureFixture) -> None:
        storage = Storage.for_app(app)
        nodes.consume(
            storage.database, nodes.register(storage.database, "w", "here", 1, 1.0, lease=60.0).id, ["default"]
        )
        app.send_task("any", queue="mail")
        app.send_task("any", queue="later", countdown=3600)
        app.send_task("any", queue="taken")
        storage.claim("mail")
        storage.claim("taken")
        (said,) = self.look(app, caplog)
        assert "consumes: 'later'." in said

    def test_what_was_closed_is_not_looked_at(self, app: Celery, caplog: pytest.LogCaptureFixture) -> None:
        storage = Storage.for_app(app)
        nodes.consume(
            storage.database, nodes.register(storage.database, "w", "here", 1, 1.0, lease=60.0).id, ["default"]
        )
        app.send_task("any", queue="mail")
        storage.close()
        assert self.look(app, caplog) == []


@pytest.mark.parametrize("by_url", [True, False])
@pytest.mark.parametrize(
    "database", ["sqlite:///jobs.db", f"postgresql://app:{PASSWORD}@db:5432/jobs?sslpassword=hush"]
)
def test_the_database_is_shown(database: str, by_url: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = Celery("proj", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    if by_url:
        app.conf.update(broker_url=f"kathikon+{database}", result_backend=f"kathikon+{database}")
    else:
        app.conf.update(kathikon_database_url=database)
    with app.connection() as connection:
        shown_as = connection.as_uri(), app.backend.as_uri()
        full: Any = connection.as_uri(include_password=True), app.backend.as_uri(include_password=True)
    for text, complete in zip(shown_as, full, strict=True):
        assert PASSWORD not in text
        assert "hush" not in text
        url = make_url(complete.removeprefix("kathikon+"))
        assert text == f"kathikon+{shown(url)}"
        if database.startswith("sqlite"):
            assert url.database == str(tmp_path / "jobs.db")
        else:
            assert (url.password, url.host, url.database) == (PASSWORD, "db", "jobs")
    assert PASSWORD not in bugreport(app)
