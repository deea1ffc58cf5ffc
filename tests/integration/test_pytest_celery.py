"""The ``celery_setup`` of pytest-celery on a database and on local processes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import celery
import psutil
import pytest
from pytest_celery import CeleryTestSetup, CeleryTestWorker, CeleryWorkerCluster
from pytest_celery.vendors.worker import tasks

from kathikon_celery.job import State
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import Unavailable
from kathikon_celery.testing.components import KathikonTestBackend, KathikonTestBroker, KathikonWorkerContainer
from tests.support import apps
from tests.support.waiting import wait_until

pytest_plugins = ["kathikon_celery.testing.components"]


@pytest.fixture(autouse=True)
def no_docker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were an engine asked for, the test would fail, also where there is one."""
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")


@pytest.fixture(autouse=True)
def nothing_stays_open(no_docker: None, tmp_path: Path) -> Iterator[None]:
    """After the end of all other fixtures, this process has no file of the test's database open."""
    yield
    assert not [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))]


@pytest.fixture
def default_worker_tasks(default_worker_tasks: set[ModuleType]) -> set[ModuleType]:
    return default_worker_tasks | {apps}


class TestOnEveryDatabase:
    @pytest.fixture
    def kathikon_database_url(self, database_url: str) -> str:
        return database_url

    def test_real_tasks(self, celery_setup: CeleryTestSetup, kathikon_storage: Storage) -> None:
        assert celery_setup.ready(ping=True, control=True, docker=True)
        worker = celery_setup.worker
        queue = worker.worker_queue
        results = [tasks.add.s(number, 1).apply_async(queue=queue) for number in range(10)]
        assert [result.get(timeout=60) for result in results] == list(range(1, 11))
        failing = tasks.fail.s("as asked").apply_async(queue=queue)
        with pytest.raises(RuntimeError, match="Task expected to fail"):
            failing.get(timeout=60)
        retried = apps.echo.s({"a": [1]}).apply_async(queue=queue, countdown=0.2)
        assert retried.get(timeout=60) == [[{"a": [1]}], {}]
        worker.assert_log_exists(f"add[{results[0].id}] succeeded")
        worker.assert_log_does_not_exist("Traceback of another test")
        assert kathikon_storage.counts() == {("celery", "completed"): 12, ("celery", "dead"): 1}
        assert kathikon_storage.fetch(failing.id).state is State.DEAD  # type: ignore[union-attr]


def test_what_the_nodes_say(celery_setup: CeleryTestSetup, kathikon_database_url: str) -> None:
    assert len(celery_setup) == 3
    assert isinstance(celery_setup.broker, KathikonTestBroker)
    assert isinstance(celery_setup.backend, KathikonTestBackend)
    url = f"kathikon+{kathikon_database_url}"
    assert celery_setup.broker.config() == celery_setup.backend.config() == {"url": url, "host_url": url}
    conf = celery_setup.app.conf
    assert (conf.broker_url, conf.result_backend, conf.task_acks_late) == (url, url, True)

    worker = celery_setup.worker
    assert (worker.version, worker.log_level, worker.worker_queue) == (celery.__version__, "INFO", "celery")
    assert worker.hostname() == f"celery_test_worker@{worker.container.id[:12]}"
    assert celery_setup.app.control.inspect(timeout=30, limit=1).ping() == {worker.hostname(): {"ok": "pong"}}
    assert worker.container.env["CELERY_BROKER_URL"] == url
    assert worker.container.ips.primary == "127.0.0.1"
    assert os.path.isdir(worker.container.env["PYTHONPATH"].split(os.pathsep)[0])

    processes = worker.get_running_processes_info(["pid", "cmdline"])
    assert len(processes) == 1 + (os.cpu_count() or 1)
    assert all(
        worker.hostname().replace(worker.container.id[:12], "%h") not in process["cmdline"] for process in processes
    )
    assert worker.get_running_processes_info(["name"], {"name": "celery"}) == [{"name": "celery"}] * len(processes)
    assert worker.get_running_processes_info(["pid"], {"pid": processes[0]["pid"]}) == [{"pid": processes[0]["pid"]}]


def test_a_killed_worker_and_what_it_ran(
    celery_setup: CeleryTestSetup, kathikon_storage: Storage, tmp_path: Path
) -> None:
    worker = celery_setup.worker
    running = apps.wait_for_file.s(str(tmp_path / "go on")).apply_async(queue=worker.worker_queue)
    wait_until(lambda: kathikon_storage.counts().get((worker.worker_queue, "running")), what="it runs")
    worker.kill()
    assert worker.container.status == "exited"
    assert worker.container.attrs["State"]["ExitCode"] == 137
    assert running.state != "SUCCESS"
    worker.restart()
    assert worker.container.status == "running"
    (tmp_path / "go on").touch()
    assert running.get(timeout=60) == "done"
    job = kathikon_storage.fetch(running.id)
    assert job is not None
    assert (job.state, job.crashes) == (State.COMPLETED, 1)


def test_signals_reach_the_worker(celery_setup: CeleryTestSetup) -> None:
    worker = celery_setup.worker
    worker.kill("SIGTERM", reload_container=True)
    worker.wait_for_log("worker: Warm shutdown (MainProcess)")
    wait_until(lambda: worker.container.status == "exited", 60, "the worker has ended")
    assert worker.container.attrs["State"]["ExitCode"] == 0
    waiting = tasks.ping.s().apply_async(queue=worker.worker_queue)
    worker.restart(force=True)
    assert waiting.get(timeout=60) == "pong"


def test_one_signal_after_the_other(celery_setup: CeleryTestSetup, tmp_path: Path) -> None:
    """A warm shutdown becomes a cold one, which becomes a hard one."""
    worker = celery_setup.worker
    apps.wait_for_file.s(str(tmp_path / "never")).apply_async(queue=worker.worker_queue)
    worker.wait_for_log("wait_for_file")
    for signal in ("SIGTERM", "SIGQUIT", "SIGQUIT"):
        worker.kill(signal)
    wait_until(lambda: worker.container.status == "exited", 60, "the worker has ended")
    said = worker.logs()
    assert 0 < said.index("worker: Warm shutdown (MainProcess)") < said.index("worker: Cold shutdown (MainProcess)")


class TestCluster:
    @pytest.fixture
    def celery_worker_cluster(
        self, celery_worker: CeleryTestWorker, kathikon_start_worker: Callable[[], CeleryTestWorker]
    ) -> CeleryWorkerCluster:
        return CeleryWorkerCluster(celery_worker, kathikon_start_worker())

    def test_one_goes_on_with_what_the_other_ran(
        self, celery_setup: CeleryTestSetup, kathikon_storage: Storage, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "kathikon_celery")  # no warning, if it was killed between two jobs
        one, other = celery_setup.worker_cluster
        assert celery_setup.worker_cluster.versions == {celery.__version__}
        answers = celery_setup.app.control.inspect(timeout=30, limit=2).ping()
        assert set(answers) == {one.hostname(), other.hostname()}
        results = [tasks.sleep.s(0.3).apply_async(queue=one.worker_queue) for _ in range(8)]
        wait_until(lambda: kathikon_storage.counts().get(("celery", "running")), what="jobs run")
        one.kill()
        assert all(result.get(timeout=60) for result in results)
        said = "is dead, its process is gone"  # by whoever is the first to see it: this process is a node as well
        wait_until(lambda: said in other.logs() or said in caplog.text, 60, "one of the living says that it is dead")


class TestOwnSettings:
    @pytest.fixture
    def celery_setup_cls(self) -> type[CeleryTestSetup]:
        class Setup(CeleryTestSetup):
            @classmethod
            def update_app_config(cls, app: celery.Celery) -> None:
                app.conf.task_reject_on_worker_lost = False

        return Setup

    @pytest.fixture
    def celery_setup_config(self, celery_setup_config: dict[str, Any]) -> dict[str, Any]:
        return {**celery_setup_config, "task_acks_late": False}

    def test_they_count(self, celery_setup_app: celery.Celery) -> None:
        conf = celery_setup_app.conf
        assert conf.task_acks_late is conf.task_reject_on_worker_lost is False
        assert conf.task_store_errors_even_if_ignored is True


class TestOwnWorker:
    @pytest.fixture
    def default_worker_container_cls(self) -> type[KathikonWorkerContainer]:
        class Container(KathikonWorkerContainer):
            @classmethod
            def command(cls, *args: str, **options: Any) -> list[str]:
                return super().command("--pool=threads", "--concurrency=3", *args)

            @classmethod
            def worker_name(cls) -> str:
                return "mine"

            @classmethod
            def worker_queue(cls) -> str:
                return "emails"

            @classmethod
            def initial_env(cls, config: dict[str, Any], initial: dict[str, Any] | None = None) -> dict[str, Any]:
                return super().initial_env(config, {"FLAVOUR": "salted", **(initial or {})})

        return Container

    @pytest.fixture
    def default_worker_app(self, default_worker_app: celery.Celery) -> celery.Celery:
        default_worker_app.conf.task_default_queue = "emails"
        default_worker_app.conf.task_track_started = True
        return default_worker_app

    def test_it_is_what_runs(self, celery_setup: CeleryTestSetup) -> None:
        worker = celery_setup.worker
        assert worker.hostname().startswith("mine@")
        assert apps.describe.delay().get(timeout=60)["queue"] == "emails"
        stats = celery_setup.app.control.inspect([worker.hostname()], timeout=60).stats()[worker.hostname()]
        assert stats["pool"]["max-concurrency"] == 3
        code, output = worker.container.exec_run("python -c \"import os; print(os.environ['FLAVOUR'])\"")
        assert (code, output) == (0, b"salted\n")
        assert worker.container.exec_run(["false"]).exit_code == 1


def test_a_worker_that_does_not_start_says_why(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KathikonWorkerContainer, "log_level", classmethod(lambda cls: "NONSENSE"))
    with pytest.raises(RuntimeError, match=r"(?s)--loglevel=NONSENSE .* did not say 'ready.' but:.*Invalid value"):
        request.getfixturevalue("default_worker_container")


@pytest.mark.postgresql
class TestOutage:
    @pytest.fixture
    def kathikon_database_url(self, postgresql_url: str) -> str:
        return postgresql_url

    def test_the_database_goes_and_comes_back(self, celery_setup: CeleryTestSetup) -> None:
        broker, queue = celery_setup.broker, celery_setup.worker.worker_queue
        running = tasks.sleep.s(1.0).apply_async(queue=queue)
        celery_setup.worker.wait_for_log("received")
        broker.kill()
        assert broker.container.status == "exited"
        with pytest.raises((Unavailable, celery.app.task.Task.OperationalError)):
            tasks.ping.s().apply_async(queue=queue, retry=False)
        broker.restart()
        assert running.get(timeout=60) is True
        assert tasks.ping.s().apply_async(queue=queue).get(timeout=60) == "pong"


def test_a_file_cannot_be_killed(celery_broker: KathikonTestBroker) -> None:
    celery_broker.restart()
    with pytest.raises(RuntimeError, match=r"kathikon-test.db cannot be killed: only a PostgreSQL database"):
        celery_broker.kill()


def test_docker_is_not_there() -> None:
    """What `no_docker` points to: nobody listens there."""
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 1)) != 0
