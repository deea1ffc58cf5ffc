"""What an operator may say of the tasks of a schedule: the options of ``apply_async`` that a row can keep, checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from math import isfinite
from typing import Any

from kombu.compression import encoders
from kombu.serialization import registry

from kathikon_celery.publish.envelope import checked_priority


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value != ""


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and abs(value) < 1e9


def _moment(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return False
    return isinstance(value, datetime)


def _priority(value: Any) -> bool:
    try:
        checked_priority(value)
    except ValueError:
        return False
    return not isinstance(value, bool)


_FLAG: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")
_NAME: tuple[Callable[[Any], bool], str] = (_text, "a name")
_LIMIT: tuple[Callable[[Any], bool], str] = (lambda value: _seconds(value) and value > 0, "seconds above 0")
_MAPPING: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, dict), "an object")
_CALLS: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, dict | list), "a signature, or a list")
#: Option -> what its values must fit, and that in words.
CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("queue", "exchange", "routing_key", "shadow", "group_id", "reply_to"), _NAME),
    **dict.fromkeys(("argsrepr", "kwargsrepr"), (lambda value: isinstance(value, str), "a text")),
    **dict.fromkeys(("time_limit", "soft_time_limit"), _LIMIT),
    **dict.fromkeys(("ignore_result", "retry", "transaction"), _FLAG),
    **dict.fromkeys(("headers", "retry_policy"), _MAPPING),
    **dict.fromkeys(("link", "link_error"), _CALLS),
    "priority": (_priority, "a whole number"),
    "countdown": (_seconds, "seconds"),
    "expires": (lambda value: _seconds(value) or _moment(value), "seconds, or a moment"),
    "eta": (_moment, "a moment"),
    "serializer": (lambda value: value in registry._encoders, f"one of {', '.join(sorted(registry._encoders))}"),
    "compression": (lambda value: value in encoders(), f"one of {', '.join(sorted(encoders()))}"),
    "delivery_mode": (lambda value: value in (1, 2), "1 or 2"),
}


def json_of(text: str, kind: type) -> Any:
    """Return what *text* says in JSON, which is a list or an object by *kind*. Raises `ValueError`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text!r:.200} is no JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{text!r:.200} is no {'list' if kind is list else 'object'} in JSON")
    return value


def check(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an option that is not known, or whose value is not allowed."""
    for name, value in options.items():
        if name not in CHECKS:
            raise ValueError(f"options have {name!r}; allowed are {', '.join(sorted(CHECKS))}")
        fits, allowed = CHECKS[name]
        if value is not None and not fits(value):
            raise ValueError(f"the option {name} = {value!r} is not allowed; allowed is {allowed}")
