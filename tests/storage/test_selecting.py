"""Selections: what fits, in pages that have each job once, and at once however many jobs there are."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from kathikon_celery.job import Cause, Job, State
from kathikon_celery.storage import Storage
from kathikon_celery.storage.selecting import Filter
from tests.storage.actors import Worker, new_job

NOW = datetime.now(timezone.utc)


def ids(storage: Storage, **fields: Any) -> set[str]:
    chosen = Filter(**fields)
    found = {job.id for job in storage.page(chosen, 1000)}
    assert storage.count(chosen) == len(found)
    return found


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        ("proj.mail.*", {"proj.mail.send", "proj.mail.x"}),
        ("proj.mail.?", {"proj.mail.x"}),
        ("*", None),
        ("*.send", {"proj.mail.send"}),
        ("proj.mail.send", {"proj.mail.send"}),
        ("PROJ.*", set()),
        ("[a-z]*", {"[a-z] 100%_!"}),
        ("*%_!", {"[a-z] 100%_!"}),
        ("*!", {"[a-z] 100%_!"}),
        ("*_*", {"[a-z] 100%_!", "a_b"}),
        ("a?b", {"a_b", "axb", "a*b"}),
        ("*\\*", {"back\\slash"}),
        ("*ö*", {"schön"}),
    ],
)
def test_patterns(storage: Storage, pattern: str, fitting: set[str] | None) -> None:
    names = {"proj.mail.send", "proj.mail.x", "[a-z] 100%_!", "a_b", "axb", "a*b", "back\\slash", "schön"}
    storage.insert_many([new_job(name, task=name) for name in names])
    assert ids(storage, task=pattern) == (names if fitting is None else fitting)


def test_each_field(storage: Storage, worker: Worker) -> None:
    storage.insert_many([new_job("mail", queue="mail"), new_job("root"), new_job("part", root_id="root", group_id="g")])
    (dead,) = worker.claim(queue="mail")
    worker.end(dead, State.DEAD, "Timeout('smtp')")
    assert ids(storage, queue="mail") == ids(storage, states={State.DEAD}) == ids(storage, error="Timeout*") == {"mail"}
    assert ids(storage, cause=Cause.RAISED) == {"mail"}
    assert ids(storage, cause=Cause.LOST) == ids(storage, error="Time") == ids(storage, queue="mai") == set()
    assert ids(storage, root="root") == {"root", "part"}
    assert ids(storage, group="g") == {"part"}
    assert ids(storage, states={State.AVAILABLE, State.DEAD}) == {"root", "part", "mail"}
    hour = timedelta(hours=1)
    assert ids(storage, since=NOW - hour, until=NOW + hour) == {"root", "part", "mail"}
    assert ids(storage, since=NOW + hour) == ids(storage, until=NOW - hour) == set()


def test_a_long_name_is_found(storage: Storage) -> None:
    """A digest stands for it in the column."""
    storage.insert(new_job("long", queue="q" * 5000))
    assert ids(storage, queue="q" * 5000) == {"long"}


def test_pages_have_each_job_once_and_in_order(storage: Storage, worker: Worker) -> None:
    soon = NOW + timedelta(hours=1)
    for number in range(5):
        storage.insert(new_job(f"dead {number}", queue="d"))
        worker.end(worker.claim_one("d"), State.DEAD)
        storage.insert(new_job(f"ready {number}", queue=f"q{number % 2}", priority=number % 3))
        storage.insert(new_job(f"due {number}", state=State.SCHEDULED, scheduled_at=soon - timedelta(minutes=number)))
        storage.insert(new_job(f"held {number}", queue="h"))
    worker.claim(5, "h")
    newest = [f"{kind} {n}" for n in reversed(range(5)) for kind in ("held", "due", "ready", "dead")]
    ready = [f"ready {n}" for n in (2, 4, 0, 5, 1, 3) if n < 5]
    in_order = {
        (): newest,
        (State.DEAD,): [f"dead {n}" for n in (4, 3, 2, 1, 0)],
        (State.SCHEDULED,): [f"due {n}" for n in (4, 3, 2, 1, 0)],
        (State.CLAIMED,): [f"held {n}" for n in range(5)],
        (State.AVAILABLE,): ready,
        (State.DEAD, State.AVAILABLE): [*ready, *(f"dead {n}" for n in (4, 3, 2, 1, 0))],
    }
    for states, wanted in in_order.items():
        for size in (1, 2, 3, 100):
            got: list[Job] = []
            while part := storage.page(Filter(states=states), size, got[-1] if got else None):
                got += part
            assert [job.id for job in got] == wanted, (states, size)


def test_a_page_leaves_out_what_may_be_large(storage: Storage, worker: Worker) -> None:
    storage.insert(new_job("job", body="x" * 100))
    worker.store(worker.claim_one(), result="y" * 100)
    (job,) = storage.page(Filter(), 10)
    assert (job.body, job.result) == ("", None)
    assert job.status == "SUCCESS"
