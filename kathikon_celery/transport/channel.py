"""The kombu channel: exchanges, queues and bindings in tables, consumers on the connection's intake."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqp.protocol import queue_declare_ok_t
from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.utils.uuid import uuid

from kathikon_celery.job import State
from kathikon_celery.storage import insert, messages, prune, topology
from kathikon_celery.storage.names import key
from kathikon_celery.transport import republishing
from kathikon_celery.transport.delivery import BACK, Delivery, Outcome, Verdict
from kathikon_celery.transport.envelope import fold, priority_of, task_of, to_job, unfold

if TYPE_CHECKING:
    from kathikon_celery.transport.intake import Intake
    from kathikon_celery.transport.transport import Transport

REJECTED = Outcome(Verdict.ENDED, State.DISCARDED, "rejected")


class Delivered(virtual.Message):
    """A message that knows the delivery it came by."""

    delivery: Delivery


class QoS:
    """The channel's prefetch limit. What is in hand is counted by the intake."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.prefetch_count = 0

    def limit(self) -> int:
        """Deliveries that may be in hand; 0 is no limit."""
        return self.prefetch_count

    def can_consume(self) -> bool:
        """Whether one more delivery is allowed."""
        return not self.prefetch_count or len(self.channel.unacknowledged) < self.prefetch_count


class Channel(virtual.Channel):
    """One channel of a connection."""

    Message = Delivered
    closed: bool
    supports_fanout = True
    body_encoding = None
    min_priority, max_priority = -(2**63), 2**63 - 1

    connection: Transport

    def __init__(self, connection: Transport, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._storage = connection.storage
        self._database = connection.storage.database
        self._intake = connection.intake
        self._limit = QoS(self)
        #: Tags of the deliveries that this channel has handed out.
        self.unacknowledged: set[str] = set()
        self._auto_delete: set[str] = set()

    @property
    def intake(self) -> Intake:
        """What claims for this channel; it outlives the channel while the pool holds what it has claimed."""
        return self._intake

    @property
    def qos(self) -> QoS:
        """The prefetch limit."""
        return self._limit

    # --- exchanges, queues, bindings

    def exchange_declare(
        self, exchange: str | None = None, type: str = "direct", durable: bool = False, auto_delete: bool = False,  # noqa: A002
        arguments: dict[str, Any] | None = None, nowait: bool = False, passive: bool = False,
    ) -> None:  # fmt: skip
        """Make the exchange unless it exists. Raises `ChannelError` for an unknown type or a different one."""
        kind = type or "direct"
        name = exchange or f"amq.{kind}"
        if passive:
            with self._database.read() as connection:
                if topology.exchange_type(connection, name) is None:
                    raise ChannelError(f"NOT_FOUND - no exchange {name!r}", (50, 10), "Channel.exchange_declare", "404")
            return
        if kind not in self.exchange_types:
            allowed = ", ".join(sorted(self.exchange_types))
            raise ChannelError(f"exchange {name!r} has the type {kind!r}; Kathikon has {allowed}")
        if (name, kind) in self.connection.declared:
            return
        there = topology.declare_exchange(self._database, name, kind)
        if there != kind:
            raise ChannelError(f"exchange {name!r} exists with the type {there!r}; it cannot be declared as {kind!r}")
        self.connection.declared.add((name, kind))

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Delete the exchange and its bindings."""
        self.connection.declared.clear()
        topology.delete_exchange(self._database, exchange)

    def queue_declare(
        self, queue: str | None = None, passive: bool = False, durable: bool = True, exclusive: bool = False,
        auto_delete: bool = False, arguments: dict[str, Any] | None = None, nowait: bool = False, **kwargs: Any,
    ) -> queue_declare_ok_t:  # fmt: skip
        """Make the queue unless it exists; its name, the number of messages that are ready in it, and 0."""
        name = queue or f"amq.gen-{uuid()}"
        if passive:
            with self._database.read() as connection:
                if not topology.queue_exists(connection, name):
                    raise ChannelError(f"NOT_FOUND - no queue {name!r}", (50, 10), "Channel.queue_declare", "404")
        else:
            options = arguments or {}
            expires, ttl = options.get("x-expires"), options.get("x-message-ttl")
            topology.declare_queue(
                self._database,
                name,
                durable=durable,
                auto_delete=auto_delete or exclusive,
                expires=expires / 1000 if expires is not None else None,
                message_ttl=ttl / 1000 if ttl is not None else None,
            )
            if auto_delete or exclusive:
                self._auto_delete.add(name)
        return queue_declare_ok_t(name, 0 if nowait else self._size(name), 0)

    def prepare_queue_arguments(self, arguments: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Queue options of kombu (``expires``, ``message_ttl``, seconds) as AMQP's arguments (milliseconds)."""
        names = {"expires": "x-expires", "message_ttl": "x-message-ttl"}
        found = {names[name]: int(kwargs[name] * 1000) for name in names if kwargs.get(name) is not None}
        return {**(arguments or {}), **found}

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> None:
        """Delete the queue, its bindings and its messages. Jobs stay in the table: `queue_purge` deletes them."""
        if if_empty and self._size(queue):
            return
        with self._database.write() as connection:
            topology.delete_queue(connection, key(queue))

    def queue_bind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **kwargs: Any
    ) -> None:
        """Bind the queue to the exchange."""
        topology.bind(self._database, queue, exchange or "amq.direct", routing_key or "")

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **kwargs: Any
    ) -> None:
        """Undo `queue_bind`."""
        topology.unbind(self._database, queue, exchange or "amq.direct", routing_key or "")

    def list_bindings(self) -> list[tuple[str, str, str]]:
        """Queue, exchange and routing key of every binding."""
        with self._database.read() as connection:
            return topology.all_bindings(connection)

    def queue_purge(self, queue: str, **kwargs: Any) -> int:
        """Delete what waits in the queue; the number of it."""
        with self._database.write(durable=True) as connection:
            return messages.purge(connection, key(queue)) + prune.purge(connection, key(queue))

    def _size(self, queue: str) -> int:
        with self._database.read() as connection:
            return messages.size(connection, key(queue))

    # --- publishing

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any) -> None:
        """Publish a message: a Celery task becomes a job, anything else a message. It is on disk when this returns."""
        message["properties"].setdefault("delivery_info", {}).update(exchange=exchange, routing_key=routing_key)
        queues = self._route(exchange, routing_key) if exchange else [routing_key]
        task = task_of(message)
        if task is None:
            self._put(queues, message)
            return
        if not queues:
            raise ChannelError(
                f"task {task['task']} was sent to exchange {exchange!r} with routing key {routing_key!r}, to which no"
                " queue is bound; bind one, or send it to a queue"
            )
        if len(queues) > 1:  # one row an id: a task that several queues shall have is as many messages
            self._put(queues, message)
            return
        settings = self._storage.settings
        job = to_job(message, task, queues[0], settings.max_attempts, self.connection.local_zone())
        hold = republishing.hold_on(job.id)
        if not insert.insert(self._database, job, hold, soon=republishing.is_soon(job, settings.scheduler_interval)):
            republishing.refused(job.id)

    def _put(self, queues: list[str], message: dict[str, Any], **kwargs: Any) -> None:
        if not queues:
            return
        envelope, body = fold(message)
        properties = message["properties"]
        expiration = properties.get("expiration")
        try:
            messages.put(
                self._database,
                queues,
                envelope,
                body,
                priority=priority_of(message),
                ttl=float(expiration) / 1000 if expiration not in (None, "") else None,
                durable=properties.get("delivery_mode") != 1,
            )
        except Exception as error:
            if properties.get("delivery_mode") != 1 or not self.connection.is_worker:
                raise
            self.connection.lost_transient(error)

    def _route(self, exchange: str, routing_key: str) -> list[str]:
        with self._database.read() as connection:
            kind = topology.exchange_type(connection, exchange) or "direct"
            bound = topology.bound(connection, exchange)
        rules = self.exchange_types[kind]
        table = [rules.prepare_bind(queue, exchange, bound_key, None) for queue, bound_key in bound]
        return sorted(rules.lookup(table, exchange, routing_key, None))

    # --- consuming

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Delivered], Any], consumer_tag: str, **kwargs: Any
    ) -> None:
        """Deliver what comes into the queue to *callback*."""
        self._tag_to_queue[consumer_tag] = queue
        self._consumers.add(consumer_tag)
        self._active_queues.append(queue)

        def deliver(delivery: Delivery) -> None:
            message = self._message(delivery, no_ack)
            if message is not None:
                callback(message)

        self._intake.subscribe(queue, no_ack, deliver, self._limit.limit)
        if queue in self._auto_delete:
            topology.own_queue(self._database, queue, self._intake.presence.id)

    def _message(self, delivery: Delivery, no_ack: bool) -> Delivered | None:
        item = delivery.item
        try:
            again = item.crashes > 0 or item.attempts > 1 if delivery.is_job else item.redelivered  # type: ignore[union-attr]
            message = Delivered(unfold(item.envelope, item.body, delivery.tag, again), channel=self)
        except Exception as error:
            self._intake.finish(delivery.tag, Outcome(Verdict.ENDED, State.DEAD, str(error)))
            self.connection.corrupt(delivery, error)
            return None
        message.delivery = delivery
        if no_ack:
            self._intake.finish(delivery.tag)
        else:
            self.unacknowledged.add(delivery.tag)
        return message

    def basic_cancel(self, consumer_tag: str) -> None:
        """Consume no longer; an auto-delete queue goes."""
        if consumer_tag not in self._consumers:
            return
        self._consumers.remove(consumer_tag)
        queue = self._tag_to_queue.pop(consumer_tag)
        self._active_queues.remove(queue)
        self._intake.unsubscribe(queue)
        if queue in self._auto_delete:
            self._auto_delete.discard(queue)
            self.queue_delete(queue)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Delivered | None:
        """The next message of the queue, or `None`."""
        delivery = self._intake.take_one(queue, no_ack)
        return None if delivery is None else self._message(delivery, no_ack)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Acknowledge. It is written with the next batch; a lost connection in between loses nothing."""
        self.unacknowledged.discard(delivery_tag)
        self._intake.acknowledge(delivery_tag)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Reject, for good or so that somebody gets it again."""
        self.unacknowledged.discard(delivery_tag)
        intake = self._intake
        delivery = intake.delivery(delivery_tag)
        if delivery is not None:
            decided = delivery.outcome
            if decided.verdict is Verdict.DONE or (requeue and decided.verdict is Verdict.ENDED):
                decided = BACK if requeue else REJECTED
            intake.finish(delivery_tag, decided)

    def basic_recover(self, requeue: bool = False) -> None:
        """Give back everything that is not acknowledged."""
        for tag in list(self.unacknowledged):
            self.basic_reject(tag, requeue=True)

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:
        """How many deliveries this channel may have in hand; 0 is no limit."""
        self._limit.prefetch_count = prefetch_count
        self._intake.look()

    def drain_events(self, timeout: float | None = None, callback: Any = None) -> None:
        """Deliver one message; raises `socket.timeout` when none came in time."""
        self.connection.drain_events(self.connection, timeout=timeout)

    def close(self) -> None:
        """Cancel the consumers and give back what is not acknowledged and not in the pool's hands."""
        if self.closed:
            return
        self.closed = True
        transport = self.connection
        for tag in list(self._consumers):
            self.basic_cancel(tag)
        for tag in self.unacknowledged:
            delivery = self._intake.delivery(tag)
            if delivery is not None and not self._intake.is_in_pool(delivery):
                self._intake.finish(tag, BACK)
        transport.close_channel(self)
