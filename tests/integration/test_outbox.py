"""What a task sends as it ends, and when it is sent."""

from __future__ import annotations

import pytest
from celery import Celery
from kombu import Exchange, Queue

from kathikon_celery.publish import outbox
from kathikon_celery.storage import Storage
from kathikon_celery.storage.settle import TaskEnd


@pytest.mark.parametrize("queues", [1, 2])
def test_only_what_is_no_job_is_sent_before_the_end(client: Celery, queues: int) -> None:
    exchange = Exchange("news", type="fanout")
    with client.connection_for_write() as connection:
        bound = [Queue(f"queue{number}", exchange)(connection.default_channel) for number in range(queues)]
        for queue in bound:
            queue.declare()
        with outbox.into(Storage.for_app(client).database, TaskEnd()) as ending:
            message = client.amqp.create_task_message("id", "task")
            client.amqp.send_task_message(connection.Producer(), "task", message, exchange="news", routing_key="any")
        assert len(ending.jobs) == (queues == 1)
        assert ending.after == []
        assert [queue.queue_declare(passive=True).message_count for queue in bound] == ([0] if queues == 1 else [1, 1])
