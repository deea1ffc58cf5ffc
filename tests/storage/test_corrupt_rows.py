"""Rows that somebody has written past all rules: each spoils itself and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from itertools import product
from types import SimpleNamespace

import pytest
from sqlalchemy import column as sa_column
from sqlalchemy import insert, literal_column, select, table, update

from kathikon_celery.job import State
from kathikon_celery.nodes.machine import machine
from kathikon_celery.nodes.others import Watch
from kathikon_celery.storage import Storage, promote
from kathikon_celery.storage.scan_start import ScanStart
from kathikon_celery.storage.tables import HIGHEST, nodes
from tests.storage.actors import Worker, new_job, the_job

SQLITE = pytest.mark.parametrize("storage", ["sqlite"], indirect=True)  # the other one has types of its own


#: The columns of a node's row that a copy of the row shares.
COPIED = ("name", "machine", "pid", "pid_started", "started_at", "lease_until")


def set_raw(storage: Storage, job_id: str, column: str, value: object) -> None:
    untyped = table("kathikon_jobs", sa_column("id"), sa_column(column))
    statement = update(untyped).where(untyped.c.id == job_id).values({column: value})
    with storage.database.write() as connection:
        connection.execute(statement)


@pytest.fixture
def three(storage: Storage) -> Storage:
    """Storage with three jobs, of which the second is going to be corrupt."""
    for name in ("first", "second", "third"):
        storage.insert(new_job(name, body="[]", task="proj.add"))
    return storage


def is_listed(storage: Storage, what: str) -> None:
    first, second, third = storage.all()
    assert (first.id, second.id, third.id) == ("first", "second", "third")
    assert [first.state, third.state] == [State.AVAILABLE] * 2
    assert second.reason.startswith("corrupt row: ")
    assert what in second.reason
    assert (second.state, second.task, second.body) == (State.DEAD, "proj.add", "[]")
    fetched = the_job(storage, "second")
    assert (fetched.state, fetched.reason) == (second.state, second.reason)


@pytest.mark.parametrize(
    ("column", "value"),
    [("state", "asleep"), ("errors", "no JSON"), ("errors", "5"), ("errors", '[{"reason": "no attempt"}]')],
)
def test_a_word_that_is_none(three: Storage, column: str, value: str) -> None:
    set_raw(three, "second", column, value)
    is_listed(three, f"{column} is {value!r}")


@SQLITE
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("inserted_at", "yesterday"), ("inserted_at", 5), ("scheduled_at", b"\xff"), ("expires_at", ""),
        ("state", b"available"), ("priority", "high"), ("queue", b"default"), ("errors", b"\xff"),
    ],
)  # fmt: skip
def test_a_value_of_another_type(three: Storage, column: str, value: object) -> None:
    set_raw(three, "second", column, value)
    if column == "priority":  # legible nevertheless
        assert the_job(three, "second").priority == value
        assert len(three.all()) == 3
    else:
        is_listed(three, f"{column} is {value!r}")


@SQLITE
def test_text_that_is_no_utf_8_is_listed(three: Storage) -> None:
    with three.database.write() as connection:
        connection.exec_driver_sql("UPDATE kathikon_jobs SET body = CAST(x'ff' AS TEXT) WHERE id = 'second'")
    assert [job.body for job in three.all()] == ["[]", "\udcff", "[]"]


@SQLITE
@pytest.mark.parametrize(("column", "value"), [("available_at", 5), ("available_at", b"x"), ("priority", "high")])
def test_what_cannot_be_compared_is_claimed_with_the_others(three: Storage, column: str, value: object) -> None:
    set_raw(three, "second", column, value)
    assert {job.id for job in Worker(three).claim(10)} == {"first", "second", "third"}


@SQLITE
@pytest.mark.parametrize("moment", ["", "0000", 5, "soon", b"\xff"])
def test_a_due_time_that_is_none_keeps_no_other_from_its_own(storage: Storage, moment: object) -> None:
    due = datetime.now(timezone.utc) + timedelta(hours=1)
    for name in ("sound", "corrupt"):
        storage.insert(new_job(name, scheduled_at=due))
    set_raw(storage, "corrupt", "available_at", moment)
    overdue = storage.next_due()
    while overdue is not None and overdue <= 0:
        assert storage.promote_scheduled() == 1
        overdue = storage.next_due()
    assert overdue == pytest.approx(3600, abs=60)
    assert the_job(storage, "sound").state is State.SCHEDULED


#: Values at the ends of a column, and beyond what Python has: (kind of database, column, value).
EXTREMES = [
    *product(["sqlite", "postgresql"], ["fence", "attempts", "crashes", "max_attempts"], [-(2**31), HIGHEST]),
    *product(["sqlite"], ["fence", "attempts", "crashes", "priority", "node_id"], [2**63 - 1, "many"]),
    *product(["postgresql"], ["priority", "node_id"], [-1, -(2**63), 2**63 - 1]),
    *product(["postgresql"], ["available_at", "inserted_at", "expires_at"], ["infinity", "-infinity", "0044-03-15 BC"]),
]


@pytest.mark.parametrize("when", ["it waits", "it is held"])
@pytest.mark.parametrize(
    ("storage", "column", "value"),
    [pytest.param(*one, marks=[pytest.mark.postgresql] * (one[0] == "postgresql")) for one in EXTREMES],
    indirect=["storage"],
)
def test_an_extreme_value_keeps_no_other_job_from_its_way(
    three: Storage, worker: Worker, other: Worker, column: str, value: object, when: str
) -> None:
    def spoil() -> None:
        set_raw(three, "second", column, value if isinstance(value, int) else literal_column(f"'{value}'"))

    front = ScanStart()
    if when == "it waits":
        spoil()
    claimed = {job.id: job for job in worker.claim(10, front=front)}
    assert {"first", "third"} <= claimed.keys()
    if when == "it is held":
        spoil()
    worker.start(*claimed.values())
    assert worker.complete(claimed["first"]) == 1
    assert worker.die() is not None
    front.forget()
    assert "third" in {job.id for job in other.claim(10, front=front)}
    assert {job.id for job in three.all()} == {"first", "second", "third"}
    assert (three.promote_scheduled(), promote.expire(three.database)) in [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("pid", -1),
        ("pid", 0),
        ("pid", HIGHEST),
        ("pid_started", -1e300),
        ("pid_started", "NaN"),
        ("lease_until", "infinity"),
    ],
)
def test_a_node_that_is_no_process_stops_no_rescue(
    three: Storage, worker: Worker, column: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    spoilt = literal_column(f"'{value}'") if isinstance(value, str) else value
    worker.claim(10)
    with three.database.write() as connection:
        connection.execute(insert(nodes).from_select(COPIED, select(*(nodes.c[name] for name in COPIED))))
        connection.execute(update(nodes).values(machine=machine(), pid_started=-1e6))  # of a process that has ended
        nonsense = table("kathikon_nodes", sa_column("id"), sa_column(column))
        connection.execute(update(nonsense).where(nonsense.c.id != worker.id).values({column: spoilt}))
    watch = Watch(three, SimpleNamespace(id=-1, lease=60.0))
    watch.look()
    assert watch.is_calm(False, None) is False
    with three.database.read() as connection:
        assert connection.execute(select(nodes.c.id)).all() == []
    assert {job.state for job in three.all()} == {State.AVAILABLE}
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_errors_that_are_none_do_not_keep_a_job_from_its_end(
    storage: Storage, worker: Worker, set_row: Callable[..., None]
) -> None:
    storage.insert(new_job())
    set_row(errors="{no JSON")
    job = worker.claim_one()
    assert worker.end(job, State.DEAD, "broken") == 1
    ended = the_job(storage)
    assert (ended.state, ended.reason, ended.last_error) == (State.DEAD, "broken", "broken")
    assert "{no JSON" in ended.errors[0]["reason"]


def test_a_row_that_nobody_can_read_may_be_deleted(three: Storage) -> None:
    set_raw(three, "second", "state", "asleep")
    assert three.delete("second") == 1
    assert len(three.all()) == 2
