"""What another process does with a broker through plain kombu, without a Celery app."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any

from kombu import Connection, Consumer, Message, Queue
from kombu.mixins import ConsumerProducerMixin

import kathikon_celery  # noqa: F401  (teaches kombu the transport)

#: Seconds to wait for a message.
TIMEOUT = 50.0


def publish(url: str, messages: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
    """Publish each body with its options."""
    with Connection(url) as connection:
        producer = connection.Producer()
        for body, options in messages:
            producer.publish(body, **options)


def consume(url: str, queue: Queue, count: int, **options: Any) -> list[Any]:
    """Take and acknowledge *count* messages of a queue; return their bodies, in the order in which they came."""
    bodies: list[Any] = []

    def received(body: Any, message: Message) -> None:
        bodies.append(body)
        if not message.acknowledged:
            message.ack()

    with Connection(url) as connection, connection.Consumer(queue, callbacks=[received], **options):
        while len(bodies) < count:
            connection.drain_events(timeout=TIMEOUT)
    return bodies


def ready(url: str, name: str) -> int:
    """The number of messages that are ready in a queue."""
    with Connection(url) as connection:
        return connection.default_channel.queue_declare(name, passive=True).message_count  # type: ignore[no-any-return]


def hold(url: str, queue: Queue, count: int, pipe: Pipe, prefetch: int = 0) -> None:
    """Take *count* messages, send their bodies to the pipe, and hold them until the pipe answers; then close."""
    bodies: list[Any] = []
    with Connection(url) as connection:
        consumer = connection.Consumer(
            queue, on_message=lambda message: bodies.append(message.decode()), prefetch_count=prefetch or None
        )
        with consumer:
            while len(bodies) < count:
                connection.drain_events(timeout=TIMEOUT)
            pipe.send(bodies)
            pipe.recv()


class Doubler(ConsumerProducerMixin):
    """A service that answers each number with its double; ``None`` ends it."""

    def __init__(self, connection: Connection, queue: Queue) -> None:
        self.connection = connection
        self.queue = queue

    def get_consumers(self, consumer: type[Consumer], channel: Any) -> Sequence[Consumer]:
        return [consumer(queues=[self.queue], on_message=self.answer, prefetch_count=1)]

    def answer(self, message: Message) -> None:
        number = message.decode()
        if number is None:
            self.should_stop = True
        else:
            properties = message.properties
            self.producer.publish(
                number * 2, routing_key=properties["reply_to"], correlation_id=properties["correlation_id"], retry=True
            )
        message.ack()


def serve(url: str, queue: Queue) -> None:
    """Run a `Doubler` until it is told to end."""
    with Connection(url, heartbeat=4) as connection:
        Doubler(connection, queue).run()


def freeze_handlers() -> None:
    """Ctrl-C is for the tests, which then end their processes themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
