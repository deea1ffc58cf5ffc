"""What a worker makes of a message before its pool has it."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import kombu.message
import pytest
from celery import Celery

from kathikon_celery.transport.channel import Delivered
from kathikon_celery.worker.request import Request
from tests.support import apps

NOW = datetime.now(timezone.utc)


def received(client: Celery) -> Delivered:
    with client.connection_for_read() as connection:
        message = connection.default_channel.basic_get("default")
    message.accept = {"application/json"}
    return message


def request_of(client: Celery, message: Delivered) -> Request:
    options = {"body": message.body, "decoded": False}  # as Celery's strategy makes one
    return Request(message, app=client, task=apps.add, headers=message.headers, **options)


def test_a_plain_body_is_read_for_the_pool_and_not_by_kombu(client: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("read by kombu")

    apps.add.delay([1], y=2)
    message = received(client)
    monkeypatch.setattr(kombu.message, "loads", loads)
    request = request_of(client, message)
    assert (request.args, request.kwargs) == ([[1]], {"y": 2})
    assert request.body == message.payload
    assert not request.content_type  # to Celery's tracer that says that it is read


def test_the_pool_has_arguments_of_its_own(client: Celery) -> None:
    """What a task changes is not shown as its arguments; what a receiver of `task_received` hides the task sees."""
    apps.add.delay([1], y=2)
    request = request_of(client, received(client))
    args, kwargs, _ = request.body
    args[0].append(object())
    request.kwargs["y"] = "***"
    assert request.args == [[1]]
    assert kwargs == {"y": 2}


@pytest.mark.parametrize("x", [NOW, "x" * 5000], ids=["moment", "long"])
def test_what_is_not_easily_read_is_left_to_the_pool(client: Celery, x: Any) -> None:
    apps.add.delay(x, 1)
    message = received(client)
    request = request_of(client, message)
    assert (request.body, request.content_type) == (message.body, "application/json")


@pytest.mark.parametrize(
    "x", ["", "wört \U0001f600", NOW, [[NOW], {}], "x" * 300_000], ids=["empty", "text", "moment", "nested", "long"]
)
def test_what_is_read_is_what_was_sent(client: Celery, x: Any) -> None:
    apps.add.delay(x, 1)
    assert request_of(client, received(client)).args == [x, 1]
