"""Unique jobs with a real worker: what calls return, and what canvas does with a part that is not new."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from sqlalchemy import create_engine

from kathikon_celery import NotUnique, bulk, enqueue_in
from kathikon_celery.job import Cause, State
from tests.integration.conftest import Jobs, Journal, Workers
from tests.support import apps
from tests.support.workers import WorkerProcess


@pytest.fixture(scope="module", autouse=True)
def worker(shared_workers: Workers) -> WorkerProcess:
    return shared_workers(pool="threads", concurrency=4)


def test_a_call_returns_the_result_of_the_job_that_is_there(app: Celery, jobs: Jobs, tmp_path: Path) -> None:
    path = tmp_path / "end"
    first = apps.unique_wait.delay(str(path), 1)
    jobs.wait(first, State.RUNNING)
    again = [
        apps.unique_wait.delay(str(path), 2),
        apps.unique_wait.apply_async((), {"path": str(path)}, countdown=1),
        apps.unique_wait.s(str(path)).apply_async(),
        app.send_task(apps.unique_wait.name, (str(path),)),
        app.send_task(apps.unique_wait.name, (str(path),), countdown=1),
    ]
    with bulk():
        again.append(apps.unique_wait.delay(str(path)))
    assert {one.id for one in again} == {first.id}
    path.touch()
    assert [one.get(timeout=60) for one in [first, *again]] == [1] * 7
    jobs.wait(first, State.COMPLETED)
    new = apps.unique_wait.delay(str(path), 3)
    assert (new.id == first.id, new.get(timeout=60)) == (False, 3)


def test_the_first_call_of_a_process(app: Celery, jobs: Jobs, tmp_path: Path, shared_database_url: str) -> None:
    path = tmp_path / "end"
    first = apps.unique_wait.delay(str(path), 1)
    with apps.create_app("another", kathikon_database_url=shared_database_url) as other:
        other.set_current()
        assert apps.unique_wait.delay(str(path), 2).id == first.id
    app.set_current()
    path.touch()
    assert first.get(timeout=60) == 1


def test_in_the_callers_transaction(app: Celery, jobs: Jobs, tmp_path: Path, shared_database_url: str) -> None:
    path = tmp_path / "end"
    engine = create_engine(jobs.storage.database.url)
    with engine.begin() as connection, enqueue_in(connection):
        first = apps.unique_wait.delay(str(path), 1)
        assert apps.unique_wait.delay(str(path), 2).id == first.id
    engine.dispose()
    path.touch()
    assert first.get(timeout=60) == 1


def test_debounce(app: Celery, jobs: Jobs, journal: Journal) -> None:
    calls = [apps.debounced.apply_async((journal.path, "name", str(n)), countdown=0.3) for n in range(3)]
    other = apps.debounced.apply_async((journal.path, "another", "other"), countdown=0.3)
    assert (calls[-1].get(timeout=60), other.get(timeout=60)) == ("2", "other")
    assert sorted(journal.lines) == ["2", "other"]
    for replaced in calls[:-1]:
        assert jobs.of(replaced).cause is Cause.REPLACED
        with pytest.raises(TaskRevokedError):
            replaced.get(timeout=60)


def test_one_after_another(app: Celery, jobs: Jobs, journal: Journal) -> None:
    results = [apps.one_after_another.delay(journal.path, str(number)) for number in range(3)]
    assert [result.get(timeout=60) for result in results] == ["0", "1", "2"]
    starts = [line.split()[-1] for line in journal.lines]
    assert len(starts) == 6
    assert starts[::2] != starts[1::2] or starts == [one for number in "012" for one in (number, number)]


def test_raise(app: Celery, jobs: Jobs, journal: Journal) -> None:
    first = apps.once.delay(journal.path, "once")
    first.get(timeout=60)
    for _ in range(2):
        with pytest.raises(NotUnique, match=first.id):
            apps.once.delay(journal.path, "once")
    apps.once.delay(journal.path, "another").get(timeout=60)
    assert journal.lines == ["once", "another"]


def test_parts_of_canvas_that_are_not_new(app: Celery, jobs: Jobs, journal: Journal, tmp_path: Path) -> None:
    """They are discarded, as if they were revoked: the workflow waits for the part's own id."""
    path = tmp_path / "end"
    first = apps.unique_wait.delay(str(path), 1)
    jobs.wait(first, State.RUNNING)
    part = apps.unique_wait.si(str(path), 2)
    of_group = group(part, apps.add.s(2, 3)).apply_async()
    of_chain = chain(apps.add.si(1, 1), part, apps.append.si(journal.path, "after")).apply_async()
    of_chord = chord([part, apps.add.s(1, 1)], apps.total.s()).apply_async()
    assert of_group[1].get(timeout=60) == 5
    with pytest.raises(TaskRevokedError):
        of_group[0].get(timeout=60)
    with pytest.raises(TaskRevokedError):
        of_chain.parent.get(timeout=60)
    with pytest.raises((ChordError, TaskRevokedError), match="same unique key"):
        of_chord.get(timeout=60)
    assert jobs.wait(of_chord, State.DEAD).result is not None
    assert jobs.of(of_group[0]).reason == f"job {first.id} has the same unique key"
    path.touch()
    assert first.get(timeout=60) == 1
    assert "after" not in journal.lines
