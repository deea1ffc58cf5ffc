"""Chords: rows that are counted, and forgotten when nothing can complete them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import func, select, update

from kathikon_celery.job import Cause, State
from kathikon_celery.storage import Storage, chords, finish, results
from kathikon_celery.storage.chords import Part
from kathikon_celery.storage.settle import Incomplete, JobEnd, TaskEnd, settle
from kathikon_celery.storage.tables import chord_parts
from kathikon_celery.storage.tables import chords as table
from kathikon_celery.worker.services.pruner import LONGEST_CHORD, Pruner
from tests.storage.actors import Worker, new_job, the_job
from tests.support.statements import heard


def opened(storage: Storage, chord: str, *parts: str) -> None:
    chords.open(storage.database, chord, [(part, index) for index, part in enumerate(parts)], None)
    chords.set_size(storage.database, chord, len(parts))


def age(storage: Storage, chord: str, seconds: float) -> None:
    moment = datetime.now(timezone.utc) - timedelta(seconds=seconds)
    with storage.database.write() as connection:
        connection.execute(update(table).where(table.c.id == chord).values(inserted_at=moment))


def known(storage: Storage) -> list[str]:
    with storage.database.read() as connection:
        return sorted(connection.execute(select(table.c.id)).scalars())


def part(chord: str, task_id: str, **fields: Any) -> Part:
    return Part(**{"chord": chord, "task_id": task_id, "position": 0, "succeeded": True, "result": "1"} | fields)


def test_a_part_that_ends_twice_counts_once(storage: Storage) -> None:
    opened(storage, "chord", "1", "2")
    with storage.database.write() as connection:
        assert not chords.count(storage.database, connection, part("chord", "1"))
        assert not chords.count(storage.database, connection, part("chord", "1"))
        assert chords.count(storage.database, connection, part("chord", "2"))
        assert [one.task_id for one in chords.header(connection, "chord").parts] == ["1", "2"]
        chords.close(connection, "chord")
        assert not chords.count(storage.database, connection, part("chord", "2"))
    assert known(storage) == []


def test_the_last_part_sends_the_body_in_its_own_transaction(storage: Storage, worker: Worker) -> None:
    opened(storage, "chord", "1")
    storage.insert(new_job("1", group_id="chord"))
    job = worker.claim_one()
    written = {"status": "SUCCESS", "result": "1", "traceback": None, "meta": None}
    end = JobEnd(task_id="1", hold=job.hold, state=State.COMPLETED, written=written)
    ending = TaskEnd(ends=[end], parts=[part("chord", "1")])
    with pytest.raises(Incomplete) as complete:
        settle(storage.database, ending, {})
    assert [header.chord for header in complete.value.headers] == ["chord"]
    assert (storage.fetch("1").state, known(storage)) == (State.CLAIMED, ["chord"])  # type: ignore[union-attr]
    bodies = {"chord": TaskEnd(jobs=[new_job("body")])}
    assert settle(storage.database, ending, bodies)
    assert not settle(storage.database, ending, bodies)
    assert [(one.id, one.state) for one in storage.all()] == [("1", State.COMPLETED), ("body", State.AVAILABLE)]
    assert known(storage) == []


@pytest.mark.parametrize("parts", [100, 10_000])
def test_a_part_costs_the_same_whatever_the_size_of_its_chord(storage: Storage, parts: int) -> None:
    statements: list[str] = []
    rows = 0

    def hear(statement: str, values: Any, many: bool) -> None:
        nonlocal rows
        statements.append(statement)
        rows += len(values) if many else 1

    with heard(hear):
        opened(storage, "chord", *map(str, range(parts)))
        assert len(statements) <= 7 + 2 * parts / chords.CHUNK
        assert rows <= parts + 8
        statements.clear()
        with storage.database.write() as connection:
            assert not chords.count(storage.database, connection, part("chord", "7"))
        assert len(statements) <= 5


def test_a_chord_that_nothing_can_complete_is_forgotten(storage: Storage) -> None:
    for chord in ("new", "old", "under way"):
        opened(storage, chord, f"part of {chord}", "other")
    for chord in ("old", "under way"):
        age(storage, chord, LONGEST_CHORD + 60)
    storage.insert(new_job("part of under way", group_id="under way"))
    storage.insert(new_job("part of old", group_id="old"))
    (job,) = [job for job in storage.claim("default", 2) if job.group_id == "old"]
    job.state = State.CANCELLED
    storage.update(job)
    Pruner(storage=storage, interval=10.0).step()
    assert known(storage) == ["new", "under way"]
    with storage.database.read() as connection:
        assert connection.execute(select(func.count()).select_from(chord_parts)).scalar() == 4


def test_what_replaces_a_task_may_end_before_the_task(storage: Storage, worker: Worker) -> None:
    ends = {"FAILURE": State.DEAD, "REVOKED": State.CANCELLED}
    storage.insert_many([new_job(word) for word in [*ends, "not yet"]])
    held = worker.claim(3)
    worker.start(*held)
    for word, state in ends.items():  # a chord, whose body has the job's id and is failed with its header
        results.store_alone(storage.database, word, state, status=word, result="{}", traceback=None, meta=None)
    with storage.database.write() as connection:
        assert finish.replaced(storage.database, connection, [job.hold for job in held]) == 3
    for word, state in ends.items():
        job = the_job(storage, word)
        assert (job.state, job.status, job.node_id, job.ended_at is None) == (state, word, None, False)
        assert (job.cause is Cause.CHILDREN) == (word == "FAILURE")
    job = the_job(storage, "not yet")
    assert (job.state, job.status, job.node_id, job.ended_at) == (State.WAITING_FOR_CHILDREN, None, None, None)
