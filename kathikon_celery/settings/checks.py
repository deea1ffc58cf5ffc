"""The checks of the settings' values, and the forms in which a value may be given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from difflib import get_close_matches
from typing import Any, cast
from zoneinfo import ZoneInfo, available_timezones

#: Concurrency of a queue that is named without one (Kathikon's default).
DEFAULT_CONCURRENCY = 10

#: Seconds that an ended job stays in the table where nothing else is set (Kathikon's default: 7 days). Dead jobs stay.
_RETENTION: Mapping[str, float | None] = dict.fromkeys(("completed", "cancelled", "discarded"), 604800.0) | {
    "dead": None
}

#: The longest time that a database can look back, in seconds: some three thousand years.
LONGEST = 1e11
#: The longest time for which a thread can wait, in seconds: some thirty years.
LONGEST_WAIT = 1e9
#: The largest number that a column of the tables holds.
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class QueueSettings:
    """One queue, as ``kathikon_queues`` says.

    >>> Settings(queues="default:10,emails:5").queues["emails"]
    QueueSettings(name='emails', concurrency=5, tasks=(), fleet=None, rate=None)
    """

    #: The queue's name.
    name: str
    #: How many of its jobs a worker runs at once; None: as many as its pool.
    concurrency: int | None = DEFAULT_CONCURRENCY
    #: Names of tasks, or patterns with ``*``, ``?`` and ``[…]``.
    tasks: tuple[str, ...] = ()
    #: How many of its jobs all workers together run at once; None: any number.
    fleet: int | None = None
    #: How many of its jobs all workers together start in a time, such as ``"600/m"``; None: any number.
    rate: str | None = None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return a hint at the one of *words* that is close to *word*; empty if none is."""
    close = get_close_matches(word, list(words), 1)
    return f"; did you mean {close[0]}?" if close else ""


# A check takes a value in any of its forms and returns it in one form, which it also takes;
# or it raises ValueError with a text that says what is allowed.


def seconds(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], float]:
    """Return a check for seconds, given as a number, a text or a `timedelta`."""
    allowed = (
        f"seconds from {low:g} to {high:g}" if high < math.inf else f"seconds {'above' if above else 'from'} {low:g}"
    )

    def check(value: Any) -> float:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str | timedelta):
                raise TypeError
            number = value.total_seconds() if isinstance(value, timedelta) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(allowed) from None
        if not low <= number <= high or math.isinf(number) or (above and number == low):
            raise ValueError(allowed)
        return number

    return check


def whole_number(low: int, high: int | None = None) -> Callable[[Any], int]:
    """Return a check for a whole number, which may be a text."""
    allowed = f"a whole number from {low} to {high}" if high else f"a whole number from {low}"

    def check(value: Any) -> int:
        try:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise TypeError
            number = int(value)
        except (TypeError, ValueError):
            raise ValueError(allowed) from None
        if number < low or (high and number > high):
            raise ValueError(allowed)
        return number

    return check


def choice(*choices: str) -> Callable[[Any], str]:
    """Return a check for one of *choices*."""

    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(" or ".join(choices))
        return cast("str", value)

    return check


def boolean(value: Any) -> bool:
    """Take a truth value, also as a word such as ``yes`` or ``off``."""
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool | int | str) and (word := str(value).lower()) in known:
        return known[word]
    raise ValueError("true or false")


def time_zone(value: Any) -> str:
    """Take the name of a time zone, or a `ZoneInfo`."""
    name = getattr(value, "key", value)  # a ZoneInfo has its name there
    try:
        if not isinstance(name, str):
            raise TypeError
        ZoneInfo(name)
    except (KeyError, TypeError, ValueError, OSError):
        raise ValueError(
            "the name of a time zone in the IANA database, such as UTC or Europe/Athens"
            + did_you_mean(str(name), available_timezones())
        ) from None
    return name


def import_path(value: Any) -> str:
    """Take ``package.module:Class``."""
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
        raise ValueError("an import path of the form package.module:Class")
    return value


_concurrency = whole_number(1)


def _check_concurrency(value: Any, allowed: str) -> int | None:
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return None
    try:
        return _concurrency(value)
    except ValueError:
        raise ValueError(allowed) from None


def _check_queue(name: Any, value: Any) -> QueueSettings:
    if not isinstance(name, str) or not name.strip():
        raise ValueError("queue names that are strings and not empty")
    if isinstance(value, QueueSettings):
        value = {one.name: getattr(value, one.name) for one in fields(value) if one.name != "name"}
    elif not isinstance(value, Mapping):
        value = {"concurrency": value}
    for key in value.keys() - {"concurrency", "tasks", "fleet", "rate"}:
        raise ValueError(
            f"the keys concurrency, tasks, fleet and rate for queue {name!r}, not {key!r}"
            + did_you_mean(str(key), ("concurrency", "tasks", "fleet", "rate"))
        )
    concurrency = _check_concurrency(
        value.get("concurrency", DEFAULT_CONCURRENCY),
        f"for queue {name!r} a concurrency that is a whole number from 1, or None for as many as the pool runs",
    )
    tasks = value.get("tasks", ())
    tasks = (tasks,) if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list | tuple | set | frozenset) or not all(isinstance(it, str) and it for it in tasks):
        raise ValueError(f"for queue {name!r} tasks that are a list of task names or patterns such as 'proj.mail.*'")
    fleet, most = value.get("fleet"), value.get("rate")
    if fleet is not None:
        fleet = _check_concurrency(fleet, f"for queue {name!r} a fleet that is a whole number from 1, or None")
    if most is not None:
        try:
            rate(most)
        except ValueError as error:
            raise ValueError(f"for queue {name!r} as its rate {error}") from None
    return QueueSettings(name, concurrency, tuple(tasks), fleet, None if most is None else str(most))


#: Celery's words for the windows of a rate, and a day.
WINDOWS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def rate(value: Any) -> tuple[int, float]:
    """Return a rate, a number a second or a text such as ``"60/m"``, as so many in so many seconds."""
    allowed = 'a rate such as "10/s", "60/m", "100/h" or "1000/d", or a number a second, above 0'
    number, slash, window = str(value).strip().partition("/")
    try:
        if isinstance(value, bool) or (slash and window.strip() not in WINDOWS):
            raise ValueError
        many, per = float(number), WINDOWS[window.strip()] if slash else 1.0
    except ValueError:
        raise ValueError(f"{allowed}, not {value!r}") from None
    if not 0 < many <= 1_000_000:
        raise ValueError(f"{allowed} and up to 1,000,000, not {value!r}")
    if per / many > LONGEST_WAIT:
        raise ValueError(f"{allowed}, and at least one in {LONGEST_WAIT:g} seconds, not {value!r}")
    return (int(many), per) if many == int(many) else (1, per / many)


def rate_limits(value: Any) -> str:
    """Take what Celery's own rate limits are for."""
    if value not in ("worker", "fleet"):
        raise ValueError('"worker" (Celery\'s: each worker for itself) or "fleet" (all workers together)')
    return str(value)


def queues_of(value: Any) -> dict[str, QueueSettings]:
    """Take ``{name: concurrency or {concurrency, tasks}}``, ``"name:concurrency,…"`` or ``[name, …]``."""
    pairs: list[tuple[Any, Any]]
    if isinstance(value, str):
        pairs = []
        for item in value.split(","):
            # A name may hold colons: the last one splits.
            name, colon, concurrency = item.strip().rpartition(":")
            if colon:
                wrong = f"name:concurrency, the concurrency being a whole number from 1 or none, not {item.strip()!r}"
                pairs.append((name.strip(), _check_concurrency(concurrency, wrong)))
            else:
                pairs.append((concurrency, DEFAULT_CONCURRENCY))
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list | tuple):
        pairs = [(item.name, item) if isinstance(item, QueueSettings) else (item, {}) for item in value]
    else:
        raise ValueError(
            'a mapping such as {"default": 10}, a string such as "default:10,emails:5", or a list of names'
        )
    queues = {queue.name: queue for queue in (_check_queue(*pair) for pair in pairs)}
    if not queues:
        raise ValueError("at least one queue")
    if len(queues) < len(pairs):
        raise ValueError("each queue once")
    return queues


def port(value: Any) -> int | None:
    """Take a port, or None."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return None
    try:
        return _port(value)
    except ValueError as error:
        raise ValueError(f"{error}, or none") from None


_port = whole_number(1, 65535)


def host(value: Any) -> str:
    """Take the name or the address of this machine to listen on."""
    if not isinstance(value, str) or not value.isprintable() or not value.strip() or len(value) > 253:
        raise ValueError("an address such as 127.0.0.1 or 0.0.0.0")
    return value.strip()


def schema_name(value: Any) -> str | None:
    """Take the name of a schema of PostgreSQL, or None."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return None
    allowed = "the name of a schema of PostgreSQL, of up to 63 bytes, that does not begin with pg_"
    if not isinstance(value, str) or not value.isprintable() or value.startswith("pg_"):
        raise ValueError(allowed)
    if not 0 < len(value.encode(errors="replace")) <= 63:
        raise ValueError(allowed)
    return value


_seconds_to_keep = seconds(0, LONGEST, above=True)


def retention(value: Any) -> dict[str, float | None]:
    """Take seconds or None for all but dead jobs, or a mapping or ``"state:seconds,…"`` that names states."""
    states = ", ".join(_RETENTION)
    times = f"seconds above 0 and up to {LONGEST:g}, None to keep for ever"
    allowed = f"{times}, or one of these for each of the states {states}"

    def keep(value: Any) -> float | None:
        if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
            return None
        try:
            return _seconds_to_keep(value)
        except ValueError:
            raise ValueError(allowed) from None

    if isinstance(value, str) and ":" in value:
        value = {state.strip(): seconds for state, _, seconds in (item.partition(":") for item in value.split(","))}
    if not isinstance(value, Mapping):
        seconds = keep(value)
        return {state: seconds if default else None for state, default in _RETENTION.items()}
    given = {str(state): keep(seconds) for state, seconds in value.items()}
    for state in given.keys() - _RETENTION.keys():
        raise ValueError(f"{allowed}, not {state!r}" + did_you_mean(state, _RETENTION))
    return {**_RETENTION, **given}
