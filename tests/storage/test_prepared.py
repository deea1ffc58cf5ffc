"""Statements that the driver itself runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

import pytest
from sqlalchemy import Connection, bindparam, column, event, func, insert, literal, select, table, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from kathikon_celery.storage import Storage, claim
from kathikon_celery.storage.clock import Instant, now
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.tables import groups, jobs
from tests.storage.actors import Worker, new_job
from tests.support.statements import heard

PLANS = ("custom_plans", "generic_plans")

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)

_ADD = insert(groups).values(
    id=bindparam("new_id"), result=bindparam("new_result"), inserted_at=bindparam("at", type_=Instant())
)
_ALL = select(groups.c.id, groups.c.result, groups.c.inserted_at).order_by(groups.c.id)
_CHANGE = update(groups).where(groups.c.id == bindparam("of_id")).values(result="changed")
_CHANGED = _CHANGE.returning(groups.c.inserted_at)


@pytest.fixture
def connection(storage: Storage) -> Iterator[Connection]:
    with storage.database.once() as connection:
        prepared.many(connection, _ADD, [{"new_id": f"{n}", "new_result": "%(x)s ?", "at": NOON} for n in range(3)])
        yield connection


def test_values_and_rows_have_the_types_of_their_columns(connection: Connection) -> None:
    assert [tuple(row) for row in prepared.rows(connection, _ALL, {})] == [(f"{n}", "%(x)s ?", NOON) for n in range(3)]
    assert [tuple(row) for row in prepared.rows(connection, _CHANGED, {"of_id": "1"})] == [(NOON,)]


def test_a_constant_looks_like_a_parameter(connection: Connection) -> None:
    of_constant = select(groups.c.id).where(groups.c.result == literal("%(x)s ?"), groups.c.id == bindparam("of_id"))
    assert [row[0] for row in prepared.rows(connection, of_constant, {"of_id": "1"})] == ["1"]


@pytest.mark.postgresql
def test_what_postgresql_does_not_keep_is_refused_and_not_cut_off(postgresql_storage: Storage) -> None:
    with postgresql_storage.database.once() as connection:
        with pytest.raises(DBAPIError, match="NUL"):
            prepared.count(connection, _ADD, {"new_id": "a\0b", "new_result": "", "at": NOON})
        assert not connection.invalidated
        assert prepared.rows(connection, _ALL, {}) == []


def test_the_number_of_rows_that_change(connection: Connection) -> None:
    assert prepared.count(connection, _CHANGE, {"of_id": "1"}) == 1
    assert prepared.count(connection, _CHANGE, {"of_id": "none"}) == 0


def test_a_value_that_is_missing_is_an_error(connection: Connection) -> None:
    with pytest.raises(KeyError, match="of_id"):
        prepared.count(connection, _CHANGE, {})


def test_what_depends_on_its_values_cannot_be_prepared(connection: Connection) -> None:
    statement = select(groups.c.id).where(groups.c.id.in_(bindparam("some", expanding=True)))
    with pytest.raises(TypeError, match="depends on its parameters"):
        prepared.rows(connection, statement, {"some": ["1"]})


def test_errors_are_those_of_sqlalchemy_without_the_values(connection: Connection) -> None:
    with pytest.raises(IntegrityError) as raised:
        prepared.count(connection, _ADD, {"new_id": "1", "new_result": "s3cret", "at": NOON})
    assert "s3cret" not in str(raised.value).replace(str(raised.value.orig), "")
    assert not raised.value.connection_invalidated
    assert len(prepared.rows(connection, _ALL, {})) == 3


def test_who_listens_to_sqlalchemy_hears_them_as_well(storage: Storage, connection: Connection) -> None:
    heard: list[str] = []

    def listener(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        heard.append(statement)

    event.listen(storage.database._relaxed, "before_cursor_execute", listener)
    try:
        with storage.database.write() as other:
            prepared.rows(other, _ALL, {})
            prepared.count(other, _CHANGE, {"of_id": "1"})
            prepared.many(other, _ADD, [{"new_id": "new", "new_result": "", "at": NOON}])
    finally:
        event.remove(storage.database._relaxed, "before_cursor_execute", listener)
    assert [words.split()[0] for words in heard] == ["BEGIN", "SELECT", "UPDATE", "INSERT", "COMMIT"]


def test_what_interrupts_a_statement_ends_its_connection(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with storage.database.once() as connection:
        with pytest.raises(KeyboardInterrupt), prepared._errors(connection, "SELECT 1"):
            raise KeyboardInterrupt
        assert connection.invalidated


def plans(connection: Connection, words: str) -> tuple[int, int]:
    """How often PostgreSQL has planned what begins with *words* for its values, and how often it had a plan for all."""
    prepared_statements = table("pg_prepared_statements", column("statement"), *map(column, PLANS))
    begins = prepared_statements.c.statement.startswith(words)
    sums = (func.coalesce(func.sum(prepared_statements.c[name]), 0) for name in PLANS)
    custom, generic = connection.execute(select(*sums).where(begins)).one()
    return int(custom), int(generic)


@pytest.mark.postgresql
def test_no_publication_is_planned_for_its_values(postgresql_storage: Storage) -> None:
    postgresql_storage.close()
    for _ in range(2):
        postgresql_storage.insert(new_job())
    with postgresql_storage.database.once(durable=True) as connection:
        assert plans(connection, "WITH inserted AS") == (0, 2)


@pytest.mark.postgresql
def test_what_a_worker_prepares_while_it_is_idle_is_not_planned_by_its_first_jobs(postgresql_storage: Storage) -> None:
    worker = Worker(postgresql_storage)
    database = postgresql_storage.database
    database.close()
    with database.read() as connection:
        for prepare in claim.preparations(database):
            prepare(connection)
    postgresql_storage.insert(new_job())
    with database.once() as connection:
        custom, generic = plans(connection, "WITH claimed AS")
        (seq,) = connection.execute(select(jobs.c.seq)).one()
        (job,) = claim.claim_told(database, connection, "default", seq, worker.id, claim.Waiting(["default"], 1))
        assert job.node_id == worker.id
        assert plans(connection, "WITH claimed AS") == (custom, generic + 1)


class TimeLimit(Exception):
    """What a signal raises, wherever the program is."""


@pytest.fixture
def time_limit() -> Iterator[Callable[[], object]]:
    """In a moment after its call there is one: what comes before the test must not meet it."""

    def exceeded(*_: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, exceeded)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.postgresql
@pytest.mark.parametrize("run", [prepared.rows, Connection.execute], ids=["prepared", "SQLAlchemy"])
def test_a_time_limit_in_the_middle_of_a_statement(
    postgresql_storage: Storage, time_limit: Callable[[], object], run: Callable[..., object]
) -> None:
    def sleep_until_it_is_enough() -> None:
        with postgresql_storage.database.once() as connection:
            time_limit()
            run(connection, select(func.pg_sleep(20)), {})

    with pytest.raises(TimeLimit):
        sleep_until_it_is_enough()
    for _ in range(3):
        postgresql_storage.insert(new_job())


def change_until_it_is_enough(storage: Storage, time_limit: Callable[[], object]) -> None:
    numbers = select(literal(1).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(select(numbers.c.n + 1).where(numbers.c.n < 1_000_000))
    long = select(func.count()).select_from(numbers).union_all(select(literal(1)))
    with storage.database.write() as connection:
        prepared.count(connection, _CHANGE, {"of_id": "1"})
        time_limit()
        while True:
            prepared.rows(connection, long, {})


def test_a_time_limit_in_the_middle_of_a_transaction(storage: Storage, time_limit: Callable[[], object]) -> None:
    """Others may write at once, though the statement was not over and its error is still being looked at."""
    with pytest.raises(TimeLimit) as raised:
        change_until_it_is_enough(storage, time_limit)
    storage.insert(new_job())
    with closing(Storage(storage.database.url.render_as_string(hide_password=False))) as others:
        others.insert(new_job("another"))
    assert raised.value.__traceback__ is not None


@pytest.mark.parametrize("words", ["BEGIN", "ROLLBACK"])
def test_a_time_limit_around_a_transaction(storage: Storage, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    real = prepared.plain

    def limited(connection: Connection, text: str) -> None:
        if text.startswith(words) and words == "ROLLBACK":
            raise TimeLimit
        real(connection, text)
        if text.startswith(words):
            raise TimeLimit

    with monkeypatch.context() as patched:
        patched.setattr(prepared, "plain", limited)
        with pytest.raises(TimeLimit), storage.database.write():
            raise TimeLimit
    storage.insert(new_job())
    others = Storage(storage.database.url.render_as_string(hide_password=False))
    assert others.fetch("job") is not None  # it is committed, and nobody holds a lock
    others.insert(new_job("another"))
    others.close()


@pytest.mark.postgresql
def test_a_lost_connection_is_said_to_be_lost(postgresql_storage: Storage) -> None:
    storage = postgresql_storage
    with storage.database.once() as connection, storage.database.read() as idle:
        (own,) = prepared.rows(connection, select(text("pg_backend_pid()")), {})[0]
        idle.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": own})
        with pytest.raises(DBAPIError) as raised:
            prepared.rows(connection, _ALL, {})
        assert raised.value.connection_invalidated
        assert connection.invalidated
    storage.insert(new_job())


@pytest.mark.postgresql
def test_so_is_one_that_the_driver_knows_to_be_closed(postgresql_storage: Storage) -> None:
    with postgresql_storage.database.once() as connection:
        driver_connection = connection.connection.driver_connection
        assert driver_connection is not None
        driver_connection.close()
        with pytest.raises(DBAPIError) as raised:
            prepared.rows(connection, _ALL, {})
        assert raised.value.connection_invalidated
    postgresql_storage.insert(new_job())


def test_an_insert_is_counted_where_sqlalchemy_runs_it(storage: Storage) -> None:
    """It is one whose key SQLAlchemy asks for; so it is with listeners of its events, and without our statements."""
    statement = insert(groups).values(id=bindparam("group"), result="[]", inserted_at=now())
    with heard(lambda *_: None), storage.database.write() as connection:
        assert prepared.count(connection, statement, {"group": "1"}) == 1
