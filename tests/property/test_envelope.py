"""Any message becomes text for a row, and that message again."""

from __future__ import annotations

import json
from copy import deepcopy
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kathikon_celery.job import State
from kathikon_celery.publish.envelope import HIGHEST, LOWEST, _usual, fold, priority_of, task_of, to_job, unfold

UTC = timezone.utc
text = st.text(st.characters(), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)
#: What is not a header of a task: those are read.
free = text.filter(lambda name: name not in ("task", "id", "eta") and not name.startswith("__"))
headers = st.dictionaries(free, json_values, max_size=4)
properties = st.dictionaries(
    st.sampled_from(["correlation_id", "reply_to", "priority", "expiration", "type", "message_id", "app_id"]),
    json_values.filter(lambda value: value not in (None, "") and not isinstance(value, dict)),
    max_size=4,
)
messages = st.fixed_dictionaries(
    {
        "body": st.binary(max_size=60) | text,
        "headers": headers,
        "properties": properties,
        "content-type": st.none() | text,
        "content-encoding": st.none() | text,
    }
)
moments = st.datetimes(datetime(1971, 1, 1), datetime(9000, 1, 1))  # noqa: DTZ001  (the zones come with each)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


def as_bytes(body: Any) -> bytes:
    return body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body


@given(messages, text, st.booleans())
def test_fold_and_unfold(message: dict[str, Any], tag: str, redelivered: bool) -> None:
    before = deepcopy(message)
    envelope, body = fold(message)
    assert message == before
    for kept in (envelope, body):
        kept.encode()
        assert "\0" not in kept
    back = unfold(envelope, body, tag, redelivered)
    assert as_bytes(back["body"]) == as_bytes(before["body"])
    for name in ("headers", "content-type", "content-encoding"):
        assert back[name] == before[name]
    ours = {"delivery_tag": tag, "delivery_info": {"redelivered": redelivered}}
    assert back["properties"] == before["properties"] | ours


#: What is easily taken for what is usual: most of it is equal to something that is.
LIKE_THE_USUAL = [None, 0, 0.0, -0.0, False, True, 1, 2, 2.0, "", "py", "{}", {}, [], [None], [None, None], "one"]
usual = st.builds(_usual, st.just("one"))
changes = st.dictionaries(st.sampled_from([*_usual("")["headers"], "task", "more"]), st.sampled_from(LIKE_THE_USUAL))
of_properties = st.dictionaries(
    st.sampled_from([*_usual("")["properties"], "reply_to", "delivery_info"]), st.sampled_from(LIKE_THE_USUAL[1:-1])
)


@given(usual, changes, of_properties, st.sets(st.sampled_from([*_usual("")["headers"]]), max_size=1), st.booleans())
def test_what_is_usual_comes_back_as_it_was(
    message: dict[str, Any], headers: dict[str, Any], properties: dict[str, Any], lacking: set[str], is_json: bool
) -> None:
    message["headers"] |= {"id": "one", "task": "proj.add", **headers, "eta": None}
    message["headers"] = {name: value for name, value in message["headers"].items() if name not in lacking}
    message["properties"] |= {name: value for name, value in properties.items() if value != ""}
    message["properties"]["delivery_info"] = {"exchange": "", "routing_key": "default"}
    kind = {"content-type": "application/json" if is_json else None, "content-encoding": "utf-8"}
    message |= {"body": "[]", **kind}
    assume(isinstance(message["headers"]["task"], str))
    envelope, body = fold(message)
    back = unfold(envelope, body, "tag", False)
    del back["properties"]["delivery_tag"], back["properties"]["delivery_info"]["redelivered"]
    assert json.dumps(back, sort_keys=True) == json.dumps(message, sort_keys=True)  # True is not 1, nor 0 0.0
    if not lacking and not headers and not properties and is_json:
        assert len(envelope) < 150


@given(text | st.from_regex(r"\{.{0,20}\}"), text)
def test_what_is_no_envelope_is_a_clear_error(envelope: str, body: str) -> None:
    with pytest.raises(ValueError, match="corrupt row"):
        unfold(envelope, body, "tag", False)


@given(st.integers() | st.integers(LOWEST - 2, LOWEST + 2) | st.integers(HIGHEST - 2, HIGHEST + 2))
def test_priorities(priority: int) -> None:
    message = {"properties": {"priority": priority}}
    if LOWEST <= priority <= HIGHEST:
        assert priority_of(message) == priority
    else:
        with pytest.raises(ValueError, match="priority"):
            priority_of(message)


tasks = st.fixed_dictionaries(
    {
        "task": text,
        "id": text,
        "retries": st.integers(0, 3),
        "root_id": text,
        "parent_id": st.none() | text,
        "group": st.none() | text,
    }
)


@given(messages, tasks, st.none() | moments, st.none() | moments, zones, zones, st.integers(LOWEST, HIGHEST))
def test_a_task_as_a_job(
    message: dict[str, Any],
    task: dict[str, Any],
    eta: datetime | None,
    expires: datetime | None,
    zone: timezone,
    local: timezone,
    priority: int,
) -> None:
    # The one time names its zone, the other one means the app's.
    times = {
        "eta": eta and eta.replace(tzinfo=zone).isoformat(),
        "expires": expires and expires.isoformat(),
    }
    message["headers"].update(task, **times)
    message["properties"]["priority"] = priority
    found = task_of(message)
    assert found is not None
    job = to_job(message, found, "a queue", 7, local)
    assert (job.id, job.task, job.queue, job.max_attempts) == (task["id"], task["task"], "a queue", 7)
    assert (job.priority, job.parent_id, job.group_id) == (priority, task["parent_id"], task["group"])
    assert job.root_id == (task["root_id"] if task["root_id"] != task["id"] else None)
    assert job.state is (State.RETRYABLE if task["retries"] else State.AVAILABLE)
    assert job.scheduled_at == (eta and eta.replace(tzinfo=zone))
    assert job.expires_at == (expires and expires.replace(tzinfo=local))
    for moment in (job.scheduled_at, job.expires_at):
        assert moment is None or moment.utcoffset() == timedelta(0)
    # The same publication once more is the same; and the task reads its eta.
    assert to_job(message, found, "a queue", 7, local).publication == job.publication
    back = unfold(job.envelope, job.body, "tag", False)
    assert back["headers"].get("eta") == times["eta"]
    assert back["headers"] | times == message["headers"]
    assert set(back["properties"]) == set(message["properties"]) - {"kathikon_publication"} | {
        "delivery_tag",
        "delivery_info",
    }


@given(json_values)
def test_what_is_no_task(body: Any) -> None:
    """Also of protocol 1, which has the task's name in the body."""
    message = {"headers": {}, "content-type": "application/json", "body": json.dumps(body), "properties": {}}
    assert task_of(message) is None
    named = {"task": "proj.add", "id": "1", "args": body}
    message["body"] = json.dumps(named)
    assert task_of(message) == named


@given(text)
def test_an_eta_that_is_none_is_left_to_the_worker(eta: str) -> None:
    try:
        datetime.fromisoformat(eta.replace("Z", "+00:00"))
    except ValueError:
        task = {"task": "proj.add", "id": "1", "eta": eta}
        message = {"headers": task, "properties": {}, "body": "[]"}
        assert to_job(message, task, "queue", 1, UTC).scheduled_at is None
