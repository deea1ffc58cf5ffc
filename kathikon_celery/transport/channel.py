"""The kombu channel: exchanges, queues and bindings in tables, consumers on the connection's intake."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from amqp.protocol import queue_declare_ok_t
from kombu.exceptions import ChannelError, ContentDisallowed, DecodeError
from kombu.serialization import registry
from kombu.transport import virtual
from kombu.utils import json as kombu_json
from kombu.utils.uuid import uuid
from sqlalchemy import Connection

from kathikon_celery.consume.delivery import BACK, Delivery, Outcome, Verdict
from kathikon_celery.job import Cause, State, in_brief
from kathikon_celery.publish import callers, outbox
from kathikon_celery.publish.destination import publish
from kathikon_celery.publish.enqueue_in import enqueue_in
from kathikon_celery.publish.envelope import check_call, fold, loads, priority_of, task_of, to_job, unfold
from kathikon_celery.publish.limiting import mark
from kathikon_celery.publish.unconsumed import watch
from kathikon_celery.results.carrier import CARRIED
from kathikon_celery.storage import Storage, messages, prune, topology
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key
from kathikon_celery.transport.exchanges import TopicExchange
from kathikon_celery.transport.revocations import write_first

if TYPE_CHECKING:
    from kathikon_celery.consume.intake import Intake
    from kathikon_celery.transport.transport import Transport

T = TypeVar("T")

JSON = "application/json"
#: Largest body, in bytes, that the worker's main process decodes itself; larger ones are left to the pool.
EASY = 4096
REJECTED = Outcome(Verdict.ENDED, State.DISCARDED, Cause.REJECTED, "rejected")


class Delivered(virtual.Message):
    """A message that knows the delivery it came by."""

    delivery: Delivery

    def _decode(self) -> Any:
        if self.is_plain_json():
            with suppress(ValueError):  # kombu's reader says what is wrong
                return loads(self.body.decode())
        return super()._decode()

    def is_read_easily(self) -> bool:
        """Whether the body is quick to decode, and its values can go through a pipe as they are."""
        return self.is_plain_json() and len(self.body) <= EASY and b'"__type__"' not in self.body

    def is_plain_json(self) -> bool:
        """Whether kombu would decode the body by its own JSON reader."""
        return (
            self.content_type == JSON
            and self.content_encoding == "utf-8"
            and type(self.body) is bytes  # kombu has encoded the text
            and self.body != b""
            and self.accept is not None
            and JSON in self.accept
            and registry._decoders.get(JSON) is kombu_json.loads
        )

    def decode(self) -> Any:
        """Return the decoded body. Raises `DecodeError` or `ContentDisallowed`: then the job ends as dead."""
        try:
            payload = super().decode()
            if self.delivery.is_job:
                check_call(self.headers, payload)
        except Exception as error:
            self.is_unreadable(error)
            if isinstance(error, DecodeError | ContentDisallowed):
                raise
            raise DecodeError(str(error)) from error  # anything else would end Celery's worker
        return payload

    def is_unreadable(self, error: BaseException) -> None:
        """Note *error* as the reason why the job is dead: its body cannot be decoded."""
        kind = "" if isinstance(error, DecodeError) else f"{type(error).__name__}: "
        if self.delivery.is_job:
            reason = in_brief(f"corrupt row: the body cannot be read: {kind}{error}")
            self.delivery.outcome = Outcome(Verdict.ENDED, State.DEAD, Cause.UNREADABLE, reason)


class QoS:
    """The channel's prefetch limit. The intake counts the deliveries in hand."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.prefetch_count = 0

    def limit(self) -> int:
        """Deliveries that may be in hand; 0 is no limit."""
        return self.prefetch_count

    def can_consume(self) -> bool:
        return not self.prefetch_count or len(self.channel.unacknowledged) < self.prefetch_count


class Channel(virtual.Channel):
    """One channel of a connection."""

    Message = Delivered
    closed: bool
    supports_fanout = True
    body_encoding = None
    min_priority, max_priority = -(2**63), 2**63 - 1
    exchange_types: ClassVar[dict[str, Any]] = {**virtual.Channel.exchange_types, "topic": TopicExchange}

    connection: Transport

    def __init__(self, connection: Transport, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        #: As `connection`, which kombu sets to None when it closes the channel: a publisher may still have the channel.
        self._transport = connection
        self._storage = connection.storage
        self._database = connection.storage.database
        self._intake = connection.intake
        self._limit = QoS(self)
        #: By their names, queues and what they are when bound to this channel.
        self.bound: dict[str, tuple[Any, Any]] = {}
        #: Tags of the deliveries that this channel has handed out.
        self.unacknowledged: set[str] = set()
        #: A delivery was given back, and perhaps that is not written yet.
        self._has_returned = False
        #: Queues declared on this channel that are deleted with their consumer, or after some time without use.
        self._auto_delete: set[str] = set()
        self._expiring: set[str] = set()

    @property
    def storage(self) -> Storage:
        return self._storage

    @property
    def intake(self) -> Intake:
        """What claims for this channel; it outlives the channel while the pool holds what it has claimed."""
        return self._intake

    @property
    def qos(self) -> QoS:
        return self._limit

    def _tried(self, call: Callable[[], T]) -> T:
        """Return *call*(), called once more if its connection was lost: so it may run twice."""
        return self._database.patiently(lambda again: call(), patient=False)

    # --- exchanges, queues, bindings

    def _declared(self, is_there: Callable[[Connection], bool], declare: Callable[[Database], Any]) -> None:
        """Run *declare*; a database with one writer, whose turn the caller's open transaction has, runs it in there."""
        caller = callers.current()
        if caller is None or not self._database.dialect.has_one_writer or not caller.is_at_home(self._storage):
            self._tried(lambda: declare(self._database))
        elif not self._tried(lambda: self._read(is_there)):
            caller.write(self._storage, lambda there: declare(there.database))

    def _read(self, read: Callable[[Connection], T]) -> T:
        with self._database.read() as connection:
            return read(connection)

    def exchange_declare(
        self, exchange: str | None = None, type: str = "direct", durable: bool = False, auto_delete: bool = False,  # noqa: A002
        arguments: dict[str, Any] | None = None, nowait: bool = False, passive: bool = False,
    ) -> None:  # fmt: skip
        """Create the exchange unless it exists. Raises `ChannelError` for an unknown type or a different one."""
        kind = type or "direct"
        name = exchange or f"amq.{kind}"
        if passive:
            if self._exchange_type(name) is None:
                raise ChannelError(f"NOT_FOUND - no exchange {name!r}", (50, 10), "Channel.exchange_declare", "404")
            return
        if kind not in self.exchange_types:
            allowed = ", ".join(sorted(self.exchange_types))
            raise ChannelError(f"exchange {name!r} has the type {kind!r}; Kathikon has {allowed}")
        there = self._exchange_type(name)
        if there is None:
            self._declared(lambda _: False, lambda database: topology.declare_exchange(database, name, kind))
            there = self._exchange_type(name) or kind
        if there != kind:
            raise ChannelError(f"exchange {name!r} exists with the type {there!r}; it cannot be declared as {kind!r}")

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Delete the exchange and its bindings."""
        self._tried(lambda: topology.delete_exchange(self._database, exchange))

    def _exchange_type(self, name: str) -> str | None:
        def read() -> str | None:
            with self._database.read() as connection:
                return topology.exchange_type(connection, name)

        return self._tried(read)

    def queue_declare(
        self, queue: str | None = None, passive: bool = False, durable: bool = True, exclusive: bool = False,
        auto_delete: bool = False, arguments: dict[str, Any] | None = None, nowait: bool = False, **kwargs: Any,
    ) -> queue_declare_ok_t:  # fmt: skip
        """Create the queue unless it exists; return its name, the number of messages that are ready in it, and 0."""
        name = queue or f"amq.gen-{uuid()}"
        if passive:
            if not self._queue_exists(name):
                raise ChannelError(f"NOT_FOUND - no queue {name!r}", (50, 10), "Channel.queue_declare", "404")
        else:
            options = arguments or {}
            expires, ttl = options.get("x-expires"), options.get("x-message-ttl")
            self._declared(
                lambda connection: topology.queue_exists(connection, name),
                lambda database: topology.declare_queue(
                    database,
                    name,
                    durable=durable,
                    auto_delete=auto_delete or exclusive,
                    expires=expires / 1000 if expires is not None else None,
                    message_ttl=ttl / 1000 if ttl is not None else None,
                ),
            )
            if auto_delete:
                self._auto_delete.add(name)
            if exclusive:
                self._transport.exclusive.add(name)
                self._intake.start()  # become a node: when a node dies, its exclusive queues are deleted
                self._own(name, True)
            elif expires is not None:
                self._expiring.add(name)
        return queue_declare_ok_t(name, 0 if nowait else self._size(name), 0)

    def _queue_exists(self, name: str) -> bool:
        def read() -> bool:
            with self._database.read() as connection:
                return topology.queue_exists(connection, name)

        return self._tried(read)

    def _own(self, queue: str, used: bool) -> None:
        """Note that this process uses the queue, or no longer uses it."""
        node_id = self._intake.own_node.id if used else None
        self._tried(lambda: topology.own_queue(self._database, queue, node_id))

    def prepare_queue_arguments(self, arguments: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Queue options of kombu (``expires``, ``message_ttl``, seconds) as AMQP's arguments (milliseconds)."""
        names = {"expires": "x-expires", "message_ttl": "x-message-ttl"}
        found = {names[name]: int(kwargs[name] * 1000) for name in names if kwargs.get(name) is not None}
        return {**(arguments or {}), **found}

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> None:
        """Delete the queue, its bindings and its messages. Jobs stay in the table: `queue_purge` deletes them."""
        if if_empty and self._size(queue):
            return

        def delete() -> None:
            with self._database.write() as connection:
                topology.delete_queue(connection, key(queue))

        self._tried(delete)

    def queue_bind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **kwargs: Any
    ) -> None:
        place = exchange or "amq.direct"
        self._declared(
            lambda connection: (queue, routing_key or "") in topology.bound(connection, place),
            lambda database: topology.bind(database, queue, place, routing_key or ""),
        )

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **kwargs: Any
    ) -> None:
        """Undo `queue_bind`."""
        self._tried(lambda: topology.unbind(self._database, queue, exchange or "amq.direct", routing_key or ""))

    def list_bindings(self) -> list[tuple[str, str, str]]:
        """Return queue, exchange and routing key of every binding."""

        def read() -> list[tuple[str, str, str]]:
            with self._database.read() as connection:
                return topology.all_bindings(connection)

        return self._tried(read)

    def queue_purge(self, queue: str, **kwargs: Any) -> int:
        """Delete the messages and jobs that wait in the queue; return their number."""

        self._write_returns()

        def purge() -> int:
            with self._database.write(durable=True) as connection:
                return messages.purge(connection, key(queue)) + prune.purge(connection, key(queue))

        return self._tried(purge)

    def _size(self, queue: str) -> int:
        self._write_returns()

        def read() -> int:
            with self._database.read() as connection:
                return messages.size(connection, key(queue))

        return self._tried(read)

    # --- publishing

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any) -> None:
        """Publish a message: a Celery task as a job, any other as a stored message. It is on disk when this returns."""
        if (transaction := message["properties"].pop("transaction", None)) is not None:
            try:
                with enqueue_in(transaction):
                    self.basic_publish(message, exchange, routing_key, **kwargs)
            except BaseException:
                message["properties"]["transaction"] = transaction  # Celery may publish these properties again
                raise
            return
        message["properties"].setdefault("delivery_info", {}).update(exchange=exchange, routing_key=routing_key)
        queues = self._route(exchange, routing_key) if exchange else [routing_key]
        task = task_of(message)
        if task is None:
            if exchange.endswith(".pidbox"):
                write_first(self._storage, message)
            self._put(queues, message)
            return
        if not queues:
            raise ChannelError(
                f"task {task['task']} was sent to exchange {exchange!r} with routing key {routing_key!r}, to which no"
                " queue is bound; bind one, or send it to a queue"
            )
        if len(queues) > 1:  # a job's id has one row: a task for several queues becomes messages
            # Not with the sending task's end: rather twice than never.
            callers.write(self._storage, lambda there: self._put_now(queues, message, there.database))
            return
        attempts = self._storage.settings.max_attempts
        watch(self._storage, queues[0])
        job = to_job(message, task, queues[0], attempts, self._transport.local_zone())
        if (app := self._transport.app) is not None:
            mark(app, job, message)
        publish(self._storage, job)

    def _put(self, queues: list[str], message: dict[str, Any], **kwargs: Any) -> None:
        if not queues:
            return
        ending = outbox.current(self._database)
        if ending is not None:
            ending.after.append(partial(self._put_now, queues, message))
            return
        self._put_now(queues, message)

    def _put_now(self, queues: list[str], message: dict[str, Any], database: Database | None = None) -> None:
        envelope, body = fold(message)
        properties = message["properties"]
        expiration = properties.get("expiration")
        try:
            messages.put(
                database or self._database,
                queues,
                envelope,
                body,
                priority=priority_of(message),
                ttl=float(expiration) / 1000 if expiration not in (None, "") else None,
                durable=properties.get("delivery_mode") != 1,
            )
        except Exception as error:
            if properties.get("delivery_mode") != 1 or not self._transport.is_worker:
                raise
            self._transport.lost_transient(error)

    def _route(self, exchange: str, routing_key: str) -> list[str]:
        def read() -> tuple[str, list[tuple[str, str]]]:
            with self._database.read() as connection:
                return topology.exchange_type(connection, exchange) or "direct", topology.bound(connection, exchange)

        kind, bound = self._tried(read)
        rules = self.exchange_types[kind]
        table = [rules.prepare_bind(queue, exchange, bound_key, None) for queue, bound_key in bound]
        return sorted(rules.lookup(table, exchange, routing_key, None))

    # --- consuming

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Delivered], Any], consumer_tag: str, **kwargs: Any
    ) -> None:
        """Call *callback* with each message of the queue."""
        self._tag_to_queue[consumer_tag] = queue
        self._consumers.add(consumer_tag)
        self._active_queues.append(queue)

        def deliver(delivery: Delivery) -> None:
            message = self._message(delivery, no_ack)
            if message is not None:
                callback(message)

        self._intake.subscribe(queue, no_ack, deliver, self._limit.limit)
        if queue in self._auto_delete or queue in self._expiring:
            self._own(queue, True)

    def _message(self, delivery: Delivery, no_ack: bool) -> Delivered | None:
        item = delivery.item
        try:
            again = item.attempts > 1 if delivery.is_job else item.redelivered  # type: ignore[union-attr]
            unfolded = unfold(item.envelope, item.body, delivery.tag, again)
            if again and delivery.is_job:  # a retry is a message of its own
                retries = unfolded["headers"].get("retries")
                is_first = isinstance(retries, int) and item.attempts == 1 + retries  # type: ignore[union-attr]
                unfolded["properties"]["delivery_info"]["redelivered"] = not is_first
            unfolded["properties"][CARRIED] = delivery.carried
            message = Delivered(unfolded, channel=self)
        except Exception as error:
            self._intake.finish(
                delivery.tag, Outcome(Verdict.ENDED, State.DEAD, Cause.UNREADABLE, in_brief(str(error)))
            )
            self._transport.corrupt(delivery, error)
            return None
        message.delivery = delivery
        if message.errors:  # of its decompression
            message.is_unreadable(message.errors[0][1])
        if no_ack:
            self._intake.finish(delivery.tag)
        else:
            self.unacknowledged.add(delivery.tag)
        return message

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop consuming; delete an auto-delete queue."""
        if consumer_tag not in self._consumers:
            return
        self._consumers.remove(consumer_tag)
        queue = self._tag_to_queue.pop(consumer_tag)
        self._active_queues.remove(queue)
        self._intake.unsubscribe(queue)
        if queue in self._auto_delete:
            self._auto_delete.discard(queue)
            self.queue_delete(queue)
        elif queue in self._expiring:
            self._own(queue, False)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Delivered | None:
        """Return the next message of the queue, or `None`."""
        self._write_returns()
        delivery = self._tried(lambda: self._intake.take_one(queue, no_ack))
        return None if delivery is None else self._message(delivery, no_ack)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Acknowledge a delivery. The next batch writes that; a lost connection in between loses nothing."""
        self.unacknowledged.discard(delivery_tag)
        self._intake.acknowledge(delivery_tag)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Reject a delivery: discard it, unless its `Delivery.outcome` says more, or with *requeue* give it back."""
        self.unacknowledged.discard(delivery_tag)
        intake = self._intake
        delivery = intake.delivery(delivery_tag)
        if delivery is not None:
            decided = delivery.outcome
            if requeue and delivery.is_silent and delivery.accepted is not None:
                pass  # as with any broker: it was acknowledged before it ran
            elif decided.verdict is Verdict.DONE or (requeue and decided.verdict is Verdict.ENDED):
                decided = BACK if requeue else REJECTED
            self._has_returned = self._has_returned or decided is BACK
            intake.finish(delivery_tag, decided)

    def _write_returns(self) -> None:
        """What this channel has given back is ready for its own next call, as with any broker."""
        if self._has_returned:
            self._has_returned = False
            try:
                self._tried(self._intake.write_returns)
            except BaseException:
                self._has_returned = True
                raise

    def basic_recover(self, requeue: bool = False) -> None:
        """Give back all deliveries that are not acknowledged."""
        for tag in list(self.unacknowledged):
            self.basic_reject(tag, requeue=True)

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:
        """Set how many deliveries this channel may have in hand; 0 is no limit."""
        self._limit.prefetch_count = prefetch_count
        self._intake.look()

    def drain_events(self, timeout: float | None = None, callback: Any = None) -> None:
        """Deliver one message. Raises `TimeoutError` if none comes within *timeout* seconds."""
        self._transport.drain_events(self._transport, timeout=timeout)

    def close(self) -> None:
        """Cancel the consumers, and give back unacknowledged deliveries that the pool does not have."""
        if self.closed:
            return
        self.closed = True
        transport = self._transport
        for tag in list(self._consumers):
            self.basic_cancel(tag)
        for tag in list(self.unacknowledged):
            delivery = self._intake.delivery(tag)
            if delivery is not None and self._intake.pool.lets_go(delivery):
                self._intake.finish(tag, delivery.when_left)
        transport.close_channel(self)
