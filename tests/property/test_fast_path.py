"""What `Sender` writes is what Celery would have written, to the last field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, Task
from celery.utils.saferepr import saferepr
from hypothesis import given
from hypothesis import strategies as st
from kombu import serialization
from kombu.exceptions import EncodeError

from kathikon_celery.job import Job
from kathikon_celery.publish import fast_path
from kathikon_celery.publish.envelope import dumps_call
from kathikon_celery.publish.fast_path import _simple_repr
from kathikon_celery.routing import Router
from kathikon_celery.storage import Storage
from tests.property.test_envelope import json_values
from tests.support import apps

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
#: Long enough, some of them, for `saferepr` to cut.
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | text | st.text("ab'\\\n", min_size=900, max_size=1100)
)
arguments = st.lists(json_values | scalars, max_size=4)
ids = st.none() | st.uuids().map(str)
calls = st.fixed_dictionaries(
    {
        "args": arguments.map(tuple) | arguments | st.none(),
        "kwargs": st.none() | st.dictionaries(text, json_values, max_size=3),
    },
    optional={
        "task_id": ids,
        "queue": st.sampled_from([None, "default", "urgent", "other"]),
        "priority": st.none() | st.integers(-3, 10),
        "serializer": st.sampled_from([None, "json", "pickle", "yaml"]),
        "time_limit": st.none() | st.integers(1, 9) | st.decimals(1, 9, places=1),  # kombu has a notation for these
        "soft_time_limit": st.none() | st.integers(1, 9),
        "ignore_result": st.none() | st.booleans() | st.sampled_from([0, 1]),
        "shadow": st.none() | text | st.lists(text, max_size=1),  # a list cannot be looked up
        "group_id": ids,
        "group_index": st.none() | st.integers(0, 9),
        "root_id": ids,
        "parent_id": ids,
        "add_to_parent": st.booleans(),
    },
)


#: The task that sends, as its worker knows it.
senders = st.none() | st.fixed_dictionaries(
    {"id": st.just("sender"), "root_id": st.sampled_from([None, "root", "one"])}
)

NAMES = ["plain", "routed", "mapped", "ignored"]


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """All that the tasks do."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Celery]:
    """An app that has sent each of its tasks to each of its queues."""
    folder: Path = tmp_path_factory.mktemp("sending")
    queues = {"default": {}, "urgent": {"tasks": ["routed"]}, "other": {}}
    conf = {"kathikon_queues": queues, "task_routes": [{"mapped": {"queue": "other"}}, Router()]}
    app = apps.create_app("sending", kathikon_database_url=f"sqlite:///{folder}/k.db", **conf)
    for name in NAMES:
        app.task(name=name, ignore_result=name == "ignored", typing=False, shared=False)(do_nothing)
    for task in NAMES:
        for queue in (None, "default", "urgent", "other"):
            for _ in range(2):  # the first of all makes the connection
                app.tasks[task].apply_async(queue=queue)
    yield app
    Storage.for_app(app).close()


def sent_by(app: Celery, sender: dict[str, Any] | None) -> AbstractContextManager[list[Any]]:
    return nullcontext([]) if sender is None else apps.running(app.tasks["plain"], **sender)


def sent_job(app: Celery, send: Callable[..., Any], task: Task, call: dict[str, Any]) -> Job:
    storage = Storage.for_app(app)
    storage.clear_jobs()
    options = dict(call)
    result = send(task.name, options.pop("args"), options.pop("kwargs"), task_type=task, **options)
    assert "ignore_result" not in call or result.ignored == call["ignore_result"]
    (job,) = storage.all()
    assert result.id == job.id
    return replace(job, seq=0, fence=0, inserted_at=None, available_at=None, envelope=json.loads(job.envelope))


@given(calls, st.sampled_from(NAMES), senders)
def test_the_row_is_celerys(app: Celery, call: dict[str, Any], name: str, sender: dict[str, Any] | None) -> None:
    task = app.tasks[name]
    call["task_id"] = call.get("task_id") or "one"
    publications = []
    publish = fast_path.publish_new
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_path, "publish_new", lambda *args: publications.append(args) or publish(*args))
        with sent_by(app, sender) as our_children:
            ours = sent_job(app, app.send_task, task, call)
    assert len(publications) == 1  # it was not left to Celery
    with sent_by(app, sender) as celerys_children:
        celerys = sent_job(app, lambda *args, **options: Celery.send_task(app, *args, **options), task, call)
    assert ours == celerys
    assert our_children == celerys_children


@given(
    st.lists(json_values | scalars | st.datetimes() | st.uuids() | st.decimals() | st.binary(max_size=3), max_size=3),
    st.dictionaries(text | st.integers(), json_values | st.dates(), max_size=2),
    st.sampled_from(["json", "pickle"]),
)
def test_the_short_way_of_writing_a_call_is_kombus(args: list[Any], kwargs: dict[Any, Any], serializer: str) -> None:
    call = args, kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    assert dumps_call(args, kwargs, serializer) == serialization.dumps(call, serializer)


def test_a_writer_of_json_of_ones_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    own = serialization.codec("application/json", "utf-8", lambda value: f"own {value[0]}")
    monkeypatch.setitem(serialization.registry._encoders, "json", own)
    assert dumps_call((1,), {}, "json") == ("application/json", "utf-8", "own (1,)")


def test_what_cannot_be_written_is_kombus_error() -> None:
    with pytest.raises(EncodeError):
        dumps_call((object(),), {}, "json")


@given(st.binary(min_size=16, max_size=16))
def test_a_new_id_is_a_random_uuid(random: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_path.os, "urandom", lambda size: random[:size])
        assert fast_path.new_id() == str(UUID(bytes=random, version=4))


@given(st.lists(scalars, max_size=5), st.integers(1, 40) | st.just(1024), st.booleans())
def test_the_short_way_of_showing_arguments_is_celerys(values: list[Any], longest: int, as_tuple: bool) -> None:
    args = tuple(values) if as_tuple else values
    shown = _simple_repr(args, longest)
    assert shown is None or shown == saferepr(args, longest)
