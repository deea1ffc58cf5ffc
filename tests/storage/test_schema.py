"""The schema: made once by whoever comes first, the same by migrations and as SQL, and refused when it is newer."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from threading import Barrier

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from kathikon_celery.job import Cause, Job, State
from kathikon_celery.results.backend import error_of
from kathikon_celery.settings import Settings
from kathikon_celery.storage import SchemaError, Storage, schema
from kathikon_celery.storage.clock import Instant
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.tables import metadata
from tests.storage.actors import Worker, new_job

SETTINGS = Settings()

SET_UP = """
import sys
from contextlib import closing
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from tests.storage.actors import new_job

with closing(Storage(sys.argv[1], Settings())) as storage:
    print("ready", flush=True)
    sys.stdin.read()  # until all are
    storage.setup()
    storage.insert(new_job(sys.argv[2]))
"""


def test_many_processes_set_up_an_empty_database_at_once(database_url: str, tmp_path: Path) -> None:
    count = 8
    command = [sys.executable, "-W", "error", "-c", SET_UP, database_url]
    root = Path(__file__).parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([*command, str(number)], cwd=root, text=True, **pipes)  # type: ignore[call-overload]
        for number in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in processes:
        process.stdin.close()
        process.stdin = None
    outcomes = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
    assert outcomes == [("", 0)] * count
    with closing(Storage(database_url, SETTINGS)) as storage:
        assert {job.id for job in storage.all()} == {str(number) for number in range(count)}


def test_many_threads_set_up_databases_of_their_own_at_once(tmp_path: Path) -> None:
    """What alembic runs on is global. A server's lock may end with an error, so it does not keep threads apart."""
    count = 8
    start = Barrier(count)

    def set_up(number: int) -> list[Job]:
        with closing(Storage(f"sqlite:///{tmp_path}/{number}.db", SETTINGS)) as storage:
            start.wait(60)
            storage.setup()
            return storage.all()

    with ThreadPoolExecutor(count) as threads:
        assert list(threads.map(set_up, range(count))) == [[]] * count


def test_the_migrations_make_what_the_tables_say(database_url: str) -> None:
    with closing(Storage(database_url, SETTINGS)) as storage:
        storage.setup()
        with storage.database.read() as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "version_table": schema.VERSION_TABLE}
            )
            assert compare_metadata(context, metadata) == []
            assert _definitions(connection) == _of_metadata(database_url)


def _of_metadata(url: str) -> dict[str, object]:
    """What ``metadata.create_all`` makes of an empty database of the same kind."""
    if url.startswith("sqlite"):
        engine = sa.create_engine("sqlite://")
        with engine.begin() as connection:
            metadata.create_all(connection)
            return _definitions(connection)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA other"))
        connection.execute(sa.text("SET LOCAL search_path TO other"))
        metadata.create_all(connection)
        found = _definitions(connection, "other")
    engine.dispose()
    return found


def _definitions(connection: sa.Connection, schema: str | None = None) -> dict[str, object]:
    """Columns with types, defaults and nullability, keys, and indexes with their conditions and order."""
    if connection.dialect.name == "sqlite":
        rows = connection.execute(sa.text("SELECT name, sql FROM sqlite_master WHERE name LIKE 'kathikon%'"))
        words = {name: " ".join(re.sub(r"([,)])", r" \1 ", sql or "").split()) for name, sql in rows}
        return {name: sql for name, sql in words.items() if name != "kathikon_version"}
    inspector = sa.inspect(connection)
    found: dict[str, object] = {}
    for table in metadata.sorted_tables:
        columns = inspector.get_columns(table.name, schema)
        found[table.name] = [(column["name"], str(column["type"]), column["nullable"]) for column in columns]
    definitions = sa.text("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = :schema")
    namespace = schema or "public"
    for name, definition in connection.execute(definitions, {"schema": namespace}):
        if name != "kathikon_version_pkc":
            found[name] = definition.replace(f" {namespace}.", " ")
    return found


@pytest.mark.postgresql
def test_postgresql_vacuums_by_the_number_of_dead_rows(postgresql_url: str) -> None:
    with closing(Storage(postgresql_url, SETTINGS)) as storage:
        storage.setup()
        query = "SELECT relname, reloptions FROM pg_class WHERE relname IN ('kathikon_jobs', 'kathikon_messages')"
        with storage.database.read() as connection:
            options = dict(connection.execute(sa.text(query)).all())
    assert {"fillfactor=70", "autovacuum_vacuum_scale_factor=0"} < set(options["kathikon_jobs"])
    assert "autovacuum_vacuum_scale_factor=0" in options["kathikon_messages"]


def test_its_sql_runs_by_itself(database_url: str) -> None:
    script = schema.ddl(database_url)
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(sa.make_url(database_url).database or "")) as connection:
            connection.executescript(script)
    else:
        with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(script.encode())
    with closing(Storage(database_url, SETTINGS)) as storage:
        storage.setup()
        storage.insert(new_job())
        assert storage.claim("default")
        with storage.database.read() as connection:
            assert schema.current(connection) == schema.HEAD
            assert _definitions(connection) == _of_metadata(database_url)


def test_its_sql_from_the_newest_version_does_nothing(database_url: str) -> None:
    script = schema.ddl(database_url, since=schema.HEAD)
    assert "CREATE" not in script


def test_the_head_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(schema._config()).get_heads() == [schema.HEAD]


def test_a_newer_schema_is_refused(database_url: str) -> None:
    with closing(Storage(database_url, SETTINGS)) as storage:
        storage.setup()
        with storage.database.write() as connection:
            connection.execute(sa.text("UPDATE kathikon_version SET version_num = '9999'"))
        with closing(Storage(database_url, SETTINGS)) as old, pytest.raises(SchemaError) as raised:
            old.setup()
        assert "version '9999'" in str(raised.value)
        assert f"up to '{schema.HEAD}'" in str(raised.value)
        with storage.database.read() as connection:
            assert schema.current(connection) == "9999"


def test_a_newer_schema_that_only_adds_is_used(database_url: str) -> None:
    """By old workers that restart while a fleet is upgraded."""
    with closing(Storage(database_url, SETTINGS)) as storage:
        storage.setup()
        with storage.database.write() as connection:
            connection.execute(sa.text("UPDATE kathikon_version SET version_num = '0999'"))
        with closing(Storage(database_url, SETTINGS)) as old:
            old.setup()
            old.insert(Job(id="1", task="any"))
            assert [job.id for job in old.claim("default")] == ["1"]


def with_first_schema(url: str) -> Storage:
    """A database with the tables of version 0001."""
    storage = Storage(url, SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "HEAD", "0001")
        storage.setup()
    storage._is_set_up = False
    return storage


#: What a worker of version 0.1 writes.
OLD_ROW = sa.text(
    "INSERT INTO kathikon_jobs (id, queue, task, state, priority, publication, fence, attempts, crashes, max_attempts,"
    " acked, inserted_at, available_at, ended_at, envelope, body, reason) VALUES (:id, 'default', 'any', :state, 0, 1,"
    " 1, 1, 0, 20, false, :at, :at, :ended_at, '{}', '', :reason)"
).bindparams(sa.bindparam("at", type_=Instant()), sa.bindparam("ended_at", type_=Instant()))
OLD_REASONS = {
    "expired": ("discarded", Cause.EXPIRED),
    "rejected: None": ("discarded", Cause.REJECTED),
    "NotRegistered('any')": ("dead", Cause.UNREGISTERED),
    "the process that ran it was lost, as often as max_attempts allows": ("dead", Cause.LOST),
    "the worker was lost while the task ran, and acks_late=False forbids to run it again": ("dead", Cause.LOST_ONCE),
    "corrupt row: KeyError('id')": ("dead", Cause.UNREADABLE),
    "terminated": ("cancelled", Cause.REVOKED),
    "ValueError('expired')": ("dead", None),
}


def test_what_ended_before_the_upgrade_has_its_cause(database_url: str) -> None:
    at = datetime.now(timezone.utc)
    with closing(with_first_schema(database_url)) as storage:
        with storage.database.write() as connection:
            for reason, (state, _) in OLD_REASONS.items():
                values = {"id": reason, "state": state, "at": at, "ended_at": at, "reason": reason}
                connection.execute(OLD_ROW, values)
        storage.setup()
        assert {job.id: job.cause for job in storage.all()} == {key: cause for key, (_, cause) in OLD_REASONS.items()}


def test_workers_of_the_version_before_go_on_after_the_upgrade(database_url: str) -> None:
    """What they write names no column that is new."""
    at = datetime.now(timezone.utc)
    with closing(with_first_schema(database_url)) as storage:
        storage.setup()
        with storage.database.write() as connection:
            connection.execute(OLD_ROW, {"id": "old", "state": "available", "at": at, "ended_at": None, "reason": None})
        assert [job.id for job in storage.claim("default")] == ["old"]
        with storage.database.write() as connection:
            connection.execute(
                sa.text("UPDATE kathikon_jobs SET state = 'discarded', reason = 'expired' WHERE id = 'old'")
            )
        job = storage.all()[0]
        assert (job.state, job.reason, job.cause) == (State.DISCARDED, "expired", None)
        assert type(error_of(job)).__name__ == "TaskRevokedError"


@pytest.mark.postgresql
def test_an_upgrade_waits_for_a_transaction_that_uses_the_tables_and_holds_up_nobody(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = sa.create_engine(postgresql_url)
    tries = 0

    def pause(seconds: float) -> None:
        nonlocal tries
        tries += 1
        with engine.connect() as other:  # it waits behind no ALTER TABLE
            other.execute(sa.text("SET lock_timeout = '100ms'"))
            assert other.execute(sa.text("SELECT count(*) FROM kathikon_jobs")).scalar() == 0
        long.rollback()

    monkeypatch.setattr(schema, "sleep", pause)
    with closing(with_first_schema(postgresql_url)) as storage, engine.connect() as long:
        long.execute(sa.text("SELECT count(*) FROM kathikon_jobs"))
        storage.setup()
        with storage.database.read() as connection:
            assert schema.current(connection) == schema.HEAD
    assert tries == 1
    assert "another transaction keeps the tables from being upgraded" in caplog.text
    engine.dispose()


def test_no_password_in_its_error(postgresql_url: str) -> None:
    url = sa.make_url(postgresql_url).set(password="s3cret").render_as_string(hide_password=False)
    with closing(Storage(url, SETTINGS)) as storage:
        storage.setup()
        with storage.database.write() as connection:
            connection.execute(sa.text("UPDATE kathikon_version SET version_num = '9999'"))
        with closing(Storage(url, SETTINGS)) as old, pytest.raises(SchemaError) as raised:
            old.setup()
    assert "s3cret" not in str(raised.value)


def test_setup_again_writes_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has tables made for him needs no right to make tables."""
    with closing(Storage(database_url, SETTINGS)) as storage:
        storage.setup()

    def write(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(Database, "write", write)
    monkeypatch.setattr(Database, "once", write)
    with closing(Storage(database_url, SETTINGS)) as storage:
        storage.setup()


def test_a_kind_of_database_has_statements_of_its_own_after_a_migration(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Storage(database_url, SETTINGS)) as storage:
        own = {"0001": ["CREATE INDEX kathikon_own ON kathikon_jobs (task)"]}
        monkeypatch.setattr(type(storage.database.dialect), "after_migrations", own)
        printed = schema.ddl(database_url)
        assert printed.index("CREATE INDEX kathikon_own") < printed.index("ADD COLUMN cause")
        assert "kathikon_own" not in schema.ddl(database_url, since="0001")
        storage.setup()
        with storage.database.read() as connection:
            assert "kathikon_own" in _definitions(connection)


def test_a_failed_migration_leaves_nothing_behind(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        with storage.database.read() as other:
            assert schema.current(other) is None  # others see nothing of it yet
        raise RuntimeError("the power went")

    with closing(Storage(database_url, SETTINGS)) as storage:
        real = schema._alembic

        def half(attributes: dict[str, object], *rest: object) -> None:
            real(attributes)
            fail()

        monkeypatch.setattr(schema, "_alembic", half)
        with pytest.raises(RuntimeError, match="the power went"):
            storage.setup()
        monkeypatch.undo()
        with storage.database.read() as connection:
            assert sa.inspect(connection).get_table_names() == []
        storage.setup()
        assert storage.all() == []


def test_tables_that_are_made_anew_number_no_node_as_before(database_url: str) -> None:
    """Otherwise a worker that did not notice that its tables are new would go on as another one."""
    numbers = []
    for _ in range(3):
        with closing(Storage(database_url, SETTINGS)) as storage:
            storage.setup()
            numbers += [Worker(storage).id, Worker(storage).id]
            with storage.database.write() as connection:
                metadata.drop_all(connection)
                connection.execute(sa.text(f"DROP TABLE {schema.VERSION_TABLE}"))
    assert len(set(numbers)) == len(numbers)
    assert all(0 < number < 2**31 for number in numbers)
