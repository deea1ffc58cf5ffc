"""What each verb of a dialect promises, whatever the database."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Connection, Integer, Text, bindparam, desc, select

from kathikon_celery.job import Hold, Job, State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage, finish, messages, result_listeners, transitions
from kathikon_celery.storage.clock import now
from kathikon_celery.storage.dialects import Dialect, dialect_of
from kathikon_celery.storage.dialects.parameters import Change, Changed, Claim, Pick, Upsert
from kathikon_celery.storage.dialects.sqlite import SQLite
from kathikon_celery.storage.engine.wakeup import Wakeup
from kathikon_celery.storage.insert import _published, _values
from kathikon_celery.storage.tables import DUE, ENDED, chords, due_at, groups, jobs, metadata, ready_in
from kathikon_celery.storage.tables import messages as message_table
from kathikon_celery.storage.transitions import WRITTEN
from tests.storage.actors import Worker, new_job, the_job
from tests.support.plain_dialect import PlainDialect
from tests.support.statements import counted

LISTENER = 4711
LIMIT = bindparam("at_most", type_=Integer())
AGO = datetime.now(timezone.utc) - timedelta(minutes=1)


def _ready(*conditions: Any) -> Any:
    found = select(jobs.c.seq).where(ready_in(bindparam("from_queue")), *conditions)
    return found.order_by(desc(jobs.c.priority), jobs.c.available_at, jobs.c.seq).limit(LIMIT)


CLAIMED = (jobs.c.seq, jobs.c.id, jobs.c.state, jobs.c.fence, jobs.c.node_id)
CLAIM = Claim(transitions.claimed(), CLAIMED, Pick(jobs, (_ready(),), "kathikon_jobs_ready"))
IN_TURN = Claim(
    transitions.claimed(),
    CLAIMED,
    Pick(jobs, (_ready(jobs.c.priority > 1), _ready(jobs.c.priority == 1)), "kathikon_jobs_ready"),
)
CLAIM_ONE = Claim(transitions.claimed(jobs.c.id == bindparam("of_id"), ready_in(bindparam("from_queue"))), CLAIMED)
DUE_ONES = Pick(
    jobs,
    (select(jobs.c.seq).where(DUE, due_at() <= now()).order_by(due_at()).limit(LIMIT),),
    "kathikon_jobs_due",
)
ENDED_ONES = Pick(
    jobs,
    (select(jobs.c.seq).where(ENDED, jobs.c.state == "completed").order_by(jobs.c.ended_at).limit(LIMIT),),
    "kathikon_jobs_ended",
)
PROMOTED = transitions.promoted()
STARTED = transitions.started(acked=True)
COMPLETED = transitions.ended(State.COMPLETED)
CANCELLED_BY_ID = transitions.ended(State.CANCELLED, jobs.c.id == bindparam("of_id"), **WRITTEN)
NOTED = Change(jobs, WRITTEN, (jobs.c.id == bindparam("of_id"),))
ALONE = transitions.ended_from_afar(State.DEAD)
TEXTS: dict[str, str | None] = {"status": "SUCCESS", "result": "1", "traceback": None, "meta": "{}"}
NEW_TEXTS = {f"new_{name}": text for name, text in TEXTS.items()}
GROUP = {"id": bindparam("group"), "result": bindparam("members", type_=Text()), "inserted_at": now()}
KEPT = Upsert(groups, (groups.c.id,), GROUP)
REPLACED = Upsert(groups, (groups.c.id,), GROUP, lambda new: {"result": new["result"]})
LONGER = Upsert(
    groups, (groups.c.id,), GROUP, lambda new: {"result": new["result"]}, lambda new: groups.c.result < new["result"]
)
COUNTED = Change(chords, {"ended": chords.c.ended + 1}, (chords.c.id == bindparam("chord"),))
SEEN = (chords.c.ended, (chords.c.ended + chords.c.added).label("all"))


@pytest.fixture(scope="module")
def _plain_storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    with closing(Storage(f"sqlite:///{tmp_path_factory.mktemp('plain') / 'kathikon.db'}", Settings())) as storage:
        storage.database.dialect = PlainDialect(storage.database.url)
        storage.setup()
        yield storage


@pytest.fixture(params=["sqlite", "plain", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def storage(request: pytest.FixtureRequest) -> Storage:
    """An empty storage on each kind of database in turn, and on SQLite by means that every database has."""
    chosen: Storage = request.getfixturevalue(f"_{request.param}_storage")
    chosen.reset()
    return chosen


@pytest.fixture
def dialect(storage: Storage) -> Dialect:
    return storage.database.dialect


@pytest.fixture
def connection(storage: Storage) -> Iterator[Connection]:
    """Within a transaction."""
    with storage.database.write() as connection:
        yield connection


def claims(worker: Worker, limit: int = 10) -> dict[str, Any]:
    return {"from_queue": "default", "at_most": limit, "by_node": worker.id}


def rows_of(storage: Storage) -> dict[str, list[Any]]:
    """All that the tables hold."""
    with storage.database.read() as connection:
        return {name: sorted(map(repr, connection.execute(select(one)))) for name, one in metadata.tables.items()}


def in_threads(number: int, run: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def tried() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=tried) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def due(storage: Storage, number: int, set_row: Callable[..., None]) -> None:
    storage.insert_many([new_job(str(one), scheduled_at=AGO + timedelta(hours=1)) for one in range(number)])
    for one in range(number):
        set_row(str(one), available_at=AGO + timedelta(seconds=one))


# --- claim


def test_claim_answers_with_its_columns_as_they_are_then(
    storage: Storage, dialect: Dialect, worker: Worker, connection: Connection
) -> None:
    before = [new_job(str(number), priority=number) for number in range(3)]
    dialect.upsert_many(connection, _published(False, False, False), [_values(job) for job in before])
    fences = {row.id: row.fence for row in connection.execute(select(jobs.c.id, jobs.c.fence))}
    rows = dialect.claim(connection, CLAIM, claims(worker, 2))
    assert {tuple(row[1:5]) for row in rows} == {(name, "claimed", fences[name] + 1, worker.id) for name in "12"}
    assert {row[0] for row in rows} == set(connection.execute(select(jobs.c.seq).where(jobs.c.id != "0")).scalars())
    assert len(dialect.claim(connection, CLAIM, claims(worker))) == 1
    assert dialect.claim(connection, CLAIM, claims(worker)) == []


def test_claim_of_the_one_that_its_conditions_name(storage: Storage, dialect: Dialect, worker: Worker) -> None:
    storage.insert_many([new_job("1"), new_job("2")])
    with storage.database.once() as connection:
        for expected in ([("2", "claimed")], []):
            rows = dialect.claim(connection, CLAIM_ONE, {**claims(worker), "of_id": "2"}, (["default"], 2))
            assert [tuple(row[1:3]) for row in rows] == expected


def test_claim_takes_one_part_after_another(
    storage: Storage, dialect: Dialect, worker: Worker, connection: Connection
) -> None:
    batch = [new_job(str(number), priority=number // 2) for number in range(6)]
    dialect.upsert_many(connection, _published(False, False, False), [_values(job) for job in batch])
    found = [{row[1] for row in dialect.claim(connection, IN_TURN, claims(worker, 3))} for _ in range(2)]
    assert ({"4", "5"} < found[0], set().union(*found), [len(one) for one in found]) == (True, {*"2345"}, [3, 1])


@pytest.mark.parametrize("claim", [CLAIM, IN_TURN], ids=["at once", "in turn"])
def test_two_claimers_never_share_a_row(storage: Storage, dialect: Dialect, worker: Worker, claim: Claim) -> None:
    storage.insert_many([new_job(str(number), priority=2) for number in range(200)])
    got: list[str] = []

    def take() -> None:
        while True:
            with storage.database.once() as connection:
                rows = dialect.claim(connection, claim, claims(worker, 7))
            got.extend(row[1] for row in rows)
            if not rows:
                return

    in_threads(4, take)
    assert Counter(got) == {str(number): 1 for number in range(200)}


@pytest.mark.parametrize("verb", ["claim", "pick_and_change", "pick_and_delete"])
def test_nobody_waits_for_rows_that_another_transaction_has(
    storage: Storage, dialect: Dialect, worker: Worker, set_row: Callable[..., None], verb: str
) -> None:
    if isinstance(dialect, SQLite):
        pytest.skip("SQLite has one writer at a time")
    states = {"claim": "available", "pick_and_change": "scheduled", "pick_and_delete": "completed"}
    storage.insert_many([new_job("1"), new_job("2")])
    for name in "12":
        set_row(name, state=states[verb], available_at=AGO, ended_at=AGO if verb == "pick_and_delete" else None)
    got: list[int] = []

    def take(connection: Connection) -> int:
        if verb == "claim":
            return len(dialect.claim(connection, CLAIM, claims(worker, 1)))
        if verb == "pick_and_change":
            return dialect.pick_and_change(connection, PROMOTED, DUE_ONES, (), {"at_most": 1}).number
        return dialect.pick_and_delete(connection, ENDED_ONES, (), {"at_most": 1}).number

    def take_another() -> None:
        with storage.database.once() as connection:
            got.extend([take(connection), take(connection)])

    with storage.database.write() as connection:
        assert take(connection) == 1
        in_threads(1, take_another)
        assert got == [1, 0]


@pytest.mark.parametrize("room", [1, 2])
def test_claim_says_that_the_node_waits_if_it_has_room_left(
    storage: Storage, dialect: Dialect, worker: Worker, room: int
) -> None:
    storage.insert(new_job("1"))
    with closing(storage.database.wakeup(worker.id)) as wakeup:
        while wakeup.wait(0.05):
            pass
        with storage.database.once() as connection:
            assert len(dialect.claim(connection, CLAIM, claims(worker), (["default"], room))) == 1
        storage.insert(new_job("2"))
        assert wakeup.wait(60 if room > 1 or not dialect.wakes_by_name else 0.2) is (
            room > 1 or not dialect.wakes_by_name
        )


# --- complete_and_claim


@pytest.mark.parametrize("within", [True, False], ids=["in a transaction", "alone"])
def test_complete_and_claim_does_both(storage: Storage, dialect: Dialect, worker: Worker, within: bool) -> None:
    storage.insert_many([new_job(str(number), priority=number) for number in range(5)])
    held = [job.hold for job in worker.claim(2)]
    stale = [hold._replace(fence=hold.fence - 1) for hold in held]
    database = storage.database

    def run(holds: list[Hold]) -> tuple[int, set[str]]:
        with database.write() if within else database.once() as connection:
            found = dialect.complete_and_claim(connection, COMPLETED, holds, CLAIM, claims(worker, 1))
            return found[0], {row[1] for row in found[1]}

    assert [run([]), run(stale), run(held), run(held)] == [(0, {"2"}), (0, {"1"}), (2, {"0"}), (0, set())]
    assert storage.counts() == {("default", "completed"): 2, ("default", "claimed"): 3}


# --- change_held, delete_held


def test_change_held_changes_what_is_held_so(storage: Storage, dialect: Dialect, worker: Worker, other: Worker) -> None:
    storage.insert_many([new_job(str(number)) for number in range(4)])
    held = worker.claim(4)
    moved, theirs, *ours = (job.hold for job in held)
    wrong = [moved._replace(fence=moved.fence - 1), theirs._replace(node_id=other.id), Hold(10**9, 1, worker.id)]
    with storage.database.write() as connection:
        before = rows_of(storage)
        assert dialect.change_held(connection, STARTED, wrong, {}) == 0
    assert rows_of(storage) == before
    with storage.database.write() as connection:
        assert dialect.change_held(connection, STARTED, [*wrong, *ours], {}) == 2
        assert dialect.change_held(connection, COMPLETED, [wrong[1]], {}, owned=False) == 1
    assert [the_job(storage, job.id).state for job in held] == [
        State.CLAIMED,
        State.COMPLETED,
        State.RUNNING,
        State.RUNNING,
    ]


def test_of_nothing_nothing_is_asked(storage: Storage, dialect: Dialect, connection: Connection) -> None:
    which: list[Changed] = []
    with counted() as statements:
        assert dialect.change_held(connection, STARTED, [], {}, which=which) == 0
        assert dialect.end_held(connection, COMPLETED, {}, which=which) == 0
        assert dialect.delete_held(connection, message_table, []) == 0
        dialect.upsert_many(connection, KEPT, [])
    assert statements == which == []


def test_delete_held(storage: Storage, dialect: Dialect, worker: Worker) -> None:
    messages.put(storage.database, ["queue"] * 3, "{}", "")
    first, second, third = (message.hold for message in worker.take())
    stale = [second._replace(fence=second.fence - 1), third._replace(node_id=worker.id + 1)]
    with storage.database.write() as connection:
        assert dialect.delete_held(connection, message_table, [first, *stale]) == 1
        assert set(connection.execute(select(message_table.c.seq)).scalars()) == {second.seq, third.seq}


# --- end_held


def test_end_held_writes_the_texts_of_each_to_its_own_row(storage: Storage, dialect: Dialect, worker: Worker) -> None:
    storage.insert_many([new_job(str(number)) for number in range(4)])
    held = worker.claim(4)
    ends = {job.hold: {**TEXTS, "result": f"of {job.id}", "meta": None} for job in reversed(held)}
    stale = held[0].hold
    ends[stale._replace(fence=stale.fence - 1)] = ends.pop(stale)
    with storage.database.write() as connection:
        assert dialect.end_held(connection, COMPLETED, ends) == 3
    found = [(job.state, job.status, job.result, job.meta) for job in storage.all()]
    done = [(State.COMPLETED, "SUCCESS", f"of {job.id}", None) for job in held[1:]]
    assert found == [(State.CLAIMED, None, None, None), *done]


# --- which


def _named(*names: str) -> set[Changed]:
    return {Changed(name, "default", "proj.task") for name in names}


def test_they_name_the_jobs_that_they_have_changed(
    storage: Storage, dialect: Dialect, worker: Worker, set_row: Callable[..., None]
) -> None:
    storage.insert_many([new_job(f"held {number}", task="proj.task") for number in range(6)])
    holds = [job.hold for job in worker.claim(6)]
    later = datetime.now(timezone.utc) + timedelta(hours=1)
    storage.insert_many([new_job(f"due {number}", task="proj.task", scheduled_at=later) for number in range(3)])
    for number in range(2):
        set_row(f"due {number}", available_at=AGO)
    stale = holds[0]._replace(fence=0)
    seen: list[set[Changed]] = []
    with storage.database.write() as connection:

        def named(run: Callable[[list[Changed]], Any], expected: int) -> None:
            which: list[Changed] = []
            answer = run(which)
            assert getattr(answer, "number", answer) == len(which) == expected
            seen.append(set(which))

        named(lambda which: dialect.change_held(connection, STARTED, [stale, holds[1]], {}, which=which), 1)
        named(lambda which: dialect.end_held(connection, COMPLETED, {stale: TEXTS, holds[2]: TEXTS}, which=which), 1)
        for change, ended in ((NOTED, False), (CANCELLED_BY_ID, True)):
            values = {"of_id": "held 3", **NEW_TEXTS}
            named(lambda w, c=change, e=ended, v=values: dialect.change_and_tell(connection, c, v, e, which=w), 1)
        values = {"of_id": "held 4", "why": None, "because": None, **NEW_TEXTS}
        named(lambda which: dialect.change_and_tell(connection, ALONE, values, True, which=which), 1)
        named(lambda which: dialect.change_and_tell(connection, ALONE, {**values}, True, which=which), 0)
        values = {"at_most": 5}
        named(lambda w: dialect.pick_and_change(connection, PROMOTED, DUE_ONES, (), values, which=w), 2)
        with_columns: list[Changed] = []
        taken = dialect.pick_and_delete(connection, ENDED_ONES, (jobs.c.id,), values, which=with_columns)
        assert [tuple(row) for row in taken.rows] == [("held 2",)]
        seen.append(set(with_columns))
    assert seen == [
        _named("held 1"),
        _named("held 2"),
        _named("held 3"),
        _named("held 3"),
        _named("held 4"),
        set(),
        _named("due 0", "due 1"),
        _named("held 2"),
    ]


# --- pick_and_change, pick_and_delete


def test_pick_and_change(storage: Storage, dialect: Dialect, set_row: Callable[..., None], worker: Worker) -> None:
    due(storage, 5, set_row)
    with storage.database.write() as connection:
        taken = dialect.pick_and_change(connection, PROMOTED, DUE_ONES, (jobs.c.id, jobs.c.state), {"at_most": 2})
        assert (taken.number, {tuple(row) for row in taken.rows}) == (2, {("0", "available"), ("1", "available")})
        taken = dialect.pick_and_change(connection, PROMOTED, DUE_ONES, (), {"at_most": 2})
        assert (taken.number, list(taken.rows)) == (2, [])
        assert [dialect.pick_and_change(connection, PROMOTED, DUE_ONES, (), {"at_most": 2}).number for _ in "12"] == [
            1,
            0,
        ]


def test_pick_and_delete(storage: Storage, dialect: Dialect, worker: Worker) -> None:
    storage.insert_many([new_job(str(number)) for number in range(3)])
    for job in worker.claim(3):
        worker.complete(job)
    with storage.database.write() as connection:
        taken = dialect.pick_and_delete(connection, ENDED_ONES, (jobs.c.id,), {"at_most": 1})
        assert (taken.number, len(taken.rows)) == (1, 1)
        numbers = [dialect.pick_and_delete(connection, ENDED_ONES, (), {"at_most": 2}).number for _ in "12"]
    assert (numbers, storage.all()) == ([2, 0], [])


@pytest.mark.parametrize("deletes", [False, True])
def test_what_one_has_picked_no_other_picks(
    storage: Storage, dialect: Dialect, worker: Worker, set_row: Callable[..., None], deletes: bool
) -> None:
    storage.insert_many([new_job(str(number)) for number in range(100)])
    state = "completed" if deletes else "scheduled"
    for number in range(100):
        set_row(str(number), state=state, available_at=AGO, ended_at=AGO if deletes else None)
    got: list[str] = []

    def take() -> None:
        number, values, columns = 1, {"at_most": 7}, (jobs.c.id,)
        while number:
            with storage.database.once() as connection:
                if deletes:
                    number, rows = dialect.pick_and_delete(connection, ENDED_ONES, columns, values)
                else:
                    number, rows = dialect.pick_and_change(connection, PROMOTED, DUE_ONES, columns, values)
            got.extend(name for (name,) in rows)

    in_threads(3, take)
    assert Counter(got) == {str(number): 1 for number in range(100)}


# --- upsert


@pytest.mark.parametrize(
    ("upsert", "facts", "left"),
    [
        (KEPT, [True, False, False], "5"),
        (REPLACED, [True, True, True], "4"),
        (LONGER, [True, True, False], "6"),
    ],
    ids=["nothing changes", "changes", "changes where"],
)
def test_upsert_says_whether_it_has_written(
    storage: Storage, dialect: Dialect, connection: Connection, upsert: Upsert, facts: list[bool], left: str
) -> None:
    written = [dialect.upsert(connection, upsert, {"group": "one", "members": text}) for text in "564"]
    assert (written, connection.execute(select(groups.c.id, groups.c.result)).all()) == (facts, [("one", left)])


def test_upsert_of_what_is_the_same_has_written(storage: Storage, dialect: Dialect, connection: Connection) -> None:
    values = {"group": "one", "members": "1"}
    assert [dialect.upsert(connection, REPLACED, values) for _ in "12"] == [True, True]


def test_upsert_many(storage: Storage, dialect: Dialect, connection: Connection) -> None:
    dialect.upsert(connection, KEPT, {"group": "b", "members": "old"})
    dialect.upsert_many(connection, REPLACED, [{"group": one, "members": f"new {one}"} for one in "cba"])
    found = connection.execute(select(groups.c.id, groups.c.result).order_by(groups.c.id)).all()
    assert found == [(one, f"new {one}") for one in "abc"]


def test_one_of_two_that_insert_the_same_row_has_changed_it(storage: Storage, dialect: Dialect) -> None:
    facts: list[bool] = []

    def write() -> None:
        for number in range(50):
            with storage.database.once() as connection:
                facts.append(dialect.upsert(connection, KEPT, {"group": str(number), "members": ""}))

    in_threads(3, write)
    assert Counter(facts) == {True: 50, False: 100}


def test_first_fences_are_random(storage: Storage, dialect: Dialect) -> None:
    storage.insert_many([new_job(str(number)) for number in range(10)])
    fences = {job.fence for job in storage.all()}
    assert len(fences) > 5
    assert all(0 <= fence < 2**30 for fence in fences)


# --- change_and_read


def _chord(connection: Connection) -> None:
    connection.execute(chords.insert().values(id="chord", ended=0, added=10, inserted_at=now()))


def test_change_and_read(storage: Storage, dialect: Dialect, connection: Connection) -> None:
    _chord(connection)
    found = [dialect.change_and_read(connection, COUNTED, SEEN, {"chord": "chord"}) for _ in "12"]
    assert [tuple(row) for row in found if row is not None] == [(1, 11), (2, 12)]
    assert dialect.change_and_read(connection, COUNTED, SEEN, {"chord": "other"}) is None


def test_who_counts_at_once_counts_on(storage: Storage, dialect: Dialect) -> None:
    with storage.database.write() as connection:
        _chord(connection)
    numbers: list[int] = []

    def count() -> None:
        for _ in range(25):
            with storage.database.write() as connection:
                row = dialect.change_and_read(connection, COUNTED, SEEN, {"chord": "chord"})
                assert row is not None
                numbers.append(row[0])

    in_threads(4, count)
    assert sorted(numbers) == list(range(1, 101))


# --- calls


@pytest.fixture
def wakeup(storage: Storage, dialect: Dialect, worker: Worker) -> Iterator[Wakeup]:
    """What a node that waits for the queue ``default`` waits on."""
    worker.wait_for("default")
    with closing(storage.database.wakeup(worker.id)) as wakeup:
        while wakeup.wait(0.05):
            pass
        yield wakeup


@pytest.mark.parametrize("later", [False, True])
def test_publish_wakes_who_waits(storage: Storage, dialect: Dialect, wakeup: Wakeup, later: bool) -> None:
    when = datetime.now(timezone.utc) + timedelta(hours=1) if later else None
    job = new_job(scheduled_at=when)
    with storage.database.once(durable=True) as connection:
        dialect.publish(connection, _published(later, False, False), _values(job), later, False)
    assert wakeup.wait(60)
    assert (wakeup.called_all, the_job(storage).state) == (later, State.SCHEDULED if later else State.AVAILABLE)
    with storage.database.once(durable=True) as connection:
        dialect.publish(connection, _published(later, False, False), _values(job), later, True)
    assert len(storage.all()) == 1


@pytest.mark.parametrize("rings", [False, True])
def test_who_waits_is_called_as_the_transaction_commits(
    storage: Storage, dialect: Dialect, wakeup: Wakeup, rings: bool
) -> None:
    with storage.database.write() as connection:
        assert dialect_of(connection) is dialect
        if rings:
            dialect.ring(connection)
        else:
            dialect.wake(connection, ["other", "default"], 2)
        assert not wakeup.wait(0.1)
    assert wakeup.wait(60)
    assert wakeup.called_all is rings


@pytest.fixture
def hearing(storage: Storage) -> Iterator[Wakeup]:
    """What a process waits on for results."""
    with closing(storage.database.hearing(LISTENER)) as wakeup:
        result_listeners.enter(storage.database, ["1"], LISTENER)
        while wakeup.wait(0.05):
            pass
        yield wakeup


@pytest.mark.parametrize("ended", [False, True])
def test_who_waits_for_a_result_is_called(
    storage: Storage, dialect: Dialect, worker: Worker, hearing: Wakeup, ended: bool
) -> None:
    storage.insert(new_job("1"))
    hold = worker.claim_one().hold
    with storage.database.once() as connection:
        assert dialect.change_and_tell(connection, NOTED, {"of_id": "unknown", **NEW_TEXTS}, False) == 0
    assert not hearing.wait(0.1)
    with storage.database.write() as connection:
        if ended:
            assert dialect.end_held(connection, COMPLETED, {hold: TEXTS}) == 1
        else:
            assert dialect.change_and_tell(connection, NOTED, {"of_id": "1", **NEW_TEXTS}, False) == 1
        assert not hearing.wait(0.1)
    assert hearing.wait(60)


def test_waits_are_entered_where_the_dialect_says_so(storage: Storage, dialect: Dialect, worker: Worker) -> None:
    storage.insert_many([new_job("1"), new_job("2")])
    worker.store(worker.claim_one())
    one = select(jobs.c.id).where(jobs.c.id == bindparam("keys"), ENDED)
    with storage.database.once() as connection:
        if not dialect.enters_waits:
            with pytest.raises(NotImplementedError):
                dialect.enter_waits(connection, one, ["1"], LISTENER)
            with pytest.raises(NotImplementedError):
                dialect.leave_waits(connection, ["1"], LISTENER)
            return
        some = select(jobs.c.id).where(jobs.c.id.in_(bindparam("keys", expanding=True)), ENDED)
        assert [row[0] for row in dialect.enter_waits(connection, one, ["1"], LISTENER)] == ["1"]
        assert [row[0] for row in dialect.enter_waits(connection, some, ["1", "2"], LISTENER)] == ["1"]
        with closing(storage.database.hearing(LISTENER)) as hearing:
            dialect.leave_waits(connection, ["2"], LISTENER)
            worker.store(worker.claim_one())
            assert not hearing.wait(0.2)


# --- transactions


class Undone(Exception):
    """What ends a transaction that is not to be."""


#: For each verb, how to call it with a job ``1`` that is held, a ``2`` that is due, a ``3`` that is ready, a ``4`` that
#: has ended, a message that is held, and a chord.
WRITING: dict[str, Callable[[Dialect, Connection, Job, Worker, Hold], Any]] = {
    "claim": lambda dialect, connection, job, worker, hold: dialect.claim(connection, CLAIM, claims(worker)),
    "claim and wait": lambda dialect, connection, job, worker, hold: dialect.claim(
        connection, CLAIM, claims(worker), (["other"], 5)
    ),
    "complete_and_claim": lambda dialect, connection, job, worker, hold: dialect.complete_and_claim(
        connection, COMPLETED, [job.hold], CLAIM, claims(worker), (["other"], 5)
    ),
    "change_held": lambda dialect, connection, job, worker, hold: dialect.change_held(
        connection, STARTED, [job.hold], {}
    ),
    "end_held": lambda dialect, connection, job, worker, hold: dialect.end_held(
        connection, COMPLETED, {job.hold: TEXTS}
    ),
    "delete_held": lambda dialect, connection, job, worker, hold: dialect.delete_held(
        connection, message_table, [hold]
    ),
    "pick_and_change": lambda dialect, connection, job, worker, hold: dialect.pick_and_change(
        connection, PROMOTED, DUE_ONES, (jobs.c.id,), {"at_most": 5}
    ),
    "pick_and_delete": lambda dialect, connection, job, worker, hold: dialect.pick_and_delete(
        connection, ENDED_ONES, (), {"at_most": 5}
    ),
    "change_and_read": lambda dialect, connection, job, worker, hold: dialect.change_and_read(
        connection, COUNTED, SEEN, {"chord": "chord"}
    ),
    "change_and_tell": lambda dialect, connection, job, worker, hold: dialect.change_and_tell(
        connection, CANCELLED_BY_ID, {"of_id": "1", **NEW_TEXTS}, True
    ),
    "upsert": lambda dialect, connection, job, worker, hold: dialect.upsert(
        connection, KEPT, {"group": "one", "members": "1"}
    ),
    "upsert_many": lambda dialect, connection, job, worker, hold: dialect.upsert_many(
        connection, _published(False, False, False), [_values(new_job("5"))]
    ),
    "wait_for": lambda dialect, connection, job, worker, hold: dialect.wait_for(connection, worker.id, ["other"]),
    "wake": lambda dialect, connection, job, worker, hold: dialect.wake(connection, ["default"], 5),
    "ring": lambda dialect, connection, job, worker, hold: dialect.ring(connection),
}


@pytest.mark.parametrize("verb", WRITING)
def test_what_is_rolled_back_leaves_nothing_and_calls_nobody(
    storage: Storage, dialect: Dialect, worker: Worker, set_row: Callable[..., None], verb: str
) -> None:
    storage.insert(new_job("1"))
    job = worker.claim_one()
    storage.insert_many([new_job(name) for name in "234"])
    set_row("2", state="scheduled", available_at=AGO)
    set_row("4", state="completed", ended_at=AGO)
    messages.put(storage.database, ["queue"], "{}", "")
    (message,) = worker.take()
    with storage.database.write() as connection:
        _chord(connection)
    worker.wait_for("default")
    database = storage.database
    with closing(database.wakeup(worker.id)) as wakeup, closing(database.hearing(LISTENER)) as hearing:
        result_listeners.enter(database, ["1"], LISTENER)
        while wakeup.wait(0.05) or hearing.wait(0.05):
            pass
        before = rows_of(storage)
        with suppress(Undone), database.write() as connection:
            WRITING[verb](dialect, connection, job, worker, message.hold)
            raise Undone
        assert rows_of(storage) == before
        assert not wakeup.wait(0.1)
        assert not hearing.wait(0.1)
        with database.write() as connection:  # nor is it kept for the next one
            assert finish.completed(database, connection, [job.hold._replace(fence=0)]) == 0
        assert not wakeup.wait(0.05)
        assert not hearing.wait(0.05)
        with database.write() as connection:
            WRITING[verb](dialect, connection, job, worker, message.hold)
    if verb not in ("wait_for", "ring", "wake") or dialect.wakes_by_name:
        assert rows_of(storage) != before or verb == "ring"


def test_a_node_that_was_to_be_woken_is_woken_later(storage: Storage, dialect: Dialect, wakeup: Wakeup) -> None:
    """It waits still, when the transaction that would have woken it was rolled back."""
    with suppress(Undone), storage.database.write() as connection:
        dialect.wake(connection, ["default"], 1)
        raise Undone
    assert not wakeup.wait(0.1)
    storage.insert(new_job())
    assert wakeup.wait(60)
