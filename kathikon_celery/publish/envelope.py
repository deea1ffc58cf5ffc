"""A kombu message as a job or a stored message, and back."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from datetime import datetime, timezone
from random import getrandbits
from typing import Any
from uuid import UUID

from kombu import serialization
from kombu.utils import json as kombu_json

from kathikon_celery.job import Job, State

#: The range of a priority: what a column of the database holds.
LOWEST, HIGHEST = -(2**63), 2**63 - 1

#: Keys of the JSON that is kept beside the body, and kombu's names for them.
_HEADERS, _PROPERTIES, _TYPE, _ENCODING, _BASE64 = "headers", "properties", "content-type", "content-encoding", "base64"
#: Its mark of a task of which only what differs from `_usual` is written: most of a message is the same for all.
_BRIEF = "brief"
#: A property that is ours: see `to_job`.
PUBLICATION = "kathikon_publication"


#: Headers and properties that are ids of tasks.
_IDS = ("id", "root_id", "parent_id", "group", "correlation_id")

#: The usual kind of a body.
_JSON = {_TYPE: "application/json", _ENCODING: "utf-8"}

_compact = json.JSONEncoder(separators=(",", ":")).encode
_decoded = json.JSONDecoder().decode
_encoded = json.JSONEncoder().encode
_quoted = json.encoder.encode_basestring_ascii

#: What follows a call that is part of no workflow.
_NOTHING: dict[str, None] = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
_NOTHING_ENCODED = _encoded(_NOTHING)


def _dumps(value: Any) -> str:
    try:
        return _compact(value)
    except TypeError:
        return kombu_json.dumps(value)  # type: ignore[no-any-return]


def loads(text: str) -> Any:
    """What kombu's reader of JSON makes of *text*. Raises `ValueError`."""
    # Only kombu's own notation for dates and the like needs that slower reader.
    return kombu_json.loads(text) if '"__type__"' in text else _decoded(text)


def dumps_call(args: Any, kwargs: Any, serializer: str) -> tuple[str, str, Any]:
    """Content type, encoding and body of a call that is part of no workflow, as kombu's `dumps` makes them."""
    codec = serialization.registry._encoders.get(serializer)
    if codec is not None and codec.encoder is kombu_json.dumps:
        try:
            body = f"[{_encoded(args) if args else '[]'}, {_encoded(kwargs) if kwargs else '{}'}, {_NOTHING_ENCODED}]"
        except (TypeError, ValueError, RecursionError):
            pass  # only kombu has a notation for dates and the like, or a word for what is wrong
        else:
            return codec.content_type, codec.content_encoding, body
    return serialization.dumps((args, kwargs, _NOTHING), serializer)  # type: ignore[no-any-return]


def _as_text(body: Any) -> tuple[str, bool]:
    """The body as text that any database keeps, and whether that is base64."""
    if isinstance(body, str) and "\0" not in body:
        try:
            body.encode()
            return body, False
        except UnicodeEncodeError:
            return b64encode(body.encode("utf-8", "surrogatepass")).decode(), True
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body or b"")
    return b64encode(data).decode(), True


def _usual(task_id: str) -> dict[str, dict[str, Any]]:
    """What is said of most tasks, when Celery sends them by its second protocol and their caller asks for nothing."""
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
    """What of *given* differs from *usual*; `None` where it lacks something of it."""
    if not given.keys() >= usual.keys():
        return None
    nothing = object()
    return {
        name: value
        for name, value in given.items()
        if value is not (same := usual.get(name, nothing)) and (type(value) is not type(same) or value != same)
    }


def _brief(headers: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any] | None:
    """The envelope of a task without what is usual; `None` where it is another kind of message."""
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
    """Envelope and body of a message as `kombu.transport.virtual` prepares it."""
    headers = message[_HEADERS]
    properties = {name: value for name, value in message[_PROPERTIES].items() if value not in (None, "")}
    properties.pop(PUBLICATION, None)
    envelope = _brief(headers, properties)
    text, more = _of_body(message["body"], message.get(_TYPE), message.get(_ENCODING), envelope is not None)
    return _dumps((envelope or {_HEADERS: headers, _PROPERTIES: properties}) | more), text


def common(headers: dict[str, Any], properties: dict[str, Any]) -> str:
    """What calls that differ in a few headers only have in common, for `fold_call`: it is encoded once.

    Those *headers* (at least one) and *properties* are given that differ from the usual.
    """
    return f'{_dumps(headers)[1:]},"{_PROPERTIES}":{_dumps(properties)}'


def fold_call(own: dict[str, str], common: str, body: Any, content_type: str, content_encoding: str) -> tuple[str, str]:
    """As `fold`, of a call with those headers of its *own*, and what it has in *common* with others."""
    text, more = _of_body(body, content_type, content_encoding, True)
    headers = "".join([f'"{name}":{_quoted(value)},' for name, value in own.items()])
    return f'{{"{_BRIEF}":1,"{_HEADERS}":{{{headers}{common}{"," + _dumps(more)[1:] if more else "}"}', text


def _of_body(body: Any, content_type: str | None, encoding: str | None, is_brief: bool) -> tuple[str, dict[str, Any]]:
    """The body as text, and what the envelope says of it."""
    text, encoded = _as_text(body)
    said: dict[str, Any] = {}
    if not is_brief or content_type != _JSON[_TYPE] or encoding != _JSON[_ENCODING]:
        said = {_TYPE: content_type, _ENCODING: encoding}
    if encoded:
        said[_BASE64] = True
    return text, said


def unfold(envelope: str, body: str, tag: str, redelivered: bool) -> dict[str, Any]:
    """The message again, as `kombu.transport.virtual.Message` wants it. Raises `ValueError` for a corrupt row."""
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
    # The row was ready when it was claimed: with its eta Celery would keep it in memory and wait once more.
    if headers.get("eta"):
        headers["eta"] = None
    return {
        "body": body,
        _HEADERS: headers,
        _PROPERTIES: properties,
        _TYPE: message.get(_TYPE),
        _ENCODING: message.get(_ENCODING),
    }


def check_call(headers: dict[str, Any], payload: Any) -> None:
    """Raise `ValueError` unless *payload*, the decoded body of a Celery task, has the shape of a call.

    Celery takes for granted that it has: anything else would end the worker.
    """
    if "task" not in headers:  # protocol 1 says all in the body
        if not isinstance(payload, dict) or not all(isinstance(payload.get(name), str) for name in ("task", "id")):
            raise ValueError("it is no mapping with a task and an id")
        return
    if isinstance(payload, dict) and "args" in payload:  # between the two protocols
        return
    if not isinstance(payload, list | tuple) or len(payload) != 3:
        raise ValueError("it is no list of three: arguments, keyword arguments, options")
    if not isinstance(payload[0], list | tuple) or not isinstance(payload[1], dict):
        raise ValueError("it has no list of arguments or no mapping of keyword arguments")
    if not isinstance(payload[2], dict | None):
        raise ValueError("its options are no mapping")


def priority_of(message: dict[str, Any]) -> int:
    """The message's priority. Raises `ValueError` where it is no whole number that fits."""
    return checked_priority(message[_PROPERTIES].get("priority") or 0)


def checked_priority(value: Any) -> int:
    """*value* as a whole number. Raises `ValueError` where it is none that fits."""
    try:
        priority = int(value)
    except (TypeError, ValueError):
        raise ValueError(f"priority {value!r} is no whole number") from None
    if not LOWEST <= priority <= HIGHEST:
        raise ValueError(f"priority {priority} is not between {LOWEST} and {HIGHEST}")
    return priority


def task_of(message: dict[str, Any]) -> dict[str, Any] | None:
    """The Celery headers of a message, whichever protocol it speaks, or `None` when it is no task.

    Ids that Celery was given as UUIDs become text in it.
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
    """The job that a task message asks for. *local*: the zone of times that name none."""
    # It tells the same publication, which kombu sends again after a lost connection, from a new one of the same id.
    publication = message[_PROPERTIES].setdefault(PUBLICATION, getrandbits(63))
    envelope, body = fold(message)
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


def _moment(value: Any, local: timezone) -> datetime | None:
    """An ISO 8601 text as a moment; `None` where it is none (the worker then says so)."""
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
