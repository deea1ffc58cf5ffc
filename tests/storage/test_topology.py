"""Exchanges, queues and bindings."""

from __future__ import annotations

from kathikon_celery.job import State
from kathikon_celery.storage import Storage, messages, topology
from kathikon_celery.storage.names import key
from tests.storage.actors import Worker, new_job, the_job


def bound(storage: Storage, exchange: str) -> set[tuple[str, str]]:
    with storage.database.read() as connection:
        return set(topology.bound(connection, exchange))


def queues(storage: Storage) -> set[str]:
    with storage.database.read() as connection:
        return set(topology.all_queues(connection))


def test_an_exchange_keeps_the_type_that_it_was_made_with(storage: Storage) -> None:
    assert topology.declare_exchange(storage.database, "events", "topic") == "topic"
    assert topology.declare_exchange(storage.database, "events", "fanout") == "topic"
    with storage.database.read() as connection:
        assert topology.exchange_type(connection, "events") == "topic"
        assert topology.exchange_type(connection, "unknown") is None


def test_binding_twice_is_binding_once(storage: Storage) -> None:
    database = storage.database
    topology.declare_exchange(database, "events", "topic")
    for queue in ("one", "two"):
        topology.declare_queue(database, queue)
    for queue, routing_key in (("one", "a.*"), ("one", "a.*"), ("one", "b"), ("two", "")):
        topology.bind(database, queue, "events", routing_key)
    assert bound(storage, "events") == {("one", "a.*"), ("one", "b"), ("two", "")}
    with database.read() as connection:
        listed = topology.all_bindings(connection)
    assert sorted(listed) == [("one", "events", "a.*"), ("one", "events", "b"), ("two", "events", "")]
    topology.unbind(database, "one", "events", "a.*")
    topology.unbind(database, "one", "events", "unknown")
    assert bound(storage, "events") == {("one", "b"), ("two", "")}


def test_deleting_an_exchange_leaves_its_queues(storage: Storage) -> None:
    topology.declare_exchange(storage.database, "events", "topic")
    topology.declare_queue(storage.database, "queue")
    topology.bind(storage.database, "queue", "events", "a")
    topology.delete_exchange(storage.database, "events")
    assert bound(storage, "events") == set()
    assert queues(storage) == {"queue"}


def test_deleting_a_queue_leaves_its_jobs(storage: Storage) -> None:
    """They are obligations: only prune, purge and delete remove them."""
    database = storage.database
    topology.declare_exchange(database, "events", "topic")
    topology.declare_queue(database, "queue")
    topology.bind(database, "queue", "events", "a")
    messages.put(database, ["queue"], "{}", "text")
    storage.insert(new_job(queue="queue"))
    with database.write() as connection:
        topology.delete_queue(connection, key("queue"))
    assert queues(storage) == bound(storage, "events") == set()
    with database.read() as connection:
        assert not topology.queue_exists(connection, "queue")
        assert messages.size(connection, "queue") == 1
    assert the_job(storage).state is State.AVAILABLE


def test_declaring_again_keeps_what_was_declared(storage: Storage) -> None:
    topology.declare_queue(storage.database, "queue", message_ttl=7.5)
    topology.declare_queue(storage.database, "queue", message_ttl=1.0)
    with storage.database.read() as connection:
        assert topology.message_ttl(connection, "queue") == 7.5
        assert topology.message_ttl(connection, "unknown") is None
        assert topology.queue_exists(connection, "queue")


def test_a_queue_expires_when_nobody_uses_it(storage: Storage) -> None:
    database, worker = storage.database, Worker(storage)
    topology.declare_queue(database, "for ever")
    topology.declare_queue(database, "patient", expires=3600)
    topology.declare_queue(database, "over", expires=-1)
    topology.declare_queue(database, "consumed", expires=-1)
    topology.own_queue(database, "consumed", worker.id)
    assert topology.delete_unused(database) == 1
    assert queues(storage) == {"for ever", "patient", "consumed"}
