"""What operators' verbs do to rows: once, together with their record, also when the answer to a commit is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Connection, update

from kathikon_celery.job import State
from kathikon_celery.operate.history import history
from kathikon_celery.operate.kathikon import Kathikon, NotAllowed
from kathikon_celery.storage import Storage, acts, idle_query, pauses, tables
from kathikon_celery.storage.errors import Unavailable
from kathikon_celery.storage.pauses import Kind, Paused, matches
from tests.storage.actors import Worker, new_job


@pytest.fixture
def operator(storage: Storage) -> Kathikon:
    return Kathikon(storage, operator="ada")


@contextmanager
def lost_answer(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next transaction is committed, and its answer is lost."""
    write = storage.database.write
    left = [1]

    @contextmanager
    def losing(**options: Any) -> Iterator[Connection]:
        with write(**options) as connection:
            yield connection
        if left:
            left.pop()
            raise Unavailable("the answer was lost")

    monkeypatch.setattr(storage.database, "write", losing)
    monkeypatch.setattr(storage.database, "patience", 10.0)
    yield
    assert not left
    monkeypatch.undo()


def events_of(operator: Kathikon, job_id: str) -> list[str]:
    return [event.event for event in operator.history(job_id)]


def test_the_order_of_what_happened_at_one_moment(storage: Storage, operator: Kathikon) -> None:
    """A moment is a millisecond on SQLite."""
    moment = datetime(2026, 1, 1, tzinfo=timezone.utc)
    storage.insert(job := new_job("1"))
    with storage.database.write() as connection:
        acts.note(connection, ["1"], "retry", None)
        connection.execute(update(tables.history).values(at=moment))
    errors = [{"at": moment.isoformat(), "attempt": 1, "reason": "no"}]
    ends = replace(job, state=State.DEAD, errors=errors)
    ends.inserted_at = ends.claimed_at = ends.started_at = ends.ended_at = moment
    events = [event.event for event in history(storage, ends)]
    assert events == ["published", "failed", "retry", "claimed", "started", "dead"]


@pytest.mark.parametrize("verb", ["cancel", "discard"])
def test_a_verb_whose_answer_was_lost_is_done_once(
    storage: Storage, operator: Kathikon, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    storage.insert(new_job("1"))
    with lost_answer(storage, monkeypatch):
        job = getattr(operator, verb)("1")
    assert job.state in (State.CANCELLED, State.DISCARDED)
    assert events_of(operator, "1").count(verb) == 1
    assert [(act.verb, act.changed, act.ended_at is None) for act in operator.acts()] == [(verb, 1, False)]


def test_a_copy_whose_answer_was_lost_is_made_once(
    storage: Storage, operator: Kathikon, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.insert(new_job("1", envelope=ENVELOPE, body="[[], {}, {}]"))
    with lost_answer(storage, monkeypatch):
        copy = operator.rerun("1")
    assert copy.rerun_of == "1"
    assert len(storage.all()) == 2
    assert len(operator.acts()) == 1


ENVELOPE = (
    '{"headers": {"task": "proj.add", "id": "1"}, "properties": {"delivery_info": {}},'
    ' "content-type": "application/json", "content-encoding": "utf-8"}'
)


def test_a_pause_whose_answer_was_lost_is_one(
    storage: Storage, operator: Kathikon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lost_answer(storage, monkeypatch):
        operator.pause_queue("mail")
    with lost_answer(storage, monkeypatch):
        assert operator.resume_queue("mail")
    assert [act.verb for act in operator.acts()] == ["resume", "pause"]


def test_a_bulk_verb_leaves_out_what_has_moved_on(storage: Storage, worker: Worker, operator: Kathikon) -> None:
    storage.insert_many([new_job(str(number)) for number in range(5)])
    selection = operator.jobs("available")
    page = selection.page(10)
    worker.claim(limit=1)
    assert operator.storage.backend.change([job.id for job in page], _claimed_only, _act("x"), False, (NotAllowed,))
    assert selection.discard() == 4
    assert [(act.verb, act.changed) for act in operator.acts()] == [("discard", 4)]


def _act(verb: str) -> acts.Act:
    return acts.Act(verb=verb, target="", operator="ada")


def _claimed_only(job: Any) -> None:
    if job.state is not State.CLAIMED:
        raise NotAllowed("cancel", job)
    job.state = State.CANCELLED


def test_one_refused_job_changes_nothing(storage: Storage, worker: Worker, operator: Kathikon) -> None:
    storage.insert(new_job("1"))
    worker.claim(limit=1)
    with pytest.raises(NotAllowed, match="is claimed; nothing was done: discard is for jobs that are "):
        operator.discard("1")
    assert operator.acts() == []
    assert storage.fetch("1").state is State.CLAIMED  # type: ignore[union-attr]


# --- pauses


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("proj.add", "proj.add", True),
        ("proj.add", "proj.*", True),
        ("proj.add", "*.a?d", True),
        ("proj.[x]", "proj.[x]", True),
        ("proj.x", "proj.[x]", False),
        ("PROJ.add", "proj.*", False),
        ("a%", "a%", True),
        ("ab", "a_", False),
    ],
)
def test_claims_and_python_agree_on_patterns(
    storage: Storage, worker: Worker, operator: Kathikon, name: str, pattern: str, fits: bool
) -> None:
    assert matches(name, pattern) is fits
    storage.insert(new_job("1", task=name))
    operator.pause_task(pattern)
    with storage.database.read() as connection:
        paused, left = pauses.paused(connection)
    assert (paused, left) == (Paused(tasks=(pattern,)), None)
    assert bool(worker.claim()) is not fits


def test_what_claims_leave_out(storage: Storage, operator: Kathikon) -> None:
    long = "q" * 300
    operator.pause_queue(long)
    operator.pause_queue("ein größerer")
    operator.pause_all()
    with storage.database.read() as connection:
        paused, _ = pauses.paused(connection)
        assert paused.everything
        assert len(paused.queues) == 2
        assert {pause.name for pause in pauses.every(connection)} == {"", long, "ein größerer"}
    assert {(pause.kind, pause.name) for pause in operator.pauses()} >= {(Kind.QUEUE, long), (Kind.ALL, "")}
    assert {one.name for one in operator.queue_status()} == {long, "ein größerer"}


def test_paused_jobs_keep_their_places(storage: Storage, worker: Worker, operator: Kathikon) -> None:
    storage.insert_many([new_job(str(number), task=f"proj.{number % 2}") for number in range(6)])
    operator.pause_task("proj.1")
    assert [job.id for job in worker.claim(10)] == ["0", "2", "4"]
    assert not is_anything_there(storage)
    operator.resume_task("proj.1")
    assert is_anything_there(storage)
    assert [job.id for job in worker.claim(10)] == ["1", "3", "5"]


@pytest.mark.parametrize("what", ["queue", "everything"])
def test_a_pause_holds_at_once_for_each_kind_of_claim(
    storage: Storage, worker: Worker, operator: Kathikon, what: str
) -> None:
    """A worker that has not heard of the pause yet claims nothing either."""
    storage.insert_many([new_job("1"), new_job("2", queue="other")])
    job = storage.fetch("1")
    assert job is not None
    if what == "queue":
        operator.pause_queue("default")
    else:
        operator.pause_all()
    assert worker.claim() == []
    assert worker.claim_told(job) == []
    assert not is_anything_there(storage)
    assert len(worker.claim(queue="other")) == (what == "queue")
    operator.resume_queue("default")
    operator.resume_all()
    assert [job.id for job in worker.claim_told(job)] == ["1"]


def test_a_pause_that_has_ended_holds_no_more(storage: Storage, worker: Worker, operator: Kathikon) -> None:
    storage.insert(new_job())
    past = datetime.now(timezone.utc) - timedelta(seconds=1)
    for kind, name in ((Kind.QUEUE, "default"), (Kind.TASK, "*"), (Kind.ALL, "")):
        storage.backend.pause(kind, name, past, _act("pause"))
    assert len(worker.claim()) == 1


def is_anything_there(storage: Storage) -> bool:
    with storage.database.read() as connection:
        return idle_query.look(storage.database, connection, ["default"])


def test_a_worker_that_has_not_heard_of_a_pause_claims_nothing(
    storage: Storage, worker: Worker, operator: Kathikon
) -> None:
    """It knows that nothing was paused when it last read; what it has done is written all the same."""
    storage.insert_many([new_job("1"), new_job("2"), new_job("3", queue="other")])
    storage.database.knows_pauses = False
    (held,) = worker.claim(1)
    second = storage.fetch("2")
    assert second is not None
    operator.pause_task("of nobody")
    assert worker.claim() == worker.claim(queue="other") == worker.claim_told(second) == []
    assert not is_anything_there(storage)
    with storage.database.write() as connection:
        done, claimed = storage.backend.complete_and_claim(connection, [held.hold], "default", 5, worker.id)
    assert (done, claimed) == (1, [])
    storage.database.knows_pauses = True  # it has read
    assert is_anything_there(storage)
    assert [job.id for job in worker.claim()] == ["2"]
