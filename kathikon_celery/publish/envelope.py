"""A kombu message as a job or a stored message, and back."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import datetime, timezone
from random import getrandbits
from typing import Any
from uuid import UUID

from kombu import serialization
from kombu.utils import json as kombu_json

from kathikon_celery.job import Job, State, in_brief

#: The smallest and the largest priority: the range of the column.
LOWEST, HIGHEST = -(2**63), 2**63 - 1

#: Keys of the envelope, the JSON that is kept beside the body.
_HEADERS, _PROPERTIES, _TYPE, _ENCODING, _BASE64 = "headers", "properties", "content-type", "content-encoding", "base64"
#: Key of an envelope that has only what differs from `_usual`: most of a message is the same for all tasks.
_BRIEF = "brief"
#: A property of Kathikon's own: see `to_job`.
PUBLICATION = "kathikon_publication"
#: Properties of one delivery by kombu's other transports. `celery migrate` hands them on, with a body that is decoded.
_OF_A_DELIVERY = ("body_encoding", "delivery_tag")


#: Headers and properties that are ids of tasks.
_IDS = ("id", "root_id", "parent_id", "group", "correlation_id")

#: Content type and encoding of most bodies.
_JSON = {_TYPE: "application/json", _ENCODING: "utf-8"}

_compact = json.JSONEncoder(separators=(",", ":")).encode
_decoded = json.JSONDecoder().decode
_encoded = json.JSONEncoder().encode
_quoted = json.encoder.encode_basestring_ascii

#: The options in the body of a call without workflow.
_NOTHING: dict[str, None] = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
_NOTHING_ENCODED = _encoded(_NOTHING)


def _dumps(value: Any) -> str:
    try:
        return _compact(value)
    except TypeError:
        return kombu_json.dumps(value)  # type: ignore[no-any-return]


def loads(text: str) -> Any:
    """Return what kombu's JSON reader makes of *text*. Raises `ValueError`."""
    # Only kombu's own notation for dates and the like needs kombu's slower reader.
    return kombu_json.loads(text) if '"__type__"' in text else _decoded(text)


def dumps_call(args: Any, kwargs: Any, serializer: str) -> tuple[str, str, Any]:
    """Return content type, encoding and body of a call without workflow, as kombu's `dumps` does."""
    codec = serialization.registry._encoders.get(serializer)
    if codec is not None and codec.encoder is kombu_json.dumps:
        try:
            body = f"[{_encoded(args) if args else '[]'}, {_encoded(kwargs) if kwargs else '{}'}, {_NOTHING_ENCODED}]"
        except (TypeError, ValueError, RecursionError):
            pass  # kombu has a notation for dates and the like, or raises its own error
        else:
            return codec.content_type, codec.content_encoding, body
    return serialization.dumps((args, kwargs, _NOTHING), serializer)  # type: ignore[no-any-return]


def _as_text(body: Any) -> tuple[str, bool]:
    """Return *body* as a text that every database can store, and whether the text is base64."""
    if isinstance(body, str) and "\0" not in body:
        try:
            body.encode()
            return body, False
        except UnicodeEncodeError:
            return b64encode(body.encode("utf-8", "surrogatepass")).decode(), True
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body or b"")
    return b64encode(data).decode(), True


def _usual(task_id: str) -> dict[str, dict[str, Any]]:
    """Return headers and properties of most tasks: in Celery's protocol 2, of a call without options."""
    headers: dict[str, Any] = {
        "lang": "py",
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task_id,
        "parent_id": None,
        "kwargsrepr": "{}",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
    return {_HEADERS: headers, _PROPERTIES: {"correlation_id": task_id, "delivery_mode": 2, "priority": 0}}


def _unusual(given: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any] | None:
    """Return the items of *given* that differ from *usual*; `None` if *given* lacks a key of *usual*."""
    if not given.keys() >= usual.keys():
        return None
    nothing = object()
    return {
        name: value
        for name, value in given.items()
        if value is not (same := usual.get(name, nothing)) and (type(value) is not type(same) or value != same)
    }


def _brief(headers: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any] | None:
    """Return the envelope of a task without what is `_usual`; `None` for another kind of message."""
    task_id = headers.get("id")
    if type(task_id) is not str:
        return None
    usual = _usual(task_id)
    of_headers = _unusual(headers, usual[_HEADERS])
    of_properties = _unusual(properties, usual[_PROPERTIES])
    if of_headers is None or of_properties is None:
        return None
    return {_BRIEF: 1, _HEADERS: of_headers, _PROPERTIES: of_properties}


def fold(message: dict[str, Any]) -> tuple[str, str]:
    """Return envelope and body of *message*, a mapping as `kombu.transport.virtual` prepares it."""
    headers = message[_HEADERS]
    properties = {name: value for name, value in message[_PROPERTIES].items() if value not in (None, "")}
    for name in (PUBLICATION, *_OF_A_DELIVERY):
        properties.pop(name, None)
    envelope = _brief(headers, properties)
    text, more = _of_body(message["body"], message.get(_TYPE), message.get(_ENCODING), envelope is not None)
    return _dumps((envelope or {_HEADERS: headers, _PROPERTIES: properties}) | more), text


def common(headers: dict[str, Any], properties: dict[str, Any]) -> str:
    """Encode, once for many calls of `fold_call`, the part of the envelope that the calls have in common.

    *headers* (at least one) and *properties* are those that differ from `_usual`.
    """
    return f'{_dumps(headers)[1:]},"{_PROPERTIES}":{_dumps(properties)}'


def fold_call(own: dict[str, str], common: str, body: Any, content_type: str, content_encoding: str) -> tuple[str, str]:
    """As `fold`, for a call: its *own* headers, and the part that `common` has encoded."""
    text, more = _of_body(body, content_type, content_encoding, True)
    headers = "".join([f'"{name}":{_quoted(value)},' for name, value in own.items()])
    return f'{{"{_BRIEF}":1,"{_HEADERS}":{{{headers}{common}{"," + _dumps(more)[1:] if more else "}"}', text


def _of_body(body: Any, content_type: str | None, encoding: str | None, is_brief: bool) -> tuple[str, dict[str, Any]]:
    """Return the body as text, and the envelope's items about it."""
    text, encoded = _as_text(body)
    said: dict[str, Any] = {}
    if not is_brief or content_type != _JSON[_TYPE] or encoding != _JSON[_ENCODING]:
        said = {_TYPE: content_type, _ENCODING: encoding}
    if encoded:
        said[_BASE64] = True
    return text, said


def unfold(envelope: str, body: str, tag: str, redelivered: bool) -> dict[str, Any]:
    """Return the mapping that `kombu.transport.virtual.Message` takes. Raises `ValueError` for a corrupt row."""
    try:
        message = loads(envelope)
    except (ValueError, TypeError) as error:
        raise ValueError(f"corrupt row: its envelope is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise ValueError(f"corrupt row: its envelope is no mapping: {message!r}")
    for name in (_HEADERS, _PROPERTIES):
        if not isinstance(message.get(name), dict):
            raise ValueError(f"corrupt row: its {name} are no mapping: {message.get(name)!r}")
    headers, properties = message[_HEADERS], message[_PROPERTIES]
    if _BRIEF in message:
        if message[_BRIEF] != 1:
            raise ValueError(f"corrupt row: its envelope is brief in an unknown way: {message[_BRIEF]!r}")
        usual = _usual(headers.get("id"))
        message = {**_JSON, **message}
        headers, properties = {**usual[_HEADERS], **headers}, {**usual[_PROPERTIES], **properties}
    if "task" in headers:
        for name in ("task", "id"):
            if not isinstance(headers.get(name), str):
                raise ValueError(f"corrupt row: its headers name the {name} {headers.get(name)!r}")
    info = properties.setdefault("delivery_info", {})
    if not isinstance(info, dict):
        raise ValueError(f"corrupt row: its delivery_info is no mapping: {info!r}")
    if message.get(_BASE64):
        try:
            body = b64decode(body, validate=True)  # type: ignore[assignment]
        except (ValueError, TypeError) as error:
            raise ValueError(f"corrupt row: its body is no base64: {error}") from error
    for name in (_TYPE, _ENCODING):
        if not isinstance(message.get(name), str | None):
            raise ValueError(f"corrupt row: its {name} is {message.get(name)!r}")
    properties["delivery_tag"] = tag
    properties.pop(PUBLICATION, None)
    info["redelivered"] = redelivered
    return {
        "body": body,
        _HEADERS: headers,
        _PROPERTIES: properties,
        _TYPE: message.get(_TYPE),
        _ENCODING: message.get(_ENCODING),
    }


def check_call(headers: dict[str, Any], payload: Any) -> None:
    """Raise `ValueError` unless *payload*, the decoded body of a Celery task, has the shape of a call.

    Celery does not check that: another shape would end the worker.
    """
    if "task" not in headers:  # protocol 1 has everything in the body
        if not isinstance(payload, dict) or not all(isinstance(payload.get(name), str) for name in ("task", "id")):
            raise ValueError("it is no mapping with a task and an id")
        return
    if isinstance(payload, dict) and "args" in payload:  # Celery's mixture of both protocols
        return
    if not isinstance(payload, list | tuple) or len(payload) != 3:
        raise ValueError("it is no list of three: arguments, keyword arguments, options")
    if not isinstance(payload[0], list | tuple) or not isinstance(payload[1], dict):
        raise ValueError("it has no list of arguments or no mapping of keyword arguments")
    if not isinstance(payload[2], dict | None):
        raise ValueError("its options are no mapping")


def priority_of(message: dict[str, Any]) -> int:
    """Return the message's priority, 0 without one. Raises `ValueError` as `checked_priority` does."""
    return checked_priority(message[_PROPERTIES].get("priority") or 0)


def checked_priority(value: Any) -> int:
    """Return *value* as an int. Raises `ValueError` unless it is a whole number from `LOWEST` to `HIGHEST`."""
    try:
        priority = int(value)
    except (TypeError, ValueError):
        raise ValueError(f"priority {value!r} is no whole number") from None
    if not LOWEST <= priority <= HIGHEST:
        raise ValueError(f"priority {priority} is not between {LOWEST} and {HIGHEST}")
    return priority


def task_of(message: dict[str, Any]) -> dict[str, Any] | None:
    """Return the Celery headers of a message in protocol 1 or 2, or `None` when it is no task.

    Ids in *message* that are UUIDs are replaced by text.
    """
    headers = message[_HEADERS]
    if headers:
        for part in (headers, message[_PROPERTIES]):
            part |= {name: str(part[name]) for name in _IDS if isinstance(part.get(name), UUID)}
        return headers if isinstance(headers.get("task"), str) and isinstance(headers.get("id"), str) else None
    if message.get(_TYPE) == "application/json" and isinstance(message["body"], str) and '"task"' in message["body"]:
        body = json.loads(message["body"])
        if isinstance(body, dict) and isinstance(body.get("task"), str) and isinstance(body.get("id"), str):
            return body
    return None


def to_job(message: dict[str, Any], task: dict[str, Any], queue: str, max_attempts: int, local: timezone) -> Job:
    """Return the job of a task message. *local*: the zone of times without one. Raises `ValueError` (`priority_of`)."""
    # Distinguishes a publication that kombu repeats after a lost connection from a new publication of the same id.
    publication = message[_PROPERTIES].setdefault(PUBLICATION, getrandbits(63))
    envelope, body = fold(_readable(message))
    task_id, root = task["id"], task.get("root_id")
    return Job(
        id=task_id,
        queue=queue,
        task=task["task"],
        state=State.RETRYABLE if task.get("retries") else State.AVAILABLE,
        priority=priority_of(message),
        envelope=envelope,
        body=body,
        scheduled_at=_moment(task.get("eta"), local),
        expires_at=_moment(task.get("expires"), local),
        max_attempts=max_attempts,
        root_id=root if root != task_id else None,
        parent_id=task.get("parent_id"),
        group_id=task.get("group"),
        publication=publication,
    )


def _readable(message: dict[str, Any]) -> dict[str, Any]:
    """Return *message*, with its body as text if it is JSON in bytes (of `celery migrate`): a text can be searched."""
    body = message["body"]
    if isinstance(body, bytes) and {name: message.get(name) for name in _JSON} == _JSON:
        try:
            return {**message, "body": body.decode()}
        except UnicodeDecodeError:
            pass
    return message


def _moment(value: Any, local: timezone) -> datetime | None:
    """Return an ISO 8601 text as a datetime in UTC; `None` for other texts."""
    if not value:
        return None
    if not isinstance(value, datetime):
        try:
            value = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
        except ValueError:
            return None
    try:
        return (value if value.tzinfo else value.replace(tzinfo=local)).astimezone(timezone.utc)  # type: ignore[no-any-return]
    except OverflowError:
        return datetime.max.replace(tzinfo=timezone.utc)


def anew(envelope: str) -> str:
    """Return the *envelope* of a job that is to run again by hand: it has no retry behind it, no due time, no expiry.

    An envelope that is no JSON stays as it is; the worker will say what is wrong with it.
    """
    try:
        message = loads(envelope)
        headers, usual = message[_HEADERS], _usual("")[_HEADERS]
        for name in ("retries", "eta", "expires"):
            if name in headers:
                headers[name] = usual[name]
    except (ValueError, TypeError, KeyError):
        return envelope
    return _dumps(message)


def alone(envelope: str, body: str, new_id: str) -> tuple[str, str]:
    """Return envelope and body of the same call under *new_id*, without workflow, retries, due time and expiry.

    Raises `ValueError` for a message that cannot be read, or that only Python's pickle can read.
    """
    message = unfold(envelope, body, "", False)
    headers, properties = message[_HEADERS], message[_PROPERTIES]
    content_type = message[_TYPE]
    try:
        payload = loads_safely(message)
        check_call(headers, payload)
        args, kwargs, _ = payload
    except (serialization.ContentDisallowed, serialization.DecodeError, TypeError) as error:
        raise ValueError(f"its message, {content_type}, cannot be copied: {in_brief(error)}") from error
    usual = _usual(new_id)
    kept = {name: value for name, value in usual[_HEADERS].items() if name in _OF_A_WORKFLOW}
    message[_HEADERS] = {**headers, **kept, "id": new_id}
    properties.pop("delivery_tag")
    message[_PROPERTIES] = {**properties, "correlation_id": new_id}
    serializer = serialization.registry.type_to_name[content_type]
    message[_TYPE], message[_ENCODING], message["body"] = serialization.dumps((args, kwargs, _NOTHING), serializer)
    return fold(message)


#: Content types of messages that are read outside of a task. Others can run code.
_HARMLESS = serialization.prepare_accept_content(["json", "yaml", "msgpack"])


def loads_safely(message: Mapping[str, Any]) -> Any:
    """Return the decoded body of *message*. Raises kombu's `ContentDisallowed` for a format that can run code."""
    return serialization.loads(message["body"], message.get(_TYPE), message.get(_ENCODING), accept=_HARMLESS)


#: Headers that place a call in a workflow and in time.
_OF_A_WORKFLOW = ("eta", "expires", "group", "group_index", "retries", "root_id", "parent_id", "replaced_task_nesting")
