"""Messages that are no jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select, update

from kathikon_celery.storage import Storage, messages, prune, topology
from kathikon_celery.storage.messages import Message
from kathikon_celery.storage.names import key
from kathikon_celery.storage.tables import messages as table
from tests.storage.actors import Worker, new_job


def put(storage: Storage, *bodies: str, queue: str = "queue", **options: Any) -> None:
    for body in bodies:
        messages.put(storage.database, [queue], '{"headers":{}}', body, **options)


def size(storage: Storage, queue: str = "queue") -> int:
    with storage.database.read() as connection:
        return messages.size(connection, key(queue))


def rows(storage: Storage) -> int:
    with storage.database.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def report(storage: Storage, function: Callable[..., int], *taken: Message) -> int:
    with storage.database.write() as connection:
        return function(storage.database, connection, [message.hold for message in taken])


@pytest.mark.parametrize("durable", [True, False])
def test_into_each_queue(storage: Storage, worker: Worker, durable: bool) -> None:
    messages.put(storage.database, ["one", "two"], '{"headers":{}}', "body", priority=3, durable=durable)
    for queue in ("one", "two"):
        (message,) = worker.take(queue=queue)
        assert (message.queue, message.envelope, message.body) == (queue, '{"headers":{}}', "body")
        assert (message.priority, message.redelivered) == (3, False)
    messages.put(storage.database, [], "{}", "to nobody")
    assert rows(storage) == 2


@pytest.mark.parametrize("keep", [True, False])
def test_higher_priority_first_then_in_order(storage: Storage, worker: Worker, keep: bool) -> None:
    for number, priority in enumerate([0, 5, 0, -(2**62), 2**62, 5]):
        put(storage, str(number), priority=priority)
    assert [message.body for message in worker.take(4, keep=keep)] == ["4", "1", "5", "0"]
    assert [message.body for message in worker.take(4, keep=keep)] == ["2", "3"]
    assert rows(storage) == (6 if keep else 0)


def test_what_is_held_goes_with_its_acknowledgement(storage: Storage, worker: Worker, other: Worker) -> None:
    put(storage, "1", "2")
    first, second = worker.take()
    assert other.take() == []
    assert report(storage, messages.acknowledge, first) == 1
    assert report(storage, messages.acknowledge, first, second) == 1
    assert rows(storage) == 0


def test_what_is_given_back_is_there_for_anybody(storage: Storage, worker: Worker, other: Worker) -> None:
    put(storage, "1", "2")
    (first,) = worker.take(1)
    assert report(storage, messages.give_back, first) == 1
    assert report(storage, messages.give_back, first) == 0
    taken = other.take()
    assert [(message.body, message.redelivered) for message in taken] == [("1", True), ("2", False)]
    assert report(storage, messages.acknowledge, first) == 0  # too late: it is another's
    assert report(storage, messages.give_back, first) == 0
    assert report(storage, messages.acknowledge, *taken) == 2


def test_takers_never_overlap(storage: Storage) -> None:
    put(storage, *map(str, range(60)), durable=False)
    taken: list[str] = []

    def take(worker: Worker, keep: bool) -> None:
        while batch := worker.take(3, keep=keep):
            taken.extend(message.body for message in batch)

    threads = [threading.Thread(target=take, args=(Worker(storage), number % 2 == 0)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken, key=int) == [str(number) for number in range(60)]


class TestTimeToLive:
    def test_over_it_is_delivered_no_more(self, storage: Storage, worker: Worker) -> None:
        put(storage, "over", ttl=-1.0)
        put(storage, "fresh", ttl=60.0)
        put(storage, "for ever")
        assert size(storage) == 2
        assert [message.body for message in worker.take()] == ["fresh", "for ever"]
        assert prune.expired_messages(storage.database) == 1
        assert rows(storage) == 2

    def test_the_shorter_of_message_and_queue_counts(self, storage: Storage, worker: Worker) -> None:
        topology.declare_queue(storage.database, "queue", message_ttl=-1.0)
        put(storage, "over", ttl=60.0)
        put(storage, "over as well")
        assert worker.take() == []
        topology.declare_queue(storage.database, "patient", message_ttl=60.0)
        put(storage, "over", queue="patient", ttl=-1.0)
        assert worker.take(queue="patient") == []
        assert prune.expired_messages(storage.database) == 3

    def test_what_somebody_holds_stays(self, storage: Storage, worker: Worker) -> None:
        put(storage, "held", ttl=60.0)
        (held,) = worker.take()
        with storage.database.write() as connection:
            connection.execute(update(table).values(expires_at=table.c.available_at))
        assert prune.expired_messages(storage.database) == 0
        assert report(storage, messages.acknowledge, held) == 1


def test_size_counts_what_is_ready(storage: Storage, worker: Worker) -> None:
    put(storage, "1", "2", "3")
    storage.insert_many([new_job("1", queue="queue"), new_job("2", queue="queue"), new_job("3")])
    assert size(storage) == 5
    worker.take(1)
    worker.claim(1, "queue")
    assert size(storage) == 3
    assert size(storage, "nowhere") == 0


def test_purge_leaves_what_is_held(storage: Storage, worker: Worker) -> None:
    put(storage, "1", "2", "3")
    put(storage, "elsewhere", queue="other")
    worker.take(1)
    with storage.database.write() as connection:
        assert messages.purge(connection, "queue") == 2
    assert rows(storage) == 2


def test_a_message_is_heard_by_everybody(storage: Storage) -> None:
    wakeups = [storage.database.wakeup(Worker(storage).id) for _ in range(2)]
    for wakeup in wakeups:
        while wakeup.wait(0.05):
            pass
    put(storage, "hello", durable=False)
    assert all(wakeup.wait(60) for wakeup in wakeups)
    for wakeup in wakeups:
        wakeup.close()
