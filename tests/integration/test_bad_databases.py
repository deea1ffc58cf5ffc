"""Databases that cannot be used, or not yet, and wrong settings: what workers and producers say, and then do."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import celery
import pytest
from celery.bin.base import CLIContext
from click.testing import CliRunner
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from sqlalchemy import NullPool, create_engine, make_url, select, text

from kathikon_celery.cli import kathikon
from kathikon_celery.job import Job, State
from kathikon_celery.storage import SchemaError, Storage
from kathikon_celery.storage.tables import nodes
from tests.integration.conftest import client_of
from tests.support import apps
from tests.support.postgresql import PostgreSQLServer
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

PASSWORD = "hunter2-and-more"
PRODUCER = "from tests.support import apps; print(apps.app.send_task('tests.support.apps.add', (1, 1)).id)"
#: Makes root heed the permissions of files, as anybody else has to.
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]

Begin = Callable[..., WorkerProcess]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Start a worker and do not wait for it."""
    with ExitStack() as stack:

        def begin(url: str | None, prefix: list[str] | None = None, **options: Any) -> WorkerProcess:
            worker = WorkerProcess(url, directory=tmp_path, **{"pool": "threads", **options})
            worker.command[:0] = prefix or []
            worker.start(ready_timeout=None)
            return stack.enter_context(worker)

        yield begin


def is_at_work(url: str, worker: WorkerProcess) -> None:
    worker.wait_ready(60)
    with client_of(url):
        assert apps.add.delay(2, 2).get(timeout=60) == 4


@pytest.mark.postgresql
def test_a_server_that_is_silent_then_away_then_there(begin: Begin) -> None:
    server = PostgreSQLServer()
    url = f"postgresql://postgres:{PASSWORD}@127.0.0.1:{server.port}/postgres"
    with ExitStack() as stack:
        stack.callback(server.destroy)
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            silent.bind(("127.0.0.1", server.port))
            silent.listen()
            worker = begin(url, conf={"broker_connection_timeout": 2})
            with client_of(url, broker_connection_timeout=2):
                started = monotonic()
                with pytest.raises(OperationalError, match="is away: connection timeout expired") as caught:
                    apps.add.delay(1, 1)
                assert monotonic() - started < 60
            worker.wait_for_log("is away: connection timeout expired", 60)
        worker.wait_for_log("is away: connection failed", 60)
        server.start()
        is_at_work(url, worker)
    assert PASSWORD not in worker.log + str(caught.value)
    assert "Traceback" not in worker.log


def test_a_folder_that_is_made_later(begin: Begin, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/later/kathikon.db"
    worker = begin(url)
    words = f"the folder '{tmp_path}/later' of the SQLite file does not exist; create it"
    with client_of(url), pytest.raises(OperationalError, match=words):
        apps.add.delay(1, 1)
    worker.wait_for_log(words, 60)
    (tmp_path / "later").mkdir()
    is_at_work(url, worker)
    assert "Traceback" not in worker.log


def why_not(*command: str) -> str | None:
    """Run a command; `None` if that went well."""
    if shutil.which(command[0]) is None:
        return f"there is no {command[0]}"
    tried = subprocess.run(command, capture_output=True, text=True)
    return tried.stderr.strip() or str(tried.returncode) if tried.returncode else None


@pytest.fixture
def unprivileged() -> list[str]:
    """What a command begins with so that permissions bind it."""
    if os.geteuid() != 0:
        return []
    if why := why_not(*WITHOUT_PRIVILEGE, "true"):
        pytest.skip(f"root is bound by no permission here: {why}")
    return WITHOUT_PRIVILEGE


def published(url: str, prefix: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = WorkerProcess(url, directory=directory).environment
    command = [*prefix, sys.executable, "-c", PRODUCER]
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=60)


def test_a_file_that_is_read_only(begin: Begin, tmp_path: Path, unprivileged: list[str]) -> None:
    folder = tmp_path / "database"
    folder.mkdir()
    url = f"sqlite:///{folder}/kathikon.db"
    storage = Storage(url)
    storage.setup()
    storage.insert(Job(id="before", task="none"))
    storage.close()
    file = folder / "kathikon.db"
    file.chmod(0o444)
    refused = published(url, unprivileged, tmp_path)
    assert refused.returncode != 0
    assert f"the SQLite file '{file}' is read-only; give its owner the right to write" in refused.stderr
    worker = begin(url, unprivileged)
    worker.wait_for_log("is read-only; give its owner the right to write", 60)
    file.chmod(0o644)
    is_at_work(url, worker)
    assert storage.fetch("before") is not None
    storage.close()


def test_a_folder_that_is_read_only(begin: Begin, tmp_path: Path, unprivileged: list[str]) -> None:
    folder = tmp_path / "database"
    folder.mkdir(0o555)
    url = f"sqlite:///{folder}/kathikon.db"
    refused = published(url, unprivileged, tmp_path)
    assert refused.returncode != 0
    assert f"the folder '{folder}' of the SQLite file is read-only; it must be writable" in refused.stderr
    folder.chmod(0o755)
    accepted = published(url, unprivileged, tmp_path)
    assert accepted.returncode == 0, accepted.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if why := why_not("mount", "-t", "tmpfs", "-o", "size=4m", "kathikon-test", str(folder)):
        pytest.skip(f"no small disk can be mounted here: {why}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(begin: Begin, small_disk: Path) -> None:
    url = f"sqlite:///{small_disk}/kathikon.db"
    worker = begin(url)
    is_at_work(url, worker)
    filler = small_disk / "filler"
    with client_of(url) as app:
        accepted = [apps.add.delay(number, 1) for number in range(10)]
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        more = (apps.echo.apply_async(("x" * 10_000,), ignore_result=True) for _ in range(2000))
        with pytest.raises(OperationalError, match="is full or broken"):
            accepted.extend(more)  # one after the other: SQLite's log of changes may have room left in it
        worker.wait_for_log("is full", 60)
        assert worker.running
        filler.unlink()
        storage = Storage.for_app(app)
        for sent in accepted:
            wait_until(lambda sent=sent: storage.fetch(sent.id).state is State.COMPLETED, 60, "all that was accepted")
        assert apps.add.delay(2, 2).get(timeout=60) == 4
        storage.close()
    assert worker.stop() == 0


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_file_that_is_deleted_while_all_are_at_work(begin: Begin, sqlite_url: str, pool: str) -> None:
    """Its jobs are gone, but no other job is sent to a file that has no name any more."""
    worker = begin(sqlite_url, pool=pool)
    is_at_work(sqlite_url, worker)
    path = Path(make_url(sqlite_url).database or "")
    with client_of(sqlite_url) as client:
        assert apps.add.delay(1, 1).get(timeout=60) == 2
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        assert [apps.add.delay(number, 1).get(timeout=60) for number in range(5)] == [1, 2, 3, 4, 5]
        wait_until(lambda: client.control.ping([worker.hostname], timeout=1), 60, "an answer")
        assert nodes_of(sqlite_url).count(worker.hostname) == 1
    assert "was deleted or replaced while it was in use; what it held is gone" in worker.log
    assert "taken for dead" not in worker.log
    assert worker.stop() == 0
    assert worker.hostname not in nodes_of(sqlite_url)


HEARTBEAT = """
import os, shutil
from celery.signals import heartbeat_sent
from kathikon_celery.storage import Storage
from tests.support.apps import app

@heartbeat_sent.connect(weak=False)
def lose_the_database(**_):
    if os.path.exists("lose it"):
        shutil.rmtree("folder")
        Storage.for_app(app, setup=False)._replaced()  # as another thread does that sees it in this moment
        os.remove("lose it")
"""


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_heartbeat_that_meets_the_loss_first_can_be_stopped(begin: Begin, tmp_path: Path, pool: str) -> None:
    """Celery sends it again until it is sent, in the thread that stops the worker."""
    (tmp_path / "proj.py").write_text(HEARTBEAT)
    (tmp_path / "folder").mkdir()
    url = f"sqlite:///{tmp_path}/folder/k.db"
    worker = begin(url, app="proj", pool=pool)
    is_at_work(url, worker)
    with client_of(url) as client, client.connection_for_write() as connection:
        listener = Queue("listener", Exchange("celeryev", type="topic"), routing_key="#")(connection.default_channel)
        listener.declare()
        wait_until(listener.get, what="an event")
    (tmp_path / "lose it").touch()
    wait_until(lambda: not (tmp_path / "lose it").exists(), what="a heartbeat")
    worker.process.terminate()
    assert worker.wait(60) == 0
    assert "Warm shutdown" in worker.log


def nodes_of(url: str) -> list[str]:
    with closing(Storage(url)) as storage, storage.database.read() as connection:
        return list(connection.scalars(select(nodes.c.name)))


def test_tables_of_a_newer_version(begin: Begin, sqlite_url: str) -> None:
    storage = Storage(sqlite_url)
    storage.setup()
    with storage.database.write() as connection:
        connection.execute(text("UPDATE kathikon_version SET version_num = '9999'"))
    storage.close()
    worker = begin(sqlite_url)
    assert worker.wait(60) != 0
    assert "have version '9999', this code knows versions up to" in worker.log
    assert "waits for the database" not in worker.log
    assert "Traceback" not in worker.log
    with client_of(sqlite_url), pytest.raises(SchemaError, match="they were made by a newer kathikon-celery"):
        apps.add.delay(1, 1)


OWN_QUEUES = """
from celery import Celery
from kombu import Queue
app = Celery("proj")
app.config_from_object("kathikon_celery.config")
app.conf.update(task_queues=[Queue("own")], task_routes={}, kathikon_lease="for ever")
"""
DJANGO = """
import types
from celery import Celery
from kathikon_celery import django
settings = types.SimpleNamespace(**vars(django), CELERY_KATHIKON_LEASE="for ever")
app = Celery("proj")
app.config_from_object(settings, namespace="CELERY")
"""
NO_DRIVER = """
import sys
sys.modules["psycopg"] = None
from celery import Celery
app = Celery("proj")
app.config_from_object("kathikon_celery.config")
app.conf.kathikon_database_url = "postgresql://app:hunter2-and-more@127.0.0.1:1/jobs"
"""
LEASE = "kathikon_lease = 'for ever' ({}): allowed is seconds from 2 to 3600"

#: What a worker is started with, and what it must say.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "environment": ({"env": {"KATHIKON_LEASE": "for ever"}}, LEASE.format("environment variable KATHIKON_LEASE")),
    "pyproject": ({"pyproject": "[tool.kathikon]\nlease = 'for ever'"}, "lease = 'for ever' ([tool.kathikon] in "),
    "conf": ({"conf": {"kathikon_lease": "for ever"}}, LEASE.format("kathikon_lease in app.conf")),
    "own-queues": ({"module": OWN_QUEUES}, LEASE.format("kathikon_lease in app.conf")),
    "django": ({"module": DJANGO}, LEASE.format("CELERY_KATHIKON_LEASE in app.conf")),
    "unknown": ({"conf": {"kathikon_leese": 5}}, "kathikon_leese in app.conf is no setting of Kathikon; did you mean"),
    "database": (
        {"env": {"KATHIKON_DATABASE_URL": f"mysql://app:{PASSWORD}@h/d"}},
        "kathikon_database_url = 'mysql://app:***@h/d' (environment variable KATHIKON_DATABASE_URL): allowed is",
    ),
    "broker": (
        {"conf": {"broker_url": f"kathikon+oracle://app:{PASSWORD}@h/d"}},
        "broker_url = 'oracle://app:***@h/d' after 'kathikon+': allowed is",
    ),
    "backend": ({"env": {"KATHIKON_STORAGE_BACKEND": "no.such:Module"}}, "kathikon_storage_backend = 'no.such:Module'"),
    "no-class": ({"env": {"KATHIKON_STORAGE_BACKEND": "os:path"}}, "kathikon_storage_backend = 'os:path' is no class"),
    "driver": ({"module": NO_DRIVER}, "needs the package psycopg, which cannot be imported"),
    "option": (
        {"env": {"KATHIKON_DATABASE_URL": f"postgresql://app@127.0.0.1:1/d?password={PASSWORD}&sslmod=require"}},
        'postgresql+psycopg://app@127.0.0.1:1/d?password=***&sslmod=require: invalid connection option "sslmod"',
    ),
    "no-plus": (
        {"conf": {"broker_url": f"kathikon://app:{PASSWORD}@h/d"}},
        "broker_url = 'kathikon://app:***@h/d': allowed is kathikon:// for the database that",
    ),
    "no-plus-results": (
        {"conf": {"result_backend": "kathikon:///results.db"}},
        "result_backend = 'kathikon:///results.db': allowed is kathikon:// for the database that",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_setting_ends_the_worker_at_once(begin: Begin, tmp_path: Path, what: str) -> None:
    options, said = WRONG[what]
    options = dict(options)
    for key, name in (("module", "proj.py"), ("pyproject", "pyproject.toml")):
        if key in options:
            (tmp_path / name).write_text(options.pop(key))
            if key == "module":
                options["app"] = "proj"
    worker = begin(None, pool="solo", **options)
    assert worker.wait(60) == 1
    assert said in worker.log
    assert "Traceback" not in worker.log
    assert PASSWORD not in worker.log


@pytest.fixture
def role(postgresql_url: str) -> Iterator[str]:
    """The URL of a role that may do no more than to connect."""
    engine = create_engine(postgresql_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    name = f"kathikon_{uuid4().hex}"
    with engine.connect() as connection:
        connection.execute(text("REVOKE CREATE ON SCHEMA public FROM public"))
        connection.execute(text(f"CREATE ROLE {name} LOGIN"))
        yield make_url(postgresql_url).set(username=name).render_as_string(hide_password=False)
        connection.execute(text(f"DROP OWNED BY {name}"))
        connection.execute(text(f"DROP ROLE {name}"))


@pytest.mark.postgresql
@pytest.mark.timeout(300)  # four workers, one after the other
def test_a_role_that_may_not(begin: Begin, postgresql_url: str, role: str) -> None:
    """The worker ends, and says in a line what is to be done; once it is done, it works."""

    def says(what: str) -> None:
        worker = begin(role, name=what.replace(" ", "-"))
        assert worker.wait(60) == 1
        remedy = f"{what}; grant it to this role ('Rights' in docs/postgresql.md lists "
        if "schema" in what:
            remedy = f"{what}; have the owner of the database run what 'celery -A proj kathikon schema --sql' prints"
        assert remedy in worker.log.replace("\n", " ")
        assert "Traceback" not in worker.log

    with closing(Storage(postgresql_url)) as owner:
        says("permission denied for schema public")
        owner.setup()
        says("permission denied for table kathikon_version")
        for what, other in (("TABLES", "permission denied for sequence kathikon_nodes_id_seq"), ("SEQUENCES", None)):
            with owner.database.write() as connection:
                connection.execute(text(f"GRANT ALL ON ALL {what} IN SCHEMA public TO {make_url(role).username}"))
            if other:
                says(other)
    is_at_work(role, begin(role))


@pytest.mark.postgresql
def test_no_password_is_shown_anywhere(begin: Begin, postgresql_url: str, capfd: pytest.CaptureFixture[str]) -> None:
    own = make_url(postgresql_url).set(password=PASSWORD).render_as_string(hide_password=False)
    conf = {
        "broker_url": f"kathikon+{own}", "result_backend": f"kathikon+{own}", "kathikon_database_url": own,
    }  # fmt: skip
    if celery.VERSION >= (5, 7):  # before, `inspect conf` shows what stands in this setting, of any broker
        conf["broker_read_url"] = f"kathikon+{own}"
    worker = begin(None, conf=conf, args=["--loglevel", "DEBUG"])
    worker.wait_ready(60)
    shown: list[Any] = []
    app = apps.create_app("client", **conf)
    inspect = app.control.inspect([worker.hostname], timeout=30)
    with app.connection_for_write() as connection:
        shown += [connection.as_uri(), repr(connection), str(connection)]
        shown += [repr(connection.default_channel), repr(connection.transport)]
    sent = app.send_task("tests.support.apps.fail", ("alas",))
    with pytest.raises(ValueError, match="alas"):
        sent.get(timeout=60)
    storage = Storage.for_app(app)
    shown += [inspect.stats(), inspect.conf(with_defaults=True), inspect.report(), inspect.ping(), inspect.registered()]
    assert all(shown)
    shown += [app.backend.as_uri(), repr(app.backend), repr(storage), repr(storage.database), repr(storage.settings)]
    shown += [app.bugreport(), app.conf.humanize(with_defaults=True), app.conf.table(with_defaults=True)]
    context = CLIContext(app=app, no_color=True, workdir=None)
    shown += [CliRunner().invoke(kathikon, [name], obj=context).output for name in ("counts", "schema")]
    away = make_url(own).set(port=1).render_as_string(hide_password=False)
    shown.append(repr(Storage(make_url(away).update_query_dict({"password": PASSWORD}).render_as_string(False))))
    gone = apps.create_app("gone", broker_url=f"kathikon+{away}", result_backend=f"kathikon+{away}")
    for call in (lambda: gone.send_task("any"), lambda: gone.AsyncResult("any").state, gone.control.inspect().ping):
        with pytest.raises(Exception, match="is away") as caught:
            call()
        shown += [str(caught.value), repr(caught.value), str(caught.getrepr(style="short"))]
    for each in (app, gone):
        each.close()
    assert worker.stop() == 0
    assert [text for text in map(str, [*shown, worker.log, *capfd.readouterr()]) if PASSWORD in text] == []
