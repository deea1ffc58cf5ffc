"""kombu without Celery: what any program may expect of a broker. Where transports differ, RabbitMQ's word counts."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy
from kombu import Connection, Exchange, Message, Queue, compression, serialization
from kombu.exceptions import ChannelError, ContentDisallowed, OperationalError

from kathikon_celery.consume.ledger import Ledger
from tests.support import peers
from tests.support.peers import TIMEOUT
from tests.support.waiting import wait_until

PRIORITIES = [0, 2**62, -(2**62), 1, -1, 2**63 - 1, -(2**63), 10, 9, 255]

BODIES: dict[str, Any] = {
    "nothing": None,
    "empty": "",
    "text": "w\u00f6rt \u2028 \U0001f600 \0 end",
    "structure": {"a": [1, 2.5, {"b": None}], "\u00e9": True},
    "long": "x" * 300_000,
}

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def url(shared_database_url: str) -> str:
    """The broker's URL."""
    return f"kathikon+{shared_database_url}"


@pytest.fixture(scope="module")
def peer() -> Iterator[Callable[..., Any]]:
    """Call a function of `peers` in another process, which lives as long as the module."""
    with ProcessPoolExecutor(1, SPAWN, initializer=peers.freeze_handlers) as executor:
        yield lambda function, *args, **kwargs: executor.submit(function, *args, **kwargs).result(TIMEOUT * 2)


@pytest.fixture
def connect(url: str) -> Iterator[Callable[[], Connection]]:
    """Open connections; all are closed when the test ends."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Connection(url))


@pytest.fixture
def connection(connect: Callable[[], Connection]) -> Connection:
    return connect()


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return uuid4().hex


@pytest.fixture
def queue(connection: Connection, name: str) -> Queue:
    """A queue that exists, bound to the default exchange."""
    queue = Queue(name)
    queue(connection.default_channel).declare()
    return queue


class Inbox:
    """A consumer that keeps what it gets."""

    def __init__(self, connection: Connection, *queues: Queue, channel: Any = None, **options: Any) -> None:
        self.connection = connection
        self.messages: list[Message] = []
        self.consumer = (channel or connection).Consumer(queues, on_message=self.messages.append, **options)
        self.consumer.consume()

    @property
    def bodies(self) -> list[Any]:
        return [message.decode() for message in self.messages]

    def wait(self, count: int) -> list[Message]:
        """The messages, as soon as there are so many."""
        while len(self.messages) < count:
            self.connection.drain_events(timeout=TIMEOUT)
        return self.messages

    def nothing_more(self) -> bool:
        """Whether nothing comes for a while."""
        before = len(self.messages)
        try:
            self.connection.drain_events(timeout=0.3)
        except TimeoutError:
            return len(self.messages) == before
        return False


def send(connection: Connection, queue: Queue, *bodies: Any, **options: Any) -> None:
    for body in bodies:
        connection.Producer().publish(body, routing_key=queue.name, **options)


def count_of(connection: Connection, name: str) -> int:
    return connection.default_channel.queue_declare(name, passive=True).message_count  # type: ignore[no-any-return]


def exists(connection: Connection, name: str) -> bool:
    try:
        count_of(connection, name)
    except ChannelError:
        return False
    return True


def take(connection: Connection, queue: Queue, count: int = 1000) -> list[Any]:
    """Get up to so many messages of a queue, acknowledge them, and return their bodies."""
    bound, bodies = queue(connection.default_channel), []
    while len(bodies) < count and (message := bound.get()) is not None:
        bodies.append(message.decode())
        message.ack()
    return bodies


@contextmanager
def holding(url: str, queue: Queue, count: int, prefetch: int = 0) -> Iterator[Any]:
    """Another process that holds so many messages; its bodies are ``held``, its pipe ``pipe``."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=peers.hold, args=(url, queue, count, theirs, prefetch), daemon=True)
    process.start()
    try:
        theirs.close()
        assert ours.poll(TIMEOUT * 2)
        process.pipe, process.held = ours, ours.recv()
        yield process
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


class TestExchanges:
    """They belong to the broker: what one process declares serves all."""

    @staticmethod
    def bind(connection: Connection, exchange: Exchange, **keys: str) -> dict[str, Queue]:
        """Queues by a short name, each bound by a routing key."""
        queues = {short: Queue(f"{exchange.name} {short}", exchange, key) for short, key in keys.items()}
        for queue in queues.values():
            queue(connection.default_channel).declare()
        return queues

    @staticmethod
    def got(connection: Connection, queues: dict[str, Queue]) -> dict[str, list[Any]]:
        return {short: take(connection, queue) for short, queue in queues.items()}

    def test_direct(self, connection: Connection, peer: Callable[..., Any], url: str, name: str) -> None:
        queues = self.bind(connection, Exchange(name, "direct"), one="a", two="b", both="a")
        queues["both"](connection.default_channel).bind_to(Exchange(name), "b")
        keys = ["a", "b", "A", "", "a.b"]
        peer(peers.publish, url, [(key, {"exchange": name, "routing_key": key}) for key in keys])
        assert self.got(connection, queues) == {"one": ["a"], "two": ["b"], "both": ["a", "b"]}

    def test_topic(self, connection: Connection, peer: Callable[..., Any], url: str, name: str) -> None:
        keys = ["", "a", "a.b", "a.b.c", "b", "b.a", "a..c", "a\nb", "A.B", "a+", "a.b\n"]
        expected = {
            "": [""],
            "#": keys,
            "*": ["a", "b", "a\nb", "a+"],
            "a.*": ["a.b", "a.b\n"],
            "a.#": ["a", "a.b", "a.b.c", "a..c", "a.b\n"],
            "#.a": ["a", "b.a"],
            "*.*": ["a.b", "b.a", "A.B", "a.b\n"],
            "a.*.c": ["a.b.c", "a..c"],
            "#.b.#": ["a.b", "a.b.c", "b", "b.a"],
            "a.#.c": ["a.b.c", "a..c"],
            "a+": ["a+"],
            "[ab]": [],
        }
        exchange = Exchange(name, "topic")
        queues = {key: Queue(f"{name} {key}", exchange, key) for key in expected}
        for queue in queues.values():
            queue(connection.default_channel).declare()
        peer(peers.publish, url, [(f"<{key}>", {"exchange": name, "routing_key": key}) for key in keys])
        got = self.got(connection, queues)
        assert got == {key: [f"<{one}>" for one in matching] for key, matching in expected.items()}

    def test_fanout(self, connection: Connection, peer: Callable[..., Any], url: str, name: str) -> None:
        queues = self.bind(connection, Exchange(name, "fanout"), one="", two="whatever", three="")
        peer(peers.publish, url, [(key, {"exchange": name, "routing_key": key}) for key in ("x", "a")])
        assert self.got(connection, queues) == {short: ["x", "a"] for short in queues}

    def test_bindings_are_undone(self, connection: Connection, peer: Callable[..., Any], url: str, name: str) -> None:
        queues = self.bind(connection, Exchange(name, "direct"), one="a", two="a")
        queues["one"](connection.default_channel).unbind_from(Exchange(name), "a")
        peer(peers.publish, url, [("x", {"exchange": name, "routing_key": "a"})])
        assert self.got(connection, queues) == {"one": [], "two": ["x"]}
        queues["two"](connection.default_channel).exchange.delete()
        peer(peers.publish, url, [("y", {"exchange": name, "routing_key": "a"})])
        assert self.got(connection, queues) == {"one": [], "two": []}

    def test_the_default_exchange_names_the_queue(
        self, connection: Connection, peer: Callable[..., Any], url: str, queue: Queue
    ) -> None:
        peer(peers.publish, url, [("x", {"routing_key": queue.name})])
        assert take(connection, queue) == ["x"]

    def test_of_another_type(self, connection: Connection, connect: Callable[[], Connection], name: str) -> None:
        Exchange(name, "direct")(connection.default_channel).declare()
        with pytest.raises(ChannelError, match="exists with the type 'direct'"):
            Exchange(name, "fanout")(connect().default_channel).declare()
        with pytest.raises(ChannelError, match="Kathikon has direct, fanout, topic"):
            Exchange(name + "2", "headers")(connection.default_channel).declare()

    def test_one_that_another_connection_deleted_is_made_again(
        self, connection: Connection, connect: Callable[[], Connection], name: str
    ) -> None:
        exchange, other = Exchange(name, "fanout"), connect()
        exchange(connection.default_channel).declare()
        exchange(other.default_channel).delete()
        exchange(connection.default_channel).declare()
        exchange(other.default_channel).declare(passive=True)

    def test_what_does_not_exist(self, connection: Connection, name: str) -> None:
        for declare in (connection.default_channel.queue_declare, connection.default_channel.exchange_declare):
            with pytest.raises(ChannelError, match="NOT_FOUND") as caught:
                declare(name, passive=True)
            assert caught.value.reply_code == "404"


class TestOrder:
    def test_higher_priority_first(
        self, connection: Connection, peer: Callable[..., Any], url: str, queue: Queue
    ) -> None:
        messages = [(number, {"routing_key": queue.name, "priority": number}) for number in PRIORITIES]
        peer(peers.publish, url, [("plain", {"routing_key": queue.name}), *messages])
        expected = sorted(PRIORITIES, reverse=True)
        expected.insert(expected.index(0), "plain")
        assert take(connection, queue, 3) == expected[:3]
        assert peer(peers.consume, url, queue, len(expected) - 3) == expected[3:]

    @pytest.mark.parametrize("priority", [2**63, -(2**63) - 1, "high", float("nan")])
    def test_what_is_no_priority(self, connection: Connection, queue: Queue, priority: Any) -> None:
        with pytest.raises(ValueError, match="priority"):
            send(connection, queue, "x", priority=priority)
        assert count_of(connection, queue.name) == 0

    def test_of_equal_priority_first_in_first_out(
        self, connection: Connection, peer: Callable[..., Any], url: str, queue: Queue
    ) -> None:
        send(connection, queue, *range(250))
        assert peer(peers.consume, url, queue, 250) == list(range(250))


class TestLifetime:
    def test_of_a_message(self, connection: Connection, queue: Queue) -> None:
        send(connection, queue, "brief", expiration=0.2)
        send(connection, queue, "long", expiration=60)
        send(connection, queue, "for ever")
        wait_until(lambda: count_of(connection, queue.name) == 2, what="the first has expired")
        assert take(connection, queue) == ["long", "for ever"]

    def test_of_messages_in_a_queue(
        self, connection: Connection, peer: Callable[..., Any], url: str, name: str
    ) -> None:
        queue = Queue(name, message_ttl=0.2)
        queue(connection.default_channel).declare()
        peer(peers.publish, url, [("x", {"routing_key": name}), ("y", {"routing_key": name, "expiration": 60})])
        wait_until(lambda: count_of(connection, name) == 0, what="both have expired")
        assert take(connection, queue) == []

    def test_what_is_held_does_not_expire(self, connection: Connection, queue: Queue) -> None:
        for seconds in (0.5, 5.0, 30.0):  # until it is got in time
            send(connection, queue, "held", expiration=seconds)
            if (held := queue(connection.default_channel).get()) is not None:
                break
        send(connection, queue, "left", expiration=seconds)
        wait_until(lambda: count_of(connection, queue.name) == 0, what="the other one has expired")
        held.ack()

    def test_of_a_queue_that_nobody_uses(self, connection: Connection, name: str) -> None:
        used, unused = Queue(f"{name} used", expires=0.5), Queue(f"{name} unused", expires=0.5)
        unused(connection.default_channel).declare()
        inbox = Inbox(connection, used)
        wait_until(lambda: not exists(connection, unused.name), what="the unused queue has gone")
        send(connection, used, "x")
        assert inbox.wait(1)[0].decode() == "x"
        inbox.consumer.cancel()
        wait_until(lambda: not exists(connection, used.name), what="so has the other one")

    def test_of_a_queue_in_milliseconds(self, connection: Connection, name: str) -> None:
        channel = connection.default_channel
        channel.queue_declare(name, arguments={"x-message-ttl": 100, "x-expires": 60_000})
        send(connection, Queue(name), "x")
        wait_until(lambda: count_of(connection, name) == 0, what="the message has expired")

    @pytest.mark.parametrize("how", ["cancelled", "channel closed", "connection closed", "killed"])
    def test_of_an_auto_delete_queue(
        self, connection: Connection, connect: Callable[[], Connection], url: str, name: str, how: str
    ) -> None:
        queue = Queue(name, auto_delete=True)
        queue(connection.default_channel).declare()
        send(connection, queue, "x")
        assert exists(connection, name)  # it waits for its first consumer
        if how == "killed":
            Inbox(connection, Queue(f"{name} of another"))  # somebody must be there to notice
            with holding(url, queue, 1) as process:
                process.kill()
                wait_until(lambda: not exists(connection, name), TIMEOUT, "the queue has gone")
            return
        other = connect()
        channel = other.channel()
        inbox = Inbox(other, queue, channel=channel)
        inbox.wait(1)
        end = {"cancelled": inbox.consumer.cancel, "channel closed": channel.close, "connection closed": other.release}
        end[how]()
        assert not exists(connection, name)

    @pytest.mark.parametrize("how", ["closed", "killed"])
    def test_of_an_exclusive_queue(
        self, connection: Connection, connect: Callable[[], Connection], url: str, name: str, how: str
    ) -> None:
        queue = Queue(name, exclusive=True)
        if how == "killed":
            Inbox(connection, Queue(f"{name} of another"))
            with holding(url, queue, 0) as process:
                assert exists(connection, name)
                process.kill()
                wait_until(lambda: not exists(connection, name), TIMEOUT, "the queue has gone")
            return
        other = connect()
        queue(other.default_channel).declare()
        assert exists(connection, name)
        other.release()
        assert not exists(connection, name)

    def test_of_a_queue_that_is_deleted(self, connection: Connection, queue: Queue) -> None:
        send(connection, queue, "x")
        queue(connection.default_channel).delete(if_empty=True)
        assert count_of(connection, queue.name) == 1
        queue(connection.default_channel).delete()
        assert not exists(connection, queue.name)
        queue(connection.default_channel).declare()
        assert take(connection, queue) == []


class TestGet:
    """AMQP's basic.get: one message, at once, or none."""

    def test_one_at_a_time(self, connection: Connection, queue: Queue) -> None:
        bound = queue(connection.default_channel)
        assert bound.get() is None
        send(connection, queue, "first", "second", headers={"h": [1, None]}, correlation_id="c", priority=3)
        message = bound.get()
        assert (message.decode(), message.headers, message.properties["correlation_id"]) == (
            "first",
            {"h": [1, None]},
            "c",
        )
        assert message.delivery_info["routing_key"] == queue.name
        assert message.delivery_info["redelivered"] is False
        assert message.properties["priority"] == 3
        assert count_of(connection, queue.name) == 1
        message.ack()
        assert take(connection, queue) == ["second"]

    def test_without_acknowledgement(
        self, connection: Connection, connect: Callable[[], Connection], queue: Queue
    ) -> None:
        send(connection, queue, "x", "y")
        other = connect()
        assert queue(other.default_channel).get(no_ack=True).decode() == "x"
        other.release()
        assert take(connection, queue) == ["y"]

    def test_what_is_not_acknowledged_comes_back(
        self, connection: Connection, connect: Callable[[], Connection], queue: Queue
    ) -> None:
        send(connection, queue, "x", "y")
        other = connect()
        assert queue(other.default_channel).get().decode() == "x"
        other.release()
        assert take(connection, queue) == ["x", "y"]


class TestConsuming:
    def test_acknowledged_is_gone(
        self, connection: Connection, connect: Callable[[], Connection], queue: Queue
    ) -> None:
        other = connect()
        inbox = Inbox(other, queue)
        send(connection, queue, "x")
        inbox.wait(1)[0].ack()
        other.release()
        assert take(connection, queue) == []

    def test_requeued_comes_again_before_what_is_younger(
        self, connection: Connection, connect: Callable[[], Connection], queue: Queue
    ) -> None:
        send(connection, queue, 0, 1, 2)
        message = queue(connection.default_channel).get()
        assert (message.decode(), message.delivery_info["redelivered"]) == (0, False)
        message.requeue()
        wait_until(lambda: count_of(connection, queue.name) == 3)
        inbox = Inbox(connection, queue)
        assert [one.delivery_info["redelivered"] for one in inbox.wait(3)] == [True, False, False]
        assert inbox.bodies == [0, 1, 2]

    @pytest.mark.parametrize("how", ["requeue", "reject", "recover"])
    def test_requeued_is_there_for_the_next_call(
        self, connection: Connection, queue: Queue, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        monkeypatch.setattr(Ledger, "notify", lambda ledger: None)  # the intake's thread is slow
        send(connection, queue, "x")
        channel = connection.default_channel
        bound = queue(channel)
        for count in range(1, 4):
            message = bound.get()
            assert message is not None, f"gone after {count} calls"
            if how == "recover":
                channel.basic_recover()
            elif how == "reject":
                message.reject(requeue=True)
            else:
                message.requeue()
            assert count != 2 or bound.queue_declare(passive=True)[1] == 1
        assert bound.purge() == 1

    def test_rejected_is_gone(self, connection: Connection, queue: Queue) -> None:
        send(connection, queue, 0, 1)
        inbox = Inbox(connection, queue, prefetch_count=1)
        inbox.wait(1)[0].reject()
        inbox.wait(2)[1].reject(requeue=True)
        again = inbox.wait(3)[2]
        assert (again.decode(), again.delivery_info["redelivered"]) == (1, True)
        again.ack()
        inbox.consumer.cancel()
        wait_until(lambda: take(connection, queue) == [])

    def test_recovered_comes_again(self, connection: Connection, queue: Queue) -> None:
        send(connection, queue, 0, 1)
        inbox = Inbox(connection, queue)
        inbox.wait(2)
        inbox.consumer.recover(requeue=True)
        assert sorted(message.decode() for message in inbox.wait(4)[2:]) == [0, 1]
        assert all(message.delivery_info["redelivered"] for message in inbox.messages[2:])

    def test_no_more_than_the_prefetch_limit(
        self, connection: Connection, peer: Callable[..., Any], url: str, queue: Queue
    ) -> None:
        send(connection, queue, *range(10))
        inbox = Inbox(connection, queue, prefetch_count=3)
        assert [message.decode() for message in inbox.wait(3)] == [0, 1, 2]
        assert inbox.nothing_more()
        assert peer(peers.ready, url, queue.name) == 7
        inbox.messages[1].ack()
        assert inbox.wait(4)[3].decode() == 3
        assert inbox.nothing_more()
        assert peer(peers.consume, url, queue, 6) == [4, 5, 6, 7, 8, 9]

    def test_the_limit_can_be_raised(self, connection: Connection, queue: Queue) -> None:
        send(connection, queue, *range(10))
        inbox = Inbox(connection, queue, prefetch_count=2)
        inbox.wait(2)
        inbox.consumer.qos(prefetch_count=5)
        inbox.wait(5)
        assert inbox.nothing_more()
        inbox.consumer.qos(prefetch_count=0)
        assert sorted(message.decode() for message in inbox.wait(10)) == list(range(10))

    def test_without_acknowledgement(
        self, connection: Connection, connect: Callable[[], Connection], queue: Queue
    ) -> None:
        send(connection, queue, *range(5))
        other = connect()
        inbox = Inbox(other, queue, no_ack=True, prefetch_count=1)
        assert [message.decode() for message in inbox.wait(5)] == list(range(5))
        other.release()
        assert take(connection, queue) == []

    def test_no_message_goes_to_two(self, connection: Connection, url: str, queue: Queue) -> None:
        send(connection, queue, *range(20))
        with holding(url, queue, 5, prefetch=5) as one, holding(url, queue, 5, prefetch=5) as two:
            assert len({*one.held, *two.held}) == 10
            assert count_of(connection, queue.name) == 10

    def test_a_consumer_that_is_cancelled_gets_nothing_more(
        self, connection: Connection, connect: Callable[[], Connection], queue: Queue
    ) -> None:
        other = connect()
        inbox = Inbox(other, queue, prefetch_count=1)
        send(connection, queue, "x", "y")
        message = inbox.wait(1)[0]
        inbox.consumer.cancel()
        message.ack()
        assert inbox.nothing_more()
        assert take(connection, queue) == ["y"]

    def test_two_consumers_of_one_connection(self, connection: Connection, queue: Queue) -> None:
        """Nothing is lost between them."""
        send(connection, queue, *range(4))
        first = Inbox(connection, queue, channel=connection.channel(), prefetch_count=1)
        first.wait(1)
        second = Inbox(connection, queue, channel=connection.channel(), prefetch_count=1)
        seen: list[int] = []
        while len(seen) < 4:
            for message in [one for inbox in (first, second) for one in inbox.messages if not one.acknowledged]:
                seen.append(message.decode())
                message.ack()
            if len(seen) < 4:
                connection.drain_events(timeout=TIMEOUT)
        assert sorted(seen) == list(range(4))

    def test_several_queues(self, connection: Connection, name: str) -> None:
        queues = [Queue(f"{name} {number}") for number in range(3)]
        inbox = Inbox(connection, *queues)
        for queue in queues:
            send(connection, queue, queue.name)
        assert sorted(message.decode() for message in inbox.wait(3)) == [queue.name for queue in queues]
        inbox.consumer.cancel_by_queue(queues[0].name)
        for queue in queues:
            send(connection, queue, "again")
        inbox.wait(5)
        assert inbox.nothing_more()
        assert take(connection, queues[0]) == ["again"]

    def test_channels_have_limits_and_messages_of_their_own(self, connection: Connection, name: str) -> None:
        queues = [Queue(f"{name} {number}") for number in range(2)]
        channels = [connection.channel(), connection.channel()]
        for queue in queues:
            queue(channels[0]).declare()
            send(connection, queue, *range(4))
        one, two = (
            Inbox(connection, queue, channel=channel, prefetch_count=limit)
            for queue, channel, limit in zip(queues, channels, (1, 3), strict=True)
        )
        while len(one.messages) < 1 or len(two.messages) < 3:
            connection.drain_events(timeout=TIMEOUT)
        assert one.nothing_more()
        assert two.nothing_more()
        channels[1].close()
        wait_until(lambda: count_of(connection, queues[1].name) == 4, what="what it held is back")
        assert count_of(connection, queues[0].name) == 3
        one.messages[0].ack()
        assert one.wait(2)[1].decode() == 1

    @pytest.mark.parametrize("how", ["closed", "killed"])
    def test_what_a_process_held_comes_back(self, connection: Connection, url: str, queue: Queue, how: str) -> None:
        send(connection, queue, "x", "y")
        with holding(url, queue, 1, prefetch=1) as other:
            assert other.held == ["x"]
            inbox = Inbox(connection, queue)
            assert inbox.wait(1)[0].decode() == "y"
            if how == "killed":
                other.kill()
            else:
                other.pipe.send("close")
            again = inbox.wait(2)[1]
            assert (again.decode(), again.delivery_info["redelivered"]) == ("x", True)

    def test_purging_leaves_what_is_held(self, connection: Connection, queue: Queue) -> None:
        send(connection, queue, *range(5))
        bound = queue(connection.default_channel)
        held = bound.get()
        assert bound.purge() == 4
        assert bound.purge() == 0
        held.requeue()
        wait_until(lambda: take(connection, queue) == [0])


class TestConnection:
    def test_draining_takes_no_longer_than_allowed(self, connection: Connection, queue: Queue) -> None:
        inbox = Inbox(connection, queue)
        start = monotonic()
        with pytest.raises(socket.timeout):
            connection.drain_events(timeout=0.2)
        assert 0.2 <= monotonic() - start < 60
        send(connection, queue, "x")
        connection.drain_events(timeout=TIMEOUT)
        assert inbox.bodies == ["x"]

    def test_heartbeats_are_not_needed(self, url: str) -> None:
        with Connection(url, heartbeat=2) as connection:
            connection.ensure_connection()
            assert connection.connected
            assert not connection.supports_heartbeats
            connection.heartbeat_check()

    def test_ensure(self, connection: Connection, queue: Queue) -> None:
        producer = connection.Producer()
        publish = connection.ensure(producer, producer.publish, max_retries=3)
        publish("x", routing_key=queue.name)
        assert take(connection, queue) == ["x"]

    def test_ensure_gives_up(self, tmp_path: Path) -> None:
        connection = Connection(f"kathikon+sqlite:///{tmp_path}/nowhere/kathikon.db")
        with connection, pytest.raises(OperationalError, match="nowhere"):
            connection.ensure_connection(max_retries=1, interval_start=0.01)

    def test_it_can_be_opened_again(self, connection: Connection, queue: Queue) -> None:
        send(connection, queue, "x")
        connection.release()
        assert not connection.connected
        assert take(connection, queue) == ["x"]

    def test_lost_connections_are_made_again(
        self, connection: Connection, shared_database_url: str, queue: Queue
    ) -> None:
        if not shared_database_url.startswith("postgresql"):
            pytest.skip("SQLite has no connections that could be lost")
        inbox = Inbox(connection, queue)
        producer = connection.Producer()
        engine = sqlalchemy.create_engine(
            shared_database_url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
        )
        for number in range(3):
            with engine.connect() as own:
                own.exec_driver_sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            producer.publish(number, routing_key=queue.name, retry=True)
            inbox.wait(number + 1)[number].ack()
        assert inbox.bodies == [0, 1, 2]

    def test_the_url_is_shown_without_its_password(self) -> None:
        connection = Connection("kathikon+postgresql+psycopg://app:secret@db:5432/jobs")
        assert connection.as_uri() == "kathikon+postgresql+psycopg://app:***@db:5432/jobs"
        assert "secret" not in repr(connection)


class TestSimple:
    def test_a_queue_between_processes(
        self, connection: Connection, peer: Callable[..., Any], url: str, name: str
    ) -> None:
        with connection.SimpleQueue(name) as simple:
            with pytest.raises(simple.Empty):
                simple.get_nowait()
            with pytest.raises(simple.Empty):
                simple.get(timeout=0.05)
            simple.put({"n": 1}, priority=1)
            simple.put({"n": 2}, priority=2)
            got = [simple.get(timeout=TIMEOUT), simple.get(timeout=TIMEOUT)]
            assert sorted(message.payload["n"] for message in got) == [1, 2]
            for message in got:
                message.ack()
            simple.put({"n": 3})
        assert peer(peers.consume, url, Queue(name, Exchange(name), name), 1) == [{"n": 3}]
        with connection.SimpleQueue(name) as simple:
            for number in range(4):
                simple.put(number)
            assert (simple.qsize(), len(simple)) == (4, 4)
            message = simple.get_nowait()
            assert message.payload == 0
            message.ack()
            assert simple.clear() == 3
            assert simple.qsize() == 0

    def test_a_buffer_is_transient(self, connection: Connection, peer: Callable[..., Any], url: str, name: str) -> None:
        with connection.SimpleBuffer(name) as buffer:
            peer(peers.publish, url, [("x", {"exchange": name, "routing_key": name, "delivery_mode": 1})])
            assert buffer.get(timeout=TIMEOUT).payload == "x"
            buffer.put("y")
            assert buffer.get(timeout=TIMEOUT).payload == "y"
        assert not exists(connection, name)

    def test_a_service_of_another_process_answers(self, connection: Connection, url: str, name: str) -> None:
        service = SPAWN.Process(target=peers.serve, args=(url, Queue(name)), daemon=True)
        service.start()
        try:
            replies = Queue(f"{name} replies", exclusive=True, auto_delete=True)
            inbox = Inbox(connection, replies, no_ack=True)
            for number in range(10):
                send(connection, Queue(name), number, reply_to=replies.name, correlation_id=f"c{number}")
            answers = {one.properties["correlation_id"]: one.decode() for one in inbox.wait(10)}
            assert answers == {f"c{number}": number * 2 for number in range(10)}
            send(connection, Queue(name), None)
            service.join(TIMEOUT)
            assert service.exitcode == 0
        finally:
            service.kill()
            service.join()
            service.close()


class TestPayloads:
    def test_every_serializer_and_compression(
        self, connection: Connection, peer: Callable[..., Any], url: str, queue: Queue
    ) -> None:
        known = serialization.registry._encoders  # kombu names msgpack also where it is not installed
        serializers = [one for one in ("json", "pickle", "yaml", "msgpack") if one in known and find_spec(one)]
        combinations = list(product(serializers, [None, *compression.encoders()], BODIES))
        assert {("json", None, "text"), ("pickle", "application/x-gzip", "text")} <= set(combinations)
        peer(
            peers.publish,
            url,
            [
                (BODIES[body], {"routing_key": queue.name, "serializer": serializer, "compression": method})
                for serializer, method, body in combinations
            ],
        )
        inbox = Inbox(connection, queue, accept=serializers, no_ack=True)
        for combination, message in zip(combinations, inbox.wait(len(combinations)), strict=True):
            assert message.decode() == BODIES[combination[2]], combination

    def test_binary(self, connection: Connection, peer: Callable[..., Any], url: str, queue: Queue) -> None:
        bodies = [bytes(range(256)), b"", b"\0", b"\xff" * 100_000]
        binary = {"content_type": "application/octet-stream", "content_encoding": "binary"}
        peer(peers.publish, url, [(body, {"routing_key": queue.name, **binary}) for body in bodies])
        inbox = Inbox(connection, queue, no_ack=True)
        assert [bytes(message.body or b"") for message in inbox.wait(len(bodies))] == bodies
        assert {message.content_type for message in inbox.messages} == {"application/octet-stream"}

    def test_what_the_consumer_does_not_accept_is_not_decoded(self, connection: Connection, queue: Queue) -> None:
        send(connection, queue, {1, 2}, serializer="pickle")
        message = queue(connection.default_channel).get(accept=["json"])
        with pytest.raises(ContentDisallowed):
            message.decode()
        message.reject()

    def test_headers_and_properties_arrive(
        self, connection: Connection, peer: Callable[..., Any], url: str, queue: Queue
    ) -> None:
        properties = {
            "correlation_id": "c\u00e9", "reply_to": "r", "message_id": "m", "type": "t", "app_id": "a",
            "user_id": "u", "timestamp": 1_700_000_000,
        }  # fmt: skip
        headers = {"x-h\u00e9": ["\U0001f600", None, 1.5, {"deep": True}]}
        peer(peers.publish, url, [("x", {"routing_key": queue.name, "headers": headers, **properties})])
        message = queue(connection.default_channel).get()
        assert message.headers == headers
        assert {name: message.properties[name] for name in properties} == properties
        message.ack()

    @pytest.mark.parametrize(
        "text",
        ["a" * 3000, "ключ с пробелом", "\U0001f600\u200d", "nul\0inside", "half \ud800 a pair", "\"q'%s:x#*", " "],
        ids=lambda text: ascii(text[:12]),
    )
    def test_names_of_any_length_and_alphabet(
        self, connection: Connection, peer: Callable[..., Any], url: str, name: str, text: str
    ) -> None:
        full = f"{text}{name}"
        for kind in ("direct", "fanout"):
            exchange = Exchange(f"{full} {kind}", kind)
            queue = Queue(f"{full} {kind} queue", exchange, full)
            queue(connection.default_channel).declare()
            peer(peers.publish, url, [(kind, {"exchange": exchange.name, "routing_key": full})])
            message = queue(connection.default_channel).get()
            assert message.decode() == kind
            assert message.delivery_info["exchange"] == exchange.name
            assert message.delivery_info["routing_key"] == full
            message.ack()
        assert (f"{full} direct queue", f"{full} direct", full) in list(connection.default_channel.list_bindings())
