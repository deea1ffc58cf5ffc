"""Jobs in the caller's transaction, and tasks that complete in one."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import copy_context
from datetime import datetime, timedelta, timezone
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.exceptions import TimeLimitExceeded
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from kathikon_celery import bulk, current_session, enqueue_in
from kathikon_celery.job import State
from kathikon_celery.publish.destination import publish
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import TransactionRefused, Unavailable
from kathikon_celery.storage.scan_start import ScanStart
from kathikon_celery.transport import channel
from tests.support import apps
from tests.support.waiting import wait_until
from tests.support.workers import ROOT, WorkerProcess


@pytest.fixture
def storage(client: Celery) -> Storage:
    apps.add.delay(0, 0)  # tables and queue are there
    storage = Storage.for_app(client)
    storage.clear_jobs()
    return storage


@pytest.fixture
def engine(storage: Storage, database_url: str) -> Iterator[Any]:
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


def number(storage: Storage) -> int:
    return sum(storage.counts().values())


def send_all() -> int:
    """Send tasks in each way; return their number, without the body of the chord."""
    apps.add.delay(1, 1)
    apps.add.apply_async((1, 1), countdown=100)
    chain(apps.add.s(1, 1), apps.add.s(1)).delay()
    chord([apps.add.s(1, 1), apps.add.s(2, 2)])(apps.total.s())
    with bulk():
        for n in range(3):
            apps.add.delay(n, n)
    return 8


@contextmanager
def session_of(engine: Any) -> Iterator[Any]:
    with Session(engine) as session:
        yield session


@contextmanager
def scoped(engine: Any) -> Iterator[Any]:
    registry = scoped_session(sessionmaker(engine))
    yield registry
    registry.remove()


@contextmanager
def connection_of(engine: Any) -> Iterator[Any]:
    with engine.connect() as connection:
        yield connection


@contextmanager
def driver_of(engine: Any) -> Iterator[Any]:
    if engine.dialect.name == "sqlite":
        with closing(sqlite3.connect(engine.url.database)) as connection:
            yield connection
    else:
        import psycopg

        with closing(psycopg.connect(_libpq(engine.url))) as connection:
            yield connection


def _libpq(url: Any) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [session_of, scoped, connection_of, driver_of])
def test_what_is_sent_is_there_exactly_if_the_transaction_is_committed(
    storage: Storage, engine: Any, kind: Callable[[Any], Any]
) -> None:
    with kind(engine) as transaction:
        with enqueue_in(transaction):
            expected = send_all()
        transaction.rollback()
        assert number(storage) == 0
        with enqueue_in(transaction):
            send_all()
        transaction.commit()
        assert number(storage) == expected
        apps.add.apply_async((1, 1), transaction=transaction)
        transaction.rollback()
    with storage.database.read() as connection:
        chords = connection.execute(text("SELECT count(*) FROM kathikon_chords")).scalar_one()
    assert (number(storage), chords) == (expected, 1)


def test_of_asyncio(storage: Storage, engine: Any) -> None:
    url = engine.url if engine.dialect.name == "postgresql" else engine.url.set(drivername="sqlite+aiosqlite")

    async def send() -> None:
        asynchronous = create_async_engine(url)
        async with AsyncSession(asynchronous) as session:
            async with enqueue_in(session):
                send_all()
            await session.rollback()
            assert number(storage) == 0
            with suppress(ZeroDivisionError):
                async with enqueue_in(session):
                    apps.add.delay(1, 1)
                    apps.add.delay(1 // 0, 1)
            async with enqueue_in(session):
                result = apps.add.delay(1, 1)
            await session.commit()
            assert storage.fetch(result.id) is not None
            with pytest.raises(TypeError, match="async with"), enqueue_in(session):
                pass
        async with asynchronous.begin() as connection, enqueue_in(connection):
            apps.add.delay(2, 2)
        await asynchronous.dispose()

    asyncio.run(send())
    assert number(storage) == 2


@pytest.mark.parametrize("database_url", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
def test_of_psycopg_and_asyncio(storage: Storage, engine: Any) -> None:
    import psycopg

    async def send() -> None:
        connection = await psycopg.AsyncConnection.connect(_libpq(engine.url))
        async with enqueue_in(connection):
            send_all()
        await connection.rollback()
        assert number(storage) == 0
        async with enqueue_in(connection):
            apps.add.delay(1, 1)
        await connection.commit()
        await connection.close()

    asyncio.run(send())
    assert number(storage) == 1


def test_what_goes_on_after_its_block_is_sent_at_once(storage: Storage, engine: Any) -> None:
    """A task of asyncio that begins in the block has a copy of the block's context."""
    with Session(engine) as session:
        with enqueue_in(session):
            context = copy_context()
        session.rollback()
    context.run(apps.add.delay, 1, 1)
    assert number(storage) == 1


def test_a_publication_that_is_repeated_keeps_its_transaction(
    storage: Storage, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails_once(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise Unavailable("the first time")
        return publish(*args, **options)

    monkeypatch.setattr(channel, "publish", fails_once)
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        apps.add.apply_async((1, 1), transaction=session, retry_policy={"interval_start": 0, "max_retries": 3})
        session.rollback()
    assert len(calls) == 2
    assert number(storage) == 0


def test_savepoints(storage: Storage, engine: Any) -> None:
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        with enqueue_in(session):
            kept = apps.add.delay(1, 1)
            savepoint = session.begin_nested()
            lost = apps.add.delay(2, 2)
            with bulk():
                lost_too = apps.add.delay(3, 3)
            savepoint.rollback()
        session.commit()
    assert storage.fetch(kept.id) is not None
    assert (storage.fetch(lost.id), storage.fetch(lost_too.id)) == (None, None)


def test_another_database_is_sent_to_after_the_commit(storage: Storage, tmp_path: Path) -> None:
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    with Session(other) as session:
        with enqueue_in(session):
            sent = apps.add.delay(1, 1)
        assert number(storage) == 0
        session.commit()
        assert storage.fetch(sent.id) is not None
        with enqueue_in(session):
            apps.add.delay(2, 2)
        session.rollback()
        assert number(storage) == 1
    with other.connect() as connection, pytest.raises(TransactionRefused, match="after the commit"):
        apps.add.apply_async((1, 1), transaction=connection)
    other.dispose()


def test_who_waits_for_the_end_of_a_chain_of_the_open_transaction_is_told(storage: Storage, engine: Any) -> None:
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        with enqueue_in(session):
            last = chain(apps.add.s(1, 1), apps.add.s(1)).delay()
            body = chord([apps.add.s(1, 1)] * 2)(apps.total.s())
        for result in (last, body):
            with pytest.raises(TransactionRefused, match="commit first"):
                result.get(timeout=60)


def test_what_cannot_be_sent_is_an_error(storage: Storage, engine: Any) -> None:
    with pytest.raises(TypeError, match="42 is no transaction; allowed are"):
        enqueue_in(42)
    autocommit = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with closing(autocommit), pytest.raises(TransactionRefused, match="begin a transaction"):
        apps.add.apply_async((1, 1), transaction=autocommit)
    with driver_of(engine) as connection:
        with pytest.raises(TypeError, match="is no transaction; allowed are"):
            enqueue_in(connection.cursor())
        connection.close()
        with pytest.raises(TransactionRefused, match="closed"):
            apps.add.apply_async((1, 1), transaction=connection)
    if engine.dialect.name == "postgresql":
        replica = create_engine(engine.url, connect_args={"options": "-c default_transaction_read_only=on"})
        with replica.connect() as connection, pytest.raises(TransactionRefused, match="read-only"):
            apps.add.apply_async((1, 1), transaction=connection)
        replica.dispose()
        with engine.connect() as connection:
            with pytest.raises(Exception, match="division"):
                connection.execute(text("SELECT 1/0"))
            with pytest.raises(TransactionRefused, match=r"aborted.*savepoint"):
                apps.add.apply_async((1, 1), transaction=connection)
    assert number(storage) == 0


@pytest.mark.postgresql
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_search_path_of_the_caller_may_lead_elsewhere(postgresql_url: str, driver: str) -> None:
    """Such as to the schema of a tenant, which has tables of the same names."""
    app = apps.create_app("schema", kathikon_database_url=postgresql_url, kathikon_schema="jobs")
    app.tasks[apps.add.name].delay(0, 0)
    storage = Storage.for_app(app)
    engine = create_engine(make_url(postgresql_url).set(drivername=f"postgresql+{driver}"))
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
        connection.execute(text("CREATE TABLE tenant.kathikon_jobs (id TEXT)"))
    add, total = app.tasks[apps.add.name], app.tasks[apps.total.name]
    for raw in (False, True):
        with engine.connect() as connection:
            connection.execute(text("SET LOCAL search_path = tenant"))
            transaction = connection.connection.driver_connection if raw else connection
            with enqueue_in(transaction):
                sent = add.delay(1, 1)
                chord([add.s(1, 1), add.s(2, 2)], app=app)(total.s())
            assert storage.fetch(sent.id) is None
            assert connection.execute(text("SELECT count(*) FROM kathikon_jobs")).scalar_one() == 0
            transaction.rollback()
            assert (number(storage), raw) == (1 + 3 * raw, raw)
            connection.execute(text("SET LOCAL search_path = tenant"))
            with enqueue_in(transaction):
                sent = add.delay(1, 1)
                chord([add.s(1, 1), add.s(2, 2)], app=app)(total.s())
            transaction.commit()
            assert storage.fetch(sent.id) is not None
    assert number(storage) == 7
    engine.dispose()
    app.close()


def test_who_waits_for_a_job_of_the_open_transaction_is_told(storage: Storage, engine: Any) -> None:
    with Session(engine) as session:
        with enqueue_in(session):
            result = apps.add.delay(1, 1)
        with pytest.raises(TransactionRefused, match="commit first"):
            result.get()
        session.commit()
    with pytest.raises(Exception, match="timed out"):
        result.get(timeout=0.01)


def test_a_job_of_a_long_transaction_is_not_overlooked() -> None:
    start, now = ScanStart(), datetime.now(timezone.utc)
    start.looked([(0, now)], everywhere=True, took=10.0)
    start.look_back_to(now - timedelta(seconds=60))
    assert start.marks()[0][1] < now - timedelta(seconds=60)


def test_a_worker_runs_what_is_committed(
    storage: Storage, engine: Any, start_worker: Callable[..., WorkerProcess]
) -> None:
    start_worker()
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        with enqueue_in(session):
            results = [apps.add.delay(n, n) for n in range(5)]
            body = chord([apps.add.s(1, 1), apps.add.s(2, 2)])(apps.total.s())
        session.commit()
    assert [result.get(timeout=60) for result in results] == [0, 2, 4, 6, 8]
    assert body.get(timeout=60) == 6


DJANGO = """
    import sys
    import django
    from django.conf import settings

    url, engine, name, user, host, port = sys.argv[1:]
    settings.configure(
        SECRET_KEY="x", USE_TZ=True, INSTALLED_APPS=[], CELERY_KATHIKON_DATABASE_URL=url,
        DATABASES={
            "default": {"ENGINE": engine, "NAME": name, "USER": user, "HOST": host, "PORT": port},
            "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": "other.db"},
        },
    )
    import os
    os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
    django.setup()
    from celery import Celery, chord
    from django.db import transaction
    from kathikon_celery import bulk
    from kathikon_celery.storage import Storage
    from kathikon_celery import config

    app = Celery("shop")
    app.config_from_object("kathikon_celery.config")
    app.conf.kathikon_database_url = url

    @app.task
    def add(x, y=0):
        return x + y

    storage = Storage.for_app(app)

    def number():
        return sum(storage.counts().values())

    class Undone(Exception):
        pass

    def undo(call, **options):
        try:
            with transaction.atomic(**options):
                call()
                raise Undone
        except Undone:
            pass

    undo(lambda: (add.delay(1), chord([add.s(1), add.s(2)])(add.s())))
    assert number() == 0, number()
    with transaction.atomic():
        add.delay(1)
        undo(lambda: add.delay(2))
        with bulk():
            add.delay(3)
            undo(lambda: add.delay(4))
    assert number() == 2, number()
    undo(lambda: add.delay(5), using="other")
    assert number() == 2, number()
    with transaction.atomic(using="other"):
        add.delay(6)
        assert number() == 2, number()
    assert number() == 3, number()
    with transaction.atomic(using="other"), transaction.atomic():
        add.delay(7)
    assert number() == 4, number()
    add.delay(8)
    assert number() == 5, number()
    # The app commits by itself.
    transaction.set_autocommit(False)
    add.delay(9)
    transaction.rollback()
    add.delay(10)
    transaction.commit()
    transaction.set_autocommit(True)
    assert number() == 6, number()
    # Beside the open transaction, where the database allows it.
    def beside():
        add.apply_async((11,), transaction=False)
    try:
        undo(beside)
    except Exception as error:
        assert "has a transaction open there" in str(error) and "sqlite" in url, error
        assert number() == 6, number()
    else:
        assert "postgresql" in url and number() == 7, number()
    for transaction_, said in (("default", "begin a transaction"), ("nowhere", "'nowhere' is no alias")) * 2:
        try:
            add.apply_async((1,), transaction=transaction_)
        except Exception as error:
            assert said in str(error), error
        else:
            raise AssertionError(transaction_)
    print("all is well")
"""


def test_of_django(database_url: str, tmp_path: Path) -> None:
    url = make_url(database_url)
    engine = f"django.db.backends.{url.get_backend_name().replace('sqlite', 'sqlite3')}"
    place = (
        engine,
        url.database or "",
        url.username or "",
        str(url.query.get("host", url.host or "")),
        str(url.port or ""),
    )
    command = [sys.executable, "-c", dedent(DJANGO), database_url, *place]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert "all is well" in ran.stdout, ran.stderr


class TestCompletion:
    @pytest.fixture(autouse=True)
    def effects(self, database_url: str) -> Iterator[Callable[[], list[str]]]:
        engine = create_engine(database_url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE effects (what TEXT)"))

        def read() -> list[str]:
            with engine.connect() as connection:
                return list(connection.execute(text("SELECT what FROM effects ORDER BY what")).scalars())

        yield read
        engine.dispose()

    @staticmethod
    def task(client: Celery, name: str, *args: Any) -> Any:
        return client.signature(f"tests.support.shop.{name}", args=args)

    @pytest.mark.parametrize("pool", ["prefork", "threads"])
    def test_how_a_body_ends_decides(
        self, client: Celery, start_worker: Callable[..., WorkerProcess], effects: Callable[[], list[str]], pool: str
    ) -> None:
        start_worker(app="tests.support.shop", pool=pool)
        ends = {
            "done": State.COMPLETED, "silent": State.COMPLETED, "fails": State.DEAD, "retries": State.COMPLETED,
            "ignores": State.COMPLETED, "rejects": State.DISCARDED, "replaces": State.COMPLETED, "commits": State.DEAD,
        }  # fmt: skip
        sent = {name: self.task(client, name, name).delay() for name in ends}
        storage = Storage.for_app(client)

        def states() -> dict[str, State | None]:
            return {name: (job := storage.fetch(one.id)) and job.state for name, one in sent.items()}

        wait_until(lambda: states() == ends, what="the ends")
        assert (sent["done"].get(timeout=60), sent["replaces"].get(timeout=60)) == ("done", [1, 2])
        header = [self.task(client, "done", one) for one in ("a", "b")]
        assert chord(header)(self.task(client, "same")).get(timeout=60) == ["a", "b"]
        assert effects() == ["a", "b", "commits", "done", "ignores", "replaces", "retries 2", "silent"]
        assert storage.fetch("sent by done") is not None
        assert storage.fetch("sent by fails") is None

    def test_a_process_that_is_killed_leaves_nothing(
        self, client: Celery, start_worker: Callable[..., WorkerProcess], effects: Callable[[], list[str]]
    ) -> None:
        start_worker(app="tests.support.shop")
        assert self.task(client, "dies_once", "x").delay().get(timeout=60) == "x"
        assert effects() == ["x True"]

    def test_a_hard_time_limit_ends_a_body_that_has_written(
        self, client: Celery, start_worker: Callable[..., WorkerProcess], effects: Callable[[], list[str]]
    ) -> None:
        """On SQLite its transaction keeps out all other writers, also the worker."""
        start_worker(app="tests.support.shop")
        with pytest.raises(TimeLimitExceeded):
            self.task(client, "hangs", "too long").delay().get(timeout=60)
        assert self.task(client, "done", "next").delay().get(timeout=60) == "next"
        assert effects() == ["next"]

    def test_a_run_that_has_lost_its_claim_commits_nothing(
        self, client: Celery, start_worker: Callable[..., WorkerProcess], effects: Callable[[], list[str]]
    ) -> None:
        start_worker(app="tests.support.shop", pool="solo")
        self.task(client, "loses_claim", "lost").delay()
        assert self.task(client, "done", "last").delay().get(timeout=60) == "last"  # the worker has one slot
        assert effects() == ["last"]


def test_there_is_no_session_outside_of_such_a_task() -> None:
    with pytest.raises(RuntimeError, match="open your own"):
        current_session()
