"""Ids, queues, exchanges and routing keys of any length and alphabet."""

from __future__ import annotations

import pytest

from kathikon_celery.job import Job, State
from kathikon_celery.storage import Storage, messages, prune, results, topology
from kathikon_celery.storage.names import key
from tests.storage.actors import Worker, new_job, the_job

NAMES = [
    "",
    " trailing and leading ",
    "with:colons,commas;and\nnewlines\t'quotes\" %s %(x)s :bind",
    "\0",
    "nul\0inside",
    "\N{SNAKE}\N{FAMILY}\U0001f9d1\u200d\U0001f680",
    "\ud800 half a pair",
    "İstanbul ß ﬀ",
    '"quoted"',
    "#looks-like-a-digest",
    key("y" * 500),
    "x" * 190,
    "x" * 191,
    "ж" * 95,
    "ж" * 96,
    "z" * 10_000,
    "\N{SNAKE}" * 10_000,
]
IDS = [f"{number}" for number in range(len(NAMES))]


@pytest.mark.parametrize("name", NAMES, ids=IDS)
def test_as_an_id(storage: Storage, worker: Worker, name: str) -> None:
    storage.insert(new_job(name))
    storage.insert(new_job("another"))
    assert the_job(storage, name).id == name
    assert {job.id for job in storage.all()} == {name, "another"}
    job = next(one for one in storage.claim("default", 2) if one.id == name)
    job.state = State.RUNNING
    storage.update(job)
    storage.insert(new_job(name))
    assert len(storage.all()) == 2
    job = next(one for one in storage.all() if one.id == name)
    assert job.attempts == 1
    results.store_alone(storage.database, name, None, status="x", result="1", traceback=None, meta=None)
    results.forget(storage.database, name)
    assert storage.delete(name) == 1
    assert storage.fetch(name) is None


@pytest.mark.parametrize("name", NAMES, ids=IDS)
def test_as_a_queue_it_is_shown(storage: Storage, worker: Worker, name: str) -> None:
    storage.insert(new_job("one", queue=name, envelope='{"headers":{}}'))
    storage.insert(new_job("two", queue="elsewhere"))
    moved = the_job(storage, "two")
    moved.queue = name
    storage.update(moved)
    assert [job.queue for job in storage.all(queue=name)] == [name, name]
    assert storage.counts() == {(name, "available"): 2}
    moved.queue = "back"
    storage.update(moved)
    assert storage.counts() == {(name, "available"): 1, ("back", "available"): 1}
    assert the_job(storage, "two").queue == "back"


@pytest.mark.parametrize("name", NAMES, ids=IDS)
def test_as_a_queue(storage: Storage, worker: Worker, name: str) -> None:
    topology.declare_queue(storage.database, name)
    storage.insert(new_job(queue=name))
    storage.insert(new_job("another", queue=name + "!"))
    messages.put(storage.database, [name], "{}", "text")
    assert [job.id for job in storage.all(queue=name)] == ["job"]
    assert worker.claim_one(name).id == "job"
    assert [message.body for message in worker.take(queue=name)] == ["text"]
    job = the_job(storage)
    job.priority = 5
    storage.update(job)
    assert [one.priority for one in storage.all(queue=name)] == [5]
    with storage.database.write() as connection:
        assert topology.queue_exists(connection, name)
        assert prune.purge(connection, key(name + "!")) == 1
        topology.delete_queue(connection, key(name))
        assert not topology.queue_exists(connection, name)


@pytest.mark.parametrize("name", NAMES, ids=IDS)
def test_as_an_exchange_and_a_routing_key(storage: Storage, name: str) -> None:
    database = storage.database
    topology.declare_exchange(database, name, "topic")
    topology.declare_queue(database, name)
    topology.bind(database, name, name, name)
    with database.read() as connection:
        assert topology.bound(connection, name) == [(name, name)]
        assert topology.all_bindings(connection) == [(name, name, name)]
        assert topology.all_queues(connection) == [name]
    topology.unbind(database, name, name, name)
    with database.read() as connection:
        assert topology.bound(connection, name) == []


def test_case_and_blanks_tell_names_apart(storage: Storage) -> None:
    names = ["a", "A", "a ", " a", "á", "a\u0301"]
    storage.insert_many([new_job(name, queue=name) for name in names])
    assert {job.id for job in storage.all()} == set(names)
    assert all(len(storage.all(queue=name)) == 1 for name in names)


def test_as_the_ids_of_relatives(storage: Storage) -> None:
    long = "x" * 10_000
    storage.insert(Job(id="job", root_id=long, parent_id="nul\0", group_id="\N{SNAKE}" * 100))
    job = the_job(storage)
    assert (job.root_id, job.parent_id, job.group_id) == (key(long), key("nul\0"), key("\N{SNAKE}" * 100))
    storage.update(job)
    assert the_job(storage).root_id == key(long)
