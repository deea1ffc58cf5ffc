"""Every setting of Kathikon: its type, default and check, and the places where it may be set.

For each setting the first one found wins: ``kathikon_<name>`` in ``app.conf``, ``KATHIKON_<NAME>`` in the environment,
``<name>`` in ``[tool.kathikon]`` of the nearest ``pyproject.toml``, the default. All times are seconds.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from click import ClickException

from kathikon_celery.settings import checks
from kathikon_celery.settings.checks import QueueSettings
from kathikon_celery.settings.urls import absolute, checked_url, mask, parse_url, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = [
    "QueueSettings",
    "SettingError",
    "SettingWarning",
    "Settings",
    "absolute",
    "checked_url",
    "mask",
    "parse_url",
    "shown",
]

_PREFIX = "kathikon_"
_TEST_PREFIX = "KATHIKON_TEST_"
_VALUE_LENGTH = 200


class SettingError(ClickException, ValueError):  # so Celery's command line shows it without a traceback
    """A setting has a value that is not allowed, or does not exist. The text names setting, place and remedy."""


class SettingWarning(UserWarning):
    """The environment has a variable ``KATHIKON_…`` that is not a setting."""


def _setting(default: Any, check: Callable[[Any], Any], **options: Any) -> Any:
    return field(default=default, metadata={"check": check}, **options)


@dataclass(frozen=True, repr=False)
class Settings:
    """The settings of one app, checked.

    The constructor takes a value in any form that a setting takes, and keeps it in one form:

    >>> Settings(queues="default:10,emails:5").queues["emails"].concurrency
    5

    Each setting of docs/settings.md is an attribute, without ``kathikon_``: seconds as a float, numbers as an int.

    Raises `SettingError` for a value that is not allowed. Neither `repr` nor an error shows a password.
    """

    #: Where the jobs live: a URL of SQLite or PostgreSQL. A relative file is in the working directory.
    database_url: str = _setting("sqlite:///kathikon.db", checked_url)

    #: The schema of PostgreSQL that has the tables; None: the first one of the search path.
    schema: str | None = _setting(None, checks.schema_name)

    #: Whether processes LISTEN on PostgreSQL (``listen``), or ``poll``; ``auto``: poll behind a connection pooler.
    wake: str = _setting("auto", checks.choice("auto", "listen", "poll"))

    #: Connections of each of two kinds that a process keeps open for their next use.
    pool_size: int = _setting(5, checks.whole_number(0, 50))

    #: The queues that a worker consumes, in order. Tasks that no other setting routes go to the first one.
    queues: Mapping[str, QueueSettings] = _setting("default:10", checks.queues_of, hash=False)

    #: Longest time until a consumer looks at the table again, in case a wake-up was lost.
    poll_interval: float = _setting(0.2, checks.seconds(0.01, 60))

    #: Longest time between two looks of a worker for due jobs.
    scheduler_interval: float = _setting(1.0, checks.seconds(0.05, 60))

    #: Time between two deletions of the ended jobs that are older than their retention.
    prune_interval: float = _setting(60.0, checks.seconds(0.1, checks.LONGEST_WAIT))

    #: For each terminal state, how long a job stays in the table; None is for ever.
    retention_period: Mapping[str, float | None] = _setting(604800.0, checks.retention, hash=False)

    #: Number of lost processes after which a job is dead; with `retry_failed`, also the number of tries.
    max_attempts: int = _setting(20, checks.whole_number(1, checks.LARGEST))

    #: Whether a task that raised is retried: after its n-th failure in ``min(n² * 5, 86400)`` seconds, as in Kathikon.
    retry_failed: bool = _setting(False, checks.boolean)

    #: Whether Celery's ``rate_limit`` is for each worker, as in Celery, or for all workers together ("fleet").
    rate_limits: str = _setting("worker", checks.rate_limits)

    #: Rows in one transaction of a bulk insert.
    insert_many_chunk_size: int = _setting(500, checks.whole_number(1, 10000))

    #: The zone of times without one, and of schedules.
    timezone: str = _setting("UTC", checks.time_zone)

    #: Whether return values are kept (``store``) or not (``discard``).
    result: str = _setting("store", checks.choice("store", "discard"))

    #: The class that stores jobs.
    storage_backend: str = _setting("kathikon_celery.storage.sql:SQLBackend", checks.import_path)

    #: ``disc``: tables in the database; ``ram``: tables that live as long as the process; ``auto``: see `in_ram` and
    #: `in_tests`.
    copies: str = _setting("auto", checks.choice("auto", "ram", "disc"))

    #: A worker that has not renewed its lease for so long is taken for dead.
    lease: float = _setting(20.0, checks.seconds(2, 3600))

    #: When publishing returns, the job is on ``disk``, or committed by the ``server`` only, and lost in a power cut.
    publish_durability: str = _setting("disk", checks.choice("disk", "server"))

    #: As `publish_durability`, for what workers write: claims, acks, results.
    worker_durability: str = _setting("server", checks.choice("disk", "server"))

    #: How many seconds of work, at its present rate, a worker claims ahead.
    claim_horizon: float = _setting(0.05, checks.seconds(0, 5))

    #: Whether Django's ``migrate`` makes the tables, if the database that it migrates is that of the jobs.
    migrate: bool = _setting(True, checks.boolean)

    #: The port at which a worker serves figures for Prometheus; None: none.
    metrics_port: int | None = _setting(None, checks.port)

    #: The address for that.
    metrics_host: str = _setting("127.0.0.1", checks.host)

    #: Name of each setting that was set -> a text that names the place.
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

        >>> Settings.load(app.conf).lease
        20.0

        Arguments:
            conf: an app's ``app.conf``; with a namespace, as in Django, its keys are ``CELERY_KATHIKON_<NAME>``.
                Celery's own ``timezone`` is used if it is set and ``kathikon_timezone`` is not.
            environ: the environment.
            directory: where the search for ``pyproject.toml`` begins and goes upward; the working directory by default.

        Raises `SettingError` for a wrong value and an unknown setting. An unknown variable ``KATHIKON_…`` is only a
        `SettingWarning`, since other programs set variables too (Kubernetes adds some that are named after services).
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
        """Return the value of the setting *name* in the environment or ``pyproject.toml``; None if it is in neither."""
        values, sources = _find(None, os.environ, None)
        return _checked(name, _CHECKS[name], values[name], sources[name]) if name in values else None

    @property
    def in_ram(self) -> bool:
        """Whether the tables live as long as the process: ``ram``, or ``auto`` in a notebook that sets no database."""
        return self.copies == "ram" or (self.copies == "auto" and "database_url" not in self.sources and _in_notebook())

    @property
    def in_tests(self) -> bool:
        """Whether the jobs go to tables in memory because Django's tests run here; not if ``copies`` is ``disc``."""
        tests = getattr(sys.modules.get("django.test.utils"), "_TestState", None)
        return self.copies != "disc" and hasattr(tests, "saved_data")  # since Django's setup_test_environment()

    def retention_for(self, state: str) -> float | None:
        """Return the seconds that a job in *state* stays; None for ever, as in a state that is not terminal."""
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
    """Return the unchecked values that are set anywhere, and the place of each."""
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
                hint = checks.did_you_mean(key, (_PREFIX.upper() + known.upper() for known in _CHECKS))
                _warn_once(f"{key} in the environment is no setting of Kathikon{hint}")
            elif value.strip():
                yield name, value.strip(), f"environment variable {key}"


@cache
def _warn_once(text: str) -> None:
    warnings.warn_explicit(text, SettingWarning, "<environment>", 1)


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
                f"{name} in [tool.kathikon] of {path} is no setting of Kathikon{checks.did_you_mean(name, _CHECKS)}"
            )
        yield name, value, f"[tool.kathikon] in {path}"


def _from_expiry(conf: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield the retention that Celery's own settings give; their defaults do not count."""
    names = {"result_expires": ("completed", "cancelled", "discarded"), "result_failure_expires": ("dead",)}
    found = [name for name in names if _is_set(conf, name)]
    if found:
        kept = {state: conf[name] or None for name in found for state in names[name]}
        yield "retention_period", kept, f"{' and '.join(found)} in app.conf"


def _is_set(conf: Mapping[str, Any], name: str) -> bool:
    """Whether *conf* sets Celery's *name*; Celery's defaults do not count.

    Before 5.7, Celery's `value_set_for` misses settings that are not read yet or have a namespace.
    """
    _ = conf.get(name)  # makes Celery read its configuration
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
        # In Celery and many Django projects None means that nothing is set; for retention_period it is a value.
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
