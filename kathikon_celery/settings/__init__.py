"""Every setting of Kathikon: its type, default and check, and where its value is looked for.

For each setting the first one found wins: ``kathikon_<name>`` in ``app.conf``, ``KATHIKON_<NAME>`` in the environment,
``<name>`` in ``[tool.kathikon]`` of the nearest ``pyproject.toml``, the default. All times are seconds.
"""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from zoneinfo import ZoneInfo, available_timezones

from click import ClickException
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = ["QueueSettings", "SettingError", "SettingWarning", "Settings", "mask", "parse_url"]

#: Concurrency of a queue that is named without one (Kathikon's default).
DEFAULT_CONCURRENCY = 10

#: Seconds that an ended job stays in the table where nothing else is set (Kathikon's default: 7 days). Dead jobs stay.
_RETENTION: Mapping[str, float | None] = dict.fromkeys(("completed", "cancelled", "discarded"), 604800.0) | {
    "dead": None
}

#: For each database its drivers; the first one is used where the URL names none.
DRIVERS: Mapping[str, tuple[str, ...]] = {
    "sqlite": ("pysqlite",),
    "postgresql": ("psycopg",),
}

#: What is allowed as a URL.
_URLS = (
    "a SQLAlchemy URL such as sqlite:///kathikon.db or postgresql://user:password@host/database; "
    "in user and password, percent-encode the characters @ : / ? #"
)
#: The longest time that a database can look back, in seconds: some three thousand years.
_LONGEST = 1e11
#: The longest time for which a thread can wait, in seconds: some thirty years.
_LONGEST_WAIT = 1e9
#: The largest number that a column of the tables holds.
_LARGEST = 2**31 - 1

_PREFIX = "kathikon_"
_TEST_PREFIX = "KATHIKON_TEST_"
_VALUE_LENGTH = 200


class SettingError(ClickException, ValueError):  # so Celery's command line shows it in a line, with no traceback
    """A setting has a value that it cannot have, or does not exist. Says which, where it was found, and the remedy."""


class SettingWarning(UserWarning):
    """The environment has a variable ``KATHIKON_…`` that is no setting."""


def mask(text: str) -> str:
    """Return *text*, a URL or something that quotes one, without the password in it.

    >>> mask("postgresql://app:secret@db/jobs?sslpassword=hush")
    'postgresql://app:***@db/jobs?sslpassword=***'
    """
    text = re.sub(r"(\w[\w+.-]*://[^:@]*):.*@", r"\1:***@", text, flags=re.DOTALL)
    if not re.match(r"\W?\w[\w+.-]*://", text):  # a URL with a slip in it
        text = re.sub(r"^([^:@]*):.*@", r"\1:***@", text, flags=re.DOTALL)
    if "@" not in text:  # of host:port only the port may be shown
        text = re.sub(r"(\w://[^:/?\[]*:)(?!\d+\b).*", r"\1***", text, flags=re.DOTALL)
    return re.sub(r"(?i)([?&][^=&]*(?:passw|pwd|secret|token)[^=&]*=)[^&]*", r"\1***", text)


def shown(url: URL) -> str:
    """Return *url* for people: without passwords, also those among its options."""
    return mask(url.render_as_string(hide_password=True))


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    close = get_close_matches(word, list(words), 1)
    return f"; did you mean {close[0]}?" if close else ""


def parse_url(value: str | URL) -> URL:
    """Return the SQLAlchemy URL that *value* means, with the driver that Kathikon uses for its kind of database.

    ``postgres://`` and ``postgresql://`` mean ``postgresql+psycopg://``. Raises `ValueError` saying what is allowed for
    a URL that cannot be parsed and for a database or a driver that Kathikon does not speak.
    """
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):  # its message may quote the password, so it is not chained
        raise ValueError(_URLS) from None
    dialect, _, driver = url.drivername.partition("+")
    dialect = {"postgres": "postgresql"}.get(dialect, dialect)
    if dialect != "sqlite" and "@" in (url.database or "") and "%40" not in str(value):
        raise ValueError(_URLS)  # it is the end of a password
    if dialect not in DRIVERS:
        raise ValueError(f"a URL that begins with one of {', '.join(f'{name}://' for name in DRIVERS)}")
    if driver and driver not in DRIVERS[dialect]:
        allowed = " or ".join(f"{dialect}+{name}://" for name in DRIVERS[dialect])
        raise ValueError(f"the driver that Kathikon speaks to this database with: {allowed}, or just {dialect}://")
    if dialect == "sqlite" and (url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"):
        raise ValueError('a file, as in sqlite:///kathikon.db; for tables in memory, set kathikon_copies = "ram"')
    return url.set(drivername=dialect if dialect == "sqlite" else f"{dialect}+{driver or DRIVERS[dialect][0]}")


@dataclass(frozen=True)
class QueueSettings:
    """One queue: its name, how many of its jobs a worker runs at once (None: as many as its pool), what goes there."""

    name: str
    concurrency: int | None = DEFAULT_CONCURRENCY
    #: Names of tasks, or patterns with ``*``, ``?`` and ``[…]``.
    tasks: tuple[str, ...] = ()


# A check returns what the setting then is, in one form whatever form it was given in (also that one),
# or raises ValueError with a text that says what is allowed.


def checked_url(value: Any) -> str:
    """Return *value*, a URL, as `parse_url` reads it; raises `ValueError` saying what is allowed."""
    if not isinstance(value, str | URL):
        raise ValueError("a SQLAlchemy URL")
    return parse_url(value).render_as_string(hide_password=False)


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], float]:
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


def _integer(low: int, high: int | None = None) -> Callable[[Any], int]:
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


def _choice(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(" or ".join(choices))
        return cast("str", value)

    return check


def _check_bool(value: Any) -> bool:
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool | int | str) and (word := str(value).lower()) in known:
        return known[word]
    raise ValueError("true or false")


def _check_timezone(value: Any) -> str:
    name = getattr(value, "key", value)  # a ZoneInfo has its name there
    try:
        if not isinstance(name, str):
            raise TypeError
        ZoneInfo(name)
    except (KeyError, TypeError, ValueError, OSError):
        raise ValueError(
            "the name of a time zone in the IANA database, such as UTC or Europe/Athens"
            + _did_you_mean(str(name), available_timezones())
        ) from None
    return name


def _check_import_path(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
        raise ValueError("an import path of the form package.module:Class")
    return value


_concurrency = _integer(1)


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
        value = {"concurrency": value.concurrency, "tasks": value.tasks}
    elif not isinstance(value, Mapping):
        value = {"concurrency": value}
    for key in value.keys() - {"concurrency", "tasks"}:
        raise ValueError(
            f"the keys concurrency and tasks for queue {name!r}, not {key!r}"
            + _did_you_mean(str(key), ("concurrency", "tasks"))
        )
    concurrency = _check_concurrency(
        value.get("concurrency", DEFAULT_CONCURRENCY),
        f"for queue {name!r} a concurrency that is a whole number from 1, or None for as many as the pool runs",
    )
    tasks = value.get("tasks", ())
    tasks = (tasks,) if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list | tuple | set | frozenset) or not all(isinstance(it, str) and it for it in tasks):
        raise ValueError(f"for queue {name!r} tasks that are a list of task names or patterns such as 'proj.mail.*'")
    return QueueSettings(name, concurrency, tuple(tasks))


def _check_queues(value: Any) -> dict[str, QueueSettings]:
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


_seconds_to_keep = _number(0, _LONGEST, above=True)


def _check_retention(value: Any) -> dict[str, float | None]:
    """Take seconds or None for all but dead jobs, or a mapping or ``"state:seconds,…"`` that names states."""
    states = ", ".join(_RETENTION)
    times = f"seconds above 0 and up to {_LONGEST:g}, None to keep for ever"
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
        raise ValueError(f"{allowed}, not {state!r}" + _did_you_mean(state, _RETENTION))
    return {**_RETENTION, **given}


def _setting(default: Any, check: Callable[[Any], Any], **options: Any) -> Any:
    return field(default=default, metadata={"check": check}, **options)


@dataclass(frozen=True, repr=False)
class Settings:
    """The settings of one app, checked.

    A value may be given to the constructor in any of the forms that a setting takes, and is kept in one form:

    >>> Settings(queues="default:10,emails:5").queues["emails"].concurrency
    5

    Raises `SettingError` for a value that is not allowed. Neither `repr` nor an error shows a password.
    """

    #: Where the jobs live: a URL of SQLite or PostgreSQL. A relative file is in the working directory.
    database_url: str = _setting("sqlite:///kathikon.db", checked_url)

    #: The queues that a worker consumes, in order. The first one takes what no other setting routes.
    queues: Mapping[str, QueueSettings] = _setting("default:10", _check_queues, hash=False)

    #: The longest a consumer waits before it looks at the table again, should a wake-up be lost.
    poll_interval: float = _setting(0.2, _number(0.01, 60))

    #: How often a worker makes the jobs available that have come due.
    scheduler_interval: float = _setting(1.0, _number(0.05, 60))

    #: How often a worker deletes the ended jobs that are older than their retention.
    prune_interval: float = _setting(60.0, _number(0.1, _LONGEST_WAIT))

    #: For each state in which a job has ended, how long it stays in the table; None is for ever.
    retention_period: Mapping[str, float | None] = _setting(604800.0, _check_retention, hash=False)

    #: How often the process that ran a job may crash before the job is dead; with `retry_failed`, also the number of
    #: tries.
    max_attempts: int = _setting(20, _integer(1, _LARGEST))

    #: Whether a task that raised is tried again: after n failures in ``min(n² * 5, 86400)`` seconds, as in Kathikon.
    retry_failed: bool = _setting(False, _check_bool)

    #: Rows that one transaction of a bulk insert writes.
    insert_many_chunk_size: int = _setting(500, _integer(1, 10000))

    #: The zone of times that name none, and of schedules.
    timezone: str = _setting("UTC", _check_timezone)

    #: Whether return values are kept (``store``) or not (``discard``).
    result: str = _setting("store", _choice("store", "discard"))

    #: The class that stores jobs.
    storage_backend: str = _setting("kathikon_celery.storage.sql:SQLBackend", _check_import_path)

    #: ``disc``: tables in the database; ``ram``: tables that live as long as the process; ``auto``: see `in_ram`.
    copies: str = _setting("auto", _choice("auto", "ram", "disc"))

    #: A worker that was silent for so long is taken for dead.
    lease: float = _setting(20.0, _number(2, 3600))

    #: When publishing has returned, the job is on ``disk``, or committed by the ``server`` and lost in a power cut.
    publish_durability: str = _setting("disk", _choice("disk", "server"))

    #: The same for what workers write: claims, acks, results.
    worker_durability: str = _setting("server", _choice("disk", "server"))

    #: How many seconds of work, at its present rate, a worker claims ahead.
    claim_horizon: float = _setting(0.05, _number(0, 5))

    #: Where each setting comes from that has not its default: its name -> words for the place.
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, _checked(name, check, getattr(self, name), self.sources.get(name)))

    def __repr__(self) -> str:
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "sources"}
        values["database_url"] = mask(self.database_url)
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @classmethod
    def load(
        cls,
        conf: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] = os.environ,
        directory: str | os.PathLike[str] | None = None,
    ) -> Settings:
        """Look for each setting in *conf*, *environ* and the ``pyproject.toml`` nearest to *directory*.

        Arguments:
            conf: an app's ``app.conf``; with a namespace, as in Django, its keys are ``CELERY_KATHIKON_<NAME>``.
                Celery's own ``timezone``, where it is set, is the timezone that ``kathikon_timezone`` does not name.
            environ: the environment.
            directory: where the search for ``pyproject.toml`` begins and goes upward; the working directory by default.

        Raises `SettingError` for a wrong value and an unknown setting. A variable ``KATHIKON_…`` that is none is a
        `SettingWarning` only, since the environment is not ours alone (Kubernetes adds variables named after services).
        """
        values, sources = _find(conf, environ, directory)
        settings = cls(**values, sources=sources)
        if settings.copies == "ram" and "database_url" in sources:
            raise SettingError(
                f"kathikon_copies = 'ram' ({sources['copies']}) keeps jobs in memory, but kathikon_database_url "
                f"({sources['database_url']}) names a database to keep them in: remove one of the two"
            )
        return settings

    @classmethod
    def given(cls, name: str) -> Any:
        """Return the value of one setting that the environment or ``pyproject.toml`` gives; None where neither does."""
        values, sources = _find(None, os.environ, None)
        return _checked(name, _CHECKS[name], values[name], sources[name]) if name in values else None

    @property
    def in_ram(self) -> bool:
        """Whether the tables live as long as the process: so asked, or by ``auto`` in a notebook without a database."""
        return self.copies == "ram" or (self.copies == "auto" and "database_url" not in self.sources and _in_notebook())

    def engine_url(self) -> URL:
        """Return `database_url` for SQLAlchemy's ``create_engine``, the path of a SQLite file made absolute."""
        url = make_url(self.database_url)
        if url.get_backend_name() == "sqlite" and url.database and not url.database.startswith("file:"):
            url = url.set(database=os.path.abspath(url.database))
        return url

    def retention_for(self, state: str) -> float | None:
        """Return how many seconds a job that ended in *state* stays; None for ever, as in a state that is no end."""
        return self.retention_period.get(str(state))


_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    item.name: item.metadata["check"] for item in fields(Settings) if "check" in item.metadata
}


def _checked(name: str, check: Callable[[Any], Any], value: Any, source: str | None) -> Any:
    try:
        return check(value)
    except ValueError as error:
        shown = repr(value)
        if name == "database_url" or "//" in shown:
            shown = mask(shown)
        if len(shown) > _VALUE_LENGTH:
            shown = shown[:_VALUE_LENGTH] + "…"
        raise SettingError(
            f"{_PREFIX}{name} = {shown} ({source or 'given by the program'}): allowed is {error}"
        ) from None


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def _find(
    conf: Mapping[str, Any] | None, environ: Mapping[str, str], directory: str | os.PathLike[str] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values that are set anywhere, as they stand there, and where each one comes from."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    places = [_from_pyproject(directory), _from_environment(environ)]
    if conf is not None:
        places = [_from_expiry(conf), *places, _from_conf(conf)]
    for place in places:  # the later ones win
        for name, value, source in place:
            values[name], sources[name] = value, source
    return values, sources


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for key, value in environ.items():
        if key.startswith(_PREFIX.upper()) and not key.startswith(_TEST_PREFIX):
            name = key[len(_PREFIX) :].lower()
            if name not in _CHECKS:
                hint = _did_you_mean(key, (_PREFIX.upper() + known.upper() for known in _CHECKS))
                warnings.warn(f"{key} in the environment is no setting of Kathikon{hint}", SettingWarning, stacklevel=2)
            elif value.strip():
                yield name, value.strip(), f"environment variable {key}"


def _from_pyproject(directory: str | os.PathLike[str] | None) -> Iterator[tuple[str, Any, str]]:
    try:
        start = Path(directory or os.curdir).resolve()
        path = next((path for folder in (start, *start.parents) if (path := folder / "pyproject.toml").is_file()), None)
        data = path.read_bytes() if path else b""
    except OSError:  # a directory that is gone, or that may not be read
        return
    try:
        tool = tomllib.loads(data.decode()).get("tool", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read for [tool.kathikon]: {error}") from error
    table = tool.get("kathikon", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise SettingError(f"tool.kathikon = {table!r} in {path}: allowed is a table, [tool.kathikon]")
    for name, value in table.items():
        if name not in _CHECKS:
            raise SettingError(
                f"{name} in [tool.kathikon] of {path} is no setting of Kathikon{_did_you_mean(name, _CHECKS)}"
            )
        yield name, value, f"[tool.kathikon] in {path}"


def _from_expiry(conf: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """What Celery's own settings say of retention. They have defaults, which say nothing."""
    names = {"result_expires": ("completed", "cancelled", "discarded"), "result_failure_expires": ("dead",)}
    found = [name for name in names if _is_set(conf, name)]
    if found:
        kept = {state: conf[name] or None for name in found for state in names[name]}
        yield "retention_period", kept, f"{' and '.join(found)} in app.conf"


def _is_set(conf: Mapping[str, Any], name: str) -> bool:
    """Whether *conf* has a setting of Celery's from anywhere but Celery's defaults.

    Celery's own answer, `value_set_for`, knows only from 5.7 on settings that are not read yet or have a namespace.
    """
    _ = conf.get(name)  # has Celery read them
    maps = conf.maps[:-1] if hasattr(conf, "maps") else [conf]  # the last one has the defaults
    namespaced = f"{getattr(conf, 'prefix', None) or ''}{name}"
    spellings = {name, namespaced, namespaced.upper(), f"CELERY_{name}".upper(), f"CELERY_TASK_{name}".upper()}
    return any(spelling in one for spelling in spellings for one in maps)


def _from_conf(conf: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    celery_timezone = getattr(conf, "timezone", None)  # a property of Celery's that knows Django's TIME_ZONE as well
    if isinstance(getattr(celery_timezone, "key", celery_timezone), str):
        yield "timezone", celery_timezone, "timezone in app.conf"
    # In an app with a namespace Celery looks for "kathikon_x" as "CELERY_KATHIKON_X" first (ConfigurationView).
    namespace: str = getattr(conf, "prefix", None) or ""
    names = {_PREFIX + name: name for name in _CHECKS}
    spelled = {key: (namespace + key).upper() if namespace.isupper() else namespace + key for key in names}
    for key, name in names.items():
        value = conf.get(key)
        # None is how Celery and many Django projects say that nothing is set; here it means something of its own.
        if value is not None or (name == "retention_period" and key in conf):
            yield name, value, f"{spelled[key]} in app.conf"
    for key in conf:
        bare = str(key).removeprefix(namespace)
        if not bare.lower().startswith(_PREFIX) or key in names or key in spelled.values():
            continue
        if isinstance(conf.get(key), ModuleType):  # a configuration module that says "import kathikon_celery"
            continue
        close = get_close_matches(bare.lower(), list(spelled), 1)
        hint = f"; did you mean {spelled[close[0]]}?" if close else ""
        raise SettingError(f"{key} in app.conf is no setting of Kathikon{hint}")
