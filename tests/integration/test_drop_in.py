"""The ways in which a project takes Kathikon up: each one a project of its own, on disk, with a real worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from kathikon_celery.job import Job, State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage, schedules
from tests.integration.conftest import Journal
from tests.support.projects import APP, Project
from tests.support.waiting import wait_until


@contextmanager
def storage_of(url: str) -> Iterator[Storage]:
    storage = Storage(url, Settings())
    storage.setup()
    try:
        yield storage
    finally:
        storage.close()


def rows(url: str) -> list[Job]:
    with storage_of(url) as storage:
        return storage.all()


def file_of(project: Project, name: str = "kathikon.db") -> str:
    return f"sqlite:///{project.directory / name}"


#: What the project does in each of the ways, and what becomes of it.
USE = """
    from proj.mail.tasks import Send, send
    from proj.tasks import add
    results = [add.delay(2, 3), send.delay("ann"), Send.delay("bob")]
    answer = [result.get(timeout=60) for result in results]
"""
RESULTS = [5, "sent to ann", "patterns mind upper and lower case"]
PLAIN = {"proj.tasks.add": "default", "proj.mail.tasks.send": "default", "proj.mail.tasks.Send": "default"}
ROUTED = PLAIN | {"proj.mail.tasks.send": "mail"}


def check(project: Project, url: str, queues: Mapping[str, str], **worker: Any) -> str:
    """Use the project, and see in the table that its jobs were done in their queues; the worker's log."""
    with project.worker(**worker) as running:
        assert project.run(USE) == RESULTS
        done = wait_until(lambda: [one for one in rows(url) if one.state is State.COMPLETED][2:] and rows(url))
        assert {one.task: one.queue for one in done} == dict(queues)
        return running.log


def test_as_it_is(project: Project) -> None:
    """One line, no setting: a SQLite file in the working directory, and Celery's default pool."""
    log = check(project, file_of(project), PLAIN, pool="prefork", concurrency=2)
    assert "kathikon" in log.partition("[queues]")[0]
    assert "WARNING" not in log


def test_a_configuration_module_of_ones_own(project: Project) -> None:
    project.write(
        "proj/settings.py",
        """
        from kathikon_celery.config import *

        kathikon_database_url = "sqlite:///own.db"
        kathikon_queues = {"default": 4, "mail": {"concurrency": 1, "tasks": ["proj.mail.tasks.s*"]}}
        imports = ["proj.tasks", "proj.mail.tasks"]
        """,
    )
    project.write("proj/celery.py", APP.replace("kathikon_celery.config", "proj.settings"))
    log = check(project, file_of(project, "own.db"), ROUTED)
    assert "mail" in log.partition("[queues]")[2].partition("[tasks]")[0]


def test_environment(project: Project) -> None:
    project.environment |= {
        "KATHIKON_DATABASE_URL": file_of(project, "named.db"),
        "KATHIKON_QUEUES": "mail:1,default:3",
    }
    # No route says otherwise, so it is Celery's default queue, though another one comes first.
    check(project, file_of(project, "named.db"), PLAIN)


def test_pyproject(project: Project) -> None:
    project.write(
        "pyproject.toml",
        """
        [tool.kathikon]
        database_url = "sqlite:///tool.db"
        [tool.kathikon.queues]
        default = 2
        mail = { concurrency = 1, tasks = ["proj.mail.tasks.send"] }
        """,
    )
    check(project, file_of(project, "tool.db"), ROUTED)


@pytest.mark.postgresql
def test_by_hand(project: Project, postgresql_url: str) -> None:
    """The broker's and the result backend's URLs, and nothing else of ours."""
    project.write(
        "proj/celery.py",
        f"""
        import kathikon_celery
        from celery import Celery
        app = Celery("proj", broker="kathikon+{postgresql_url}", backend="kathikon")
        app.autodiscover_tasks(["proj", "proj.mail"])
        """,
    )
    check(project, postgresql_url, dict.fromkeys(PLAIN, "celery"))


def test_django(project: Project) -> None:
    pytest.importorskip("django")
    project.environment["DJANGO_SETTINGS_MODULE"] = "proj.settings"
    project.write(
        "proj/settings.py",
        """
        from kathikon_celery.django import *

        SECRET_KEY = "not needed"
        USE_TZ = True
        TIME_ZONE = "Europe/Athens"
        INSTALLED_APPS = ["proj", "proj.mail"]
        CELERY_KATHIKON_DATABASE_URL = "sqlite:///django.db"
        CELERY_KATHIKON_QUEUES = {"default": 3, "mail": {"tasks": ["proj.mail.tasks.send"]}}
        CELERY_TASK_TRACK_STARTED = True
        """,
    )
    project.write(
        "proj/celery.py",
        """
        from celery import Celery
        app = Celery("proj")
        app.config_from_object("django.conf:settings", namespace="CELERY")
        app.autodiscover_tasks()
        """,
    )
    check(project, file_of(project, "django.db"), ROUTED)
    assert project.run("from proj.celery import app; answer = [str(app.timezone), app.conf.task_track_started]") == [
        "Europe/Athens",
        True,
    ]


DJANGO_TESTS = """
    from django.core import mail
    from django.test import TestCase
    from kathikon_celery.storage import Storage, schedules
    from kathikon_celery.testing.isolation import isolated
    from proj.celery import app
    from proj.tasks import add

    class Tests(TestCase):
        def test_nothing_of_the_real_table(self):
            sent = add.delay(1, 2)
            self.assertEqual([job.id for job in Storage.for_app(app).all()], [sent.id])
            self.assertEqual(sent.state, "PENDING")

        def test_a_database_of_its_own(self):
            with isolated(app, "sqlite:///own.db"):
                add.delay(1, 2)
            Storage.for_app(app).reset()
"""


@pytest.mark.parametrize(
    "setting",
    [
        'CELERY_KATHIKON_DATABASE_URL = "sqlite:///django.db"',
        'CELERY_BROKER_URL = CELERY_RESULT_BACKEND = "kathikon+sqlite:///django.db"',
        "",
    ],
)
def test_djangos_tests_do_not_touch_the_real_table(project: Project, setting: str) -> None:
    pytest.importorskip("django")
    project.environment["DJANGO_SETTINGS_MODULE"] = "proj.settings"
    project.write(
        "proj/settings.py",
        f"""
        from kathikon_celery.django import *

        SECRET_KEY = "not needed"
        INSTALLED_APPS = ["proj"]
        DATABASES = {{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": "site.db"}}}}
        {setting}
        """,
    )
    project.write(
        "proj/celery.py",
        """
        from celery import Celery
        app = Celery("proj")
        app.config_from_object("django.conf:settings", namespace="CELERY")
        app.autodiscover_tasks()
        """,
    )
    project.write("proj/tests.py", DJANGO_TESTS)
    assert "OK" in project.call("-m", "django", "test")
    assert {path.name for path in project.directory.glob("*.db")} == {"own.db"}


def test_a_queues_concurrency_is_never_exceeded(project: Project, tmp_path: Path) -> None:
    project.environment["KATHIKON_QUEUES"] = "default:none,narrow:2,one:1"
    journals = {name: Journal(tmp_path / name) for name in ("default", "narrow", "one")}
    # All of them wait before anybody runs the first: so it is the worker alone that decides what runs together.
    project.run(
        f"""
        from proj.tasks import timed
        for number in range(10):
            for queue in {list(journals)!r}:
                timed.apply_async(({str(tmp_path)!r} + "/" + queue, number), queue=queue)
        answer = None
        """
    )
    with project.worker(pool="prefork", concurrency=6):
        for journal in journals.values():
            journal.wait(20)
    assert journals["narrow"].most_at_once() == 2
    assert journals["one"].most_at_once() == 1
    assert journals["default"].most_at_once() > 2


def test_base_classes_and_requests_of_ones_own(project: Project, tmp_path: Path) -> None:
    """A task's own Request, as Celery documents it, and one that inherits from an abstract base."""
    project.write(
        "proj/base.py",
        """
        import logging
        from celery import Task
        from celery.worker.request import Request

        log = logging.getLogger("proj")

        class LoudRequest(Request):
            def on_failure(self, exc_info, send_failed_event=True, return_ok=False):
                log.warning("loud failure of %s", self.task.name)
                return super().on_failure(exc_info, send_failed_event, return_ok)

        class Base(Task):
            abstract = True
            unit = "apples"

            def on_success(self, retval, task_id, args, kwargs):
                log.warning("hook of %s: %s %s", self.name, retval, self.unit)

        class Loud(Base):
            abstract = True
            Request = "proj.base:LoudRequest"
            unit = "pears"
        """,
    )
    project.write(
        "proj/tasks.py",
        """
        import time
        from celery import current_app, shared_task
        from celery.exceptions import Reject
        from proj.base import Base, Loud

        class Count(Base):
            name = "proj.tasks.count"
            def run(self, x):
                return x + 1

        current_app.register_task(Count())

        @shared_task(base=Loud)
        def good(x):
            return x

        @shared_task(base=Loud, acks_late=False)
        def early(x):
            time.sleep(0.01)
            return x

        @shared_task(base=Loud)
        def bad():
            raise ValueError("as asked")

        @shared_task(base=Loud)
        def rejected():
            raise Reject("as asked", requeue=False)

        @shared_task(base=Loud, bind=True)
        def again(self):
            if not self.request.retries:
                raise self.retry(countdown=0)
            return self.request.retries

        @shared_task(base=Loud, time_limit=0.3)
        def slow():
            time.sleep(30)
        """,
    )
    with project.worker(pool="prefork", concurrency=2) as worker:
        answer = project.run(
            """
            from proj.celery import app
            from proj.tasks import again, bad, early, good, rejected, slow
            rejected.delay()
            results = [early.delay(number) for number in range(20)]
            results += [good.delay(1), again.delay(), app.tasks["proj.tasks.count"].delay(1)]
            failures = [bad.delay(), slow.delay()]
            answer = [result.get(timeout=60) for result in results]
            answer += [str(result.get(timeout=60, propagate=False)) for result in failures]
            """
        )
        assert answer == [*range(20), 1, 1, 2, "as asked", "TimeLimitExceeded(0.3,)"]
        url = file_of(project)
        pending = {State.AVAILABLE, State.CLAIMED, State.RUNNING, State.RETRYABLE}
        wait_until(lambda: not [job for job in rows(url) if job.state in pending], what="all jobs have ended")
        jobs = {job.task.rpartition(".")[2]: job for job in rows(url)}
        for said in (
            "loud failure of proj.tasks.bad",
            "hook of proj.tasks.good: 1 pears",
            "hook of proj.tasks.count: 2 apples",
        ):
            worker.wait_for_log(said)  # by a process whose result is known before
    expected = dict.fromkeys(("good", "early", "again", "count"), State.COMPLETED) | {"rejected": State.DISCARDED}
    assert {name: job.state for name, job in jobs.items()} == expected | {"bad": State.DEAD, "slow": State.DEAD}
    assert jobs["bad"].reason == "ValueError('as asked')"
    assert jobs["slow"].reason == "TimeLimitExceeded(0.3)"


def ends(pid: int) -> Callable[[], bool]:
    def ended() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{pid}/stat")  # where nobody reaps it, as in some containers, it stays a zombie
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"

    return ended


@contextmanager
def daemons(project: Project, *names: str) -> Iterator[list[int]]:
    """The process ids in so many pid files; what still runs in the end is killed."""

    def found() -> list[int]:
        try:
            return [int((project.directory / name).read_text()) for name in names]
        except (FileNotFoundError, ValueError):  # it is not there, or not written: Celery makes it twice
            return []

    pids = wait_until(found, what="pid files")
    try:
        yield pids
    finally:
        for pid in pids:
            if not ends(pid)():
                os.killpg(os.getpgid(pid), signal.SIGKILL)


def test_as_a_daemon(project: Project) -> None:
    project.celery("worker", "-D", "-P", "threads", "-l", "INFO", "--pidfile=worker.pid", "--logfile=worker.log")
    with daemons(project, "worker.pid") as pids:
        assert project.run(USE) == RESULTS
        os.kill(pids[0], signal.SIGTERM)
        wait_until(ends(pids[0]), 60, "the worker has ended")
    assert "ready." in (project.directory / "worker.log").read_text()


def test_celery_multi(project: Project) -> None:
    arguments = ["-A", "proj", "-c", "2", "--pidfile=%n.pid", "--logfile=%n.log", "--loglevel=INFO"]
    project.call("-m", "celery", "multi", "start", "one", "two", *arguments)
    with daemons(project, "one.pid", "two.pid") as pids:
        assert project.run(USE) == RESULTS
        for name in ("one", "two"):  # who has not begun yet has no pid file, and so is not stopped
            wait_until(lambda name=name: "ready." in (project.directory / f"{name}.log").read_text(), what="both")
        project.call("-m", "celery", "multi", "stopwait", "one", "two", *arguments)
        for pid in pids:
            wait_until(ends(pid), 60, "the worker has ended")


BEAT = """
    app.conf.beat_schedule = {
        "tick": {"task": "proj.tasks.tick", "schedule": 0.2, "args": ["JOURNAL"]},
    }
"""


def ticks_of(project: Project) -> list[str]:
    return [job.id for job in rows(file_of(project)) if job.task == "proj.tasks.tick"]


def test_the_workers_send_the_schedule_and_beat_beside_them_nothing(project: Project, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    project.write("proj/celery.py", dedent(APP) + dedent(BEAT).replace("JOURNAL", journal.path))
    with beat(project, tmp_path, "the workers send the schedules; this beat has nothing to do") as beside:
        with project.worker("-B", pool="prefork", concurrency=1):
            journal.wait(5)
        assert beside.poll() is None
        sent = ticks_of(project)
        with storage_of(file_of(project)) as storage, storage.database.read() as connection:
            (row,) = schedules.every(connection)
        assert row.runs == len(sent) == len(set(sent))


def test_a_schedule_that_is_left_to_beat(project: Project, tmp_path: Path) -> None:
    """Beat beside the workers, then within one."""
    journal = Journal(tmp_path / "journal")
    given = dedent(APP) + dedent(BEAT).replace("JOURNAL", journal.path)
    project.write("proj/celery.py", given + 'app.conf.beat_scheduler = "celery.beat:PersistentScheduler"\n')
    with beat(project, tmp_path, "beat: Starting...", "--schedule=beat") as beside:
        wait_until(lambda: len(ticks_of(project)) >= 3, 60, "three jobs")
        assert beside.poll() is None
    sent = set(ticks_of(project))
    with project.worker("-B", "--schedule=embedded", pool="prefork", concurrency=1):
        journal.wait(len(sent) + 3)

        def done() -> bool:
            found = [job for job in rows(file_of(project)) if job.state is State.COMPLETED]
            return len({job.id for job in found} - sent) >= 2

        wait_until(done, 60, "jobs of the embedded beat")


@contextmanager
def beat(project: Project, tmp_path: Path, says: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """``celery beat``, as soon as its log has *says*."""
    command = [sys.executable, "-m", "celery", "-A", "proj", "beat", "--loglevel=INFO", *options]
    path = tmp_path / "beat.log"
    with (
        path.open("w") as log,
        subprocess.Popen(
            command, cwd=tmp_path, env=project.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        try:
            wait_until(lambda: says in path.read_text(), 60, "beat says it")
            yield process
        finally:
            process.kill()
