from __future__ import annotations

import copy
import math
import pickle
import sys
import types
from datetime import timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from kathikon_celery import settings as module
from kathikon_celery.job import State
from kathikon_celery.settings import (
    QueueSettings,
    SettingError,
    Settings,
    SettingWarning,
    absolute,
    mask,
    parse_url,
    shown,
)

DEFAULTS = {
    "database_url": "sqlite:///kathikon.db",
    "schema": None,
    "wake": "auto",
    "pool_size": 5,
    "queues": {"default": QueueSettings("default", 10, ())},
    "poll_interval": 0.2,
    "scheduler_interval": 1.0,
    "prune_interval": 60.0,
    "retention_period": {"completed": 604800.0, "cancelled": 604800.0, "discarded": 604800.0, "dead": None},
    "max_attempts": 20,
    "retry_failed": False,
    "rate_limits": "worker",
    "insert_many_chunk_size": 500,
    "timezone": "UTC",
    "result": "store",
    "storage_backend": "kathikon_celery.storage.sql:SQLBackend",
    "copies": "auto",
    "lease": 20.0,
    "publish_durability": "disk",
    "worker_durability": "server",
    "claim_horizon": 0.05,
    "migrate": True,
    "metrics_port": None,
    "metrics_host": "127.0.0.1",
}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Settings.load with nothing around it but what the test gives."""

    def load(conf: Any = None, environ: dict[str, str] | None = None, pyproject: str | None = None) -> Settings:
        (tmp_path / "pyproject.toml").write_text(pyproject or "", "utf-8")
        return Settings.load(conf, environ or {}, tmp_path)

    return load


def make_app(source: dict[str, Any] | None = None, namespace: str | None = None, **conf: Any) -> Celery:
    app = Celery("settings", set_as_current=False)
    app.config_from_object(types.SimpleNamespace(**source or {}), namespace=namespace)
    app.conf.update(conf)
    return app


def test_defaults(load: Any) -> None:
    settings = load()
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert settings == Settings()
    assert settings.sources == {}


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text("utf-8")
    assert DEFAULTS.keys() == module._CHECKS.keys()
    for name in DEFAULTS:
        assert f"### `{name}`" in text
        assert f"`KATHIKON_{name.upper()}`" in text


# Where a value comes from


def test_conf_before_environment_before_pyproject_before_default(load: Any) -> None:
    pyproject = "[tool.kathikon]\npoll_interval = 1\nlease = 10\nmax_attempts = 3\n"
    environ = {"KATHIKON_POLL_INTERVAL": "2", "KATHIKON_LEASE": "11"}
    settings = load({"kathikon_poll_interval": 3}, environ, pyproject)
    assert (settings.poll_interval, settings.lease, settings.max_attempts) == (3, 11, 3)
    assert settings.prune_interval == 60
    assert settings.sources["poll_interval"] == "kathikon_poll_interval in app.conf"
    assert settings.sources["lease"] == "environment variable KATHIKON_LEASE"
    assert settings.sources["max_attempts"].startswith("[tool.kathikon] in ")


def test_celerys_expiry_counts_where_nothing_names_the_retention(load: Any) -> None:
    week, kept = 604800.0, {"completed": 60.0, "cancelled": 60.0, "discarded": 60.0, "dead": None}
    assert Settings.load(make_app(result_expires=60).conf, {}).retention_period == kept
    assert Settings.load(make_app(result_expires=timedelta(minutes=1)).conf, {}).retention_period == kept
    both = make_app(result_expires=60, result_failure_expires=5)
    assert Settings.load(both.conf, {}).retention_period == {**kept, "dead": 5.0}
    assert Settings.load(make_app({"CELERY_RESULT_EXPIRES": 60}, "CELERY").conf, {}).retention_period == kept
    for never in (None, 0):
        assert set(Settings.load(make_app(result_expires=never).conf, {}).retention_period.values()) == {None}
    assert Settings.load(make_app().conf, {}).retention_for("completed") == week  # Celery's default says nothing
    environ = {"KATHIKON_RETENTION_PERIOD": "7"}
    assert Settings.load(both.conf, environ).retention_period == {**dict.fromkeys(kept, 7.0), "dead": None}
    assert load({"result_expires": 60, "kathikon_retention_period": 8}).retention_for("completed") == 8
    with pytest.raises(SettingError, match="result_expires in"):
        load({"result_expires": -1})


def test_nearest_pyproject_upward_counts(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.kathikon]\nlease = 9\n")
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert Settings.load(None, {}, below).lease == 9
    (below.parent / "pyproject.toml").write_text("[project]\nname = 'nearer'\n")
    assert Settings.load(None, {}, below).lease == 20


def test_a_pyproject_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes("[project]\nauthors = ['Jürgen']\n".encode("latin-1"))
    with pytest.raises(SettingError, match=r"pyproject.toml cannot be read for \[tool.kathikon\]: 'utf-8' codec"):
        Settings.load(None, {}, tmp_path)


def test_pyproject_is_looked_for_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.kathikon]\nlease = 9\n")
    monkeypatch.chdir(tmp_path)
    assert Settings.load(None, {}).lease == 9


def test_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Settings.load(None, {}).lease == 20


def test_empty_variable_and_none_in_conf_are_not_set(load: Any) -> None:
    settings = load({"kathikon_lease": None}, {"KATHIKON_DATABASE_URL": " ", "KATHIKON_LEASE": "8"})
    assert settings.database_url == DEFAULTS["database_url"]
    assert settings.lease == 8


def test_none_is_a_retention(load: Any) -> None:
    assert (
        load({"kathikon_retention_period": None}, {"KATHIKON_RETENTION_PERIOD": "5"}).retention_for("completed") is None
    )


def test_conf_of_an_app(load: Any) -> None:
    app = make_app({"kathikon_lease": 5, "task_acks_late": True}, kathikon_queues="mail:2")
    settings = load(app.conf)
    assert settings.lease == 5
    assert settings.queues == {"mail": QueueSettings("mail", 2)}


def test_conf_of_an_app_that_is_not_configured_yet(load: Any) -> None:
    app = Celery("settings", set_as_current=False)
    app.conf.kathikon_lease = 5
    assert load(app.conf).lease == 5


def test_conf_with_django_namespace(load: Any) -> None:
    app = make_app({"CELERY_KATHIKON_LEASE": 5, "CELERY_TIMEZONE": "Asia/Tokyo", "DEBUG": True}, "CELERY")
    settings = load(app.conf)
    assert settings.lease == 5
    assert settings.sources["lease"] == "CELERY_KATHIKON_LEASE in app.conf"
    assert settings.timezone == "Asia/Tokyo"


@pytest.mark.parametrize(
    ("source", "namespace", "hint"),
    [
        ({"CELERY_KATHIKON_QUEUE": {}}, "CELERY", "CELERY_KATHIKON_QUEUES"),
        ({"KATHIKON_QUEUES": {}}, "CELERY", "CELERY_KATHIKON_QUEUES"),
        ({"KATHIKON_QUEUES": {}}, None, "kathikon_queues"),
        ({"kathikon_databaseurl": "x"}, None, "kathikon_database_url"),
        ({"proj_kathikon_leese": 1}, "proj", "proj_kathikon_lease"),
    ],
)
def test_unknown_key_in_conf(load: Any, source: dict[str, Any], namespace: str | None, hint: str) -> None:
    app = make_app(source, namespace)
    with pytest.raises(SettingError, match=rf"{next(iter(source))} in app\.conf .*did you mean {hint}\?$"):
        load(app.conf)


def test_module_named_kathikon_celery_in_conf_is_no_setting(load: Any) -> None:
    assert load(make_app({"kathikon_celery": types.ModuleType("kathikon_celery")}).conf) == Settings()


def test_unknown_variable_is_one_warning(load: Any) -> None:
    with pytest.warns(SettingWarning, match="KATHIKON_LEESE in the environment .*did you mean KATHIKON_LEASE") as seen:
        assert [load(None, {"KATHIKON_LEESE": "3"}).lease for _ in range(3)] == [20, 20, 20]
    assert [one.filename for one in seen] == ["<environment>"]  # no line of code is to blame
    load(None, {"KATHIKON_TEST_ANYTHING": "x", "OTHER": "y"})  # warnings are errors in this suite


def test_unknown_key_in_pyproject(load: Any) -> None:
    with pytest.raises(SettingError, match=r"poll-interval in \[tool\.kathikon\] of .*pyproject\.toml.*poll_interval"):
        load(pyproject="[tool.kathikon]\npoll-interval = 1\n")


@pytest.mark.parametrize("text", ["[tool\n", "[tool]\nkathikon = 3\n"])
def test_pyproject_that_cannot_be_used(load: Any, text: str) -> None:
    with pytest.raises(SettingError, match=r"pyproject\.toml"):
        load(pyproject=text)


def test_given_looks_at_environment_and_pyproject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.given("timezone") is None
    monkeypatch.setenv("KATHIKON_TIMEZONE", "Asia/Tokyo")
    monkeypatch.setenv("KATHIKON_LEASE", "not asked for")
    assert Settings.given("timezone") == "Asia/Tokyo"


# What is allowed

WRONG = [
    ("poll_interval", ["0.001", 61, "abc", True, math.nan, [], "nan"], "seconds from 0.01 to 60"),
    ("scheduler_interval", [0.04, 61], "seconds from 0.05 to 60"),
    ("prune_interval", [0, math.inf, 1e10], "seconds from 0.1 to 1e+09"),
    (
        "retention_period",
        [0, -1, "soon", {"completed": 0}, {"done": 5}, "completed:x", 1e12],
        "seconds above 0 and up to 1e+11",
    ),
    ("max_attempts", [0, 1.5, "many", True, 2**31], "a whole number from 1 to 2147483647"),
    ("retry_failed", ["maybe", 2, 0.5], "true or false"),
    ("insert_many_chunk_size", [0, 10001], "a whole number from 1 to 10000"),
    ("timezone", ["Europe/Sparta", "", 3, "../etc"], "the name of a time zone"),
    ("result", ["keep", ["store"]], "store or discard"),
    ("storage_backend", ["a.b", "a:", 3, "a b:c"], "package.module:Class"),
    ("copies", ["memory"], "auto or ram or disc"),
    ("lease", [1, 4000], "seconds from 2 to 3600"),
    ("publish_durability", ["fsync"], "disk or server"),
    ("worker_durability", ["none"], "disk or server"),
    ("claim_horizon", [-1, 6], "seconds from 0 to 5"),
    ("database_url", ["nonsense", 5, "oracle://h/d", "sqlite://", "sqlite:///:memory:"], ""),
    ("queues", [{}, "", 5, {"": 1}, {3: 1}, "a:b", "a:0", "a,a", {"a": 0}, {"a": "x"}, {"a": True}], ""),
]


@pytest.mark.parametrize(("name", "value", "allowed"), [(n, v, a) for n, values, a in WRONG for v in values])
def test_wrong_value(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"kathikon_{name} = {value!r} (given by the program): allowed is ")
    assert allowed in message
    with pytest.raises(SettingError, match=f"^kathikon_{name} = .* \\(kathikon_{name} in app.conf\\)"):
        Settings.load({f"kathikon_{name}": value}, {}, "/")


def test_error_names_the_place(load: Any) -> None:
    with pytest.raises(SettingError, match=r"= 'x' \(environment variable KATHIKON_LEASE\): allowed is seconds from 2"):
        load(None, {"KATHIKON_LEASE": "x"})
    with pytest.raises(SettingError, match=r"= 'x' \(\[tool\.kathikon\] in .*pyproject\.toml\)"):
        load(pyproject="[tool.kathikon]\nlease = 'x'\n")


def test_long_wrong_value_is_cut() -> None:
    with pytest.raises(SettingError) as caught:
        Settings(timezone="x" * 10000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("poll_interval", "0.5", 0.5),
        ("lease", timedelta(minutes=1), 60.0),
        ("max_attempts", "3", 3),
        ("retry_failed", "yes", True),
        ("retry_failed", 0, False),
        ("timezone", ZoneInfo("Europe/Athens"), "Europe/Athens"),
        ("claim_horizon", 0, 0.0),
    ],
)
def test_right_value(name: str, value: Any, expected: Any) -> None:
    got = getattr(Settings(**{name: value}), name)
    assert got == expected
    assert type(got) is type(expected)


def test_checked_settings_stay_as_they_are() -> None:
    settings = Settings(queues={"a": {"concurrency": None, "tasks": ["x.*"]}}, retention_period="dead:5")  # type: ignore[arg-type]
    again = Settings(**{name: getattr(settings, name) for name in DEFAULTS})
    assert again == settings
    assert hash(again) == hash(settings)
    assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == settings


# Queues


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("default:10,emails:5", [QueueSettings("default", 10), QueueSettings("emails", 5)]),
        (" a , b:2 ,c:none", [QueueSettings("a", 10), QueueSettings("b", 2), QueueSettings("c", None)]),
        ("tenant:blue:3", [QueueSettings("tenant:blue", 3)]),
        (["a", "b:1"], [QueueSettings("a"), QueueSettings("b:1")]),
        ({"a": None, "b": "4"}, [QueueSettings("a", None), QueueSettings("b", 4)]),
        ({"a": {"tasks": "x"}, "b": {"concurrency": 1}}, [QueueSettings("a", 10, ("x",)), QueueSettings("b", 1)]),
    ],
)
def test_forms_of_queues(value: Any, expected: list[QueueSettings]) -> None:
    assert list(Settings(queues=value).queues.values()) == expected


def test_queues_in_pyproject(load: Any) -> None:
    queues = load(pyproject='[tool.kathikon.queues]\ndefault = 4\nmail = { concurrency = 2, tasks = ["m.*"] }\n').queues
    assert list(queues.values()) == [QueueSettings("default", 4), QueueSettings("mail", 2, ("m.*",))]


def test_wrong_key_of_a_queue() -> None:
    with pytest.raises(SettingError, match="'concurency'; did you mean concurrency"):
        Settings(queues={"a": {"concurency": 3}})  # type: ignore[dict-item]
    with pytest.raises(SettingError, match="for queue 'a' tasks that are a list"):
        Settings(queues={"a": {"tasks": [3]}})  # type: ignore[dict-item]


queue_names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=","), min_size=1).filter(
    lambda name: name == name.strip()
)


@given(st.dictionaries(queue_names, st.none() | st.integers(1), min_size=1))
def test_string_of_queues_round_trip(queues: dict[str, int | None]) -> None:
    text = ",".join(f"{name}:{'none' if concurrency is None else concurrency}" for name, concurrency in queues.items())
    settings = Settings(queues=text)  # type: ignore[arg-type]
    assert {queue.name: queue.concurrency for queue in settings.queues.values()} == queues
    assert list(settings.queues) == list(queues)
    assert settings == Settings(queues=queues)  # type: ignore[arg-type]


@given(st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_queues_are_taken_or_refused(value: Any) -> None:
    try:
        settings = Settings(queues=value)
    except SettingError:
        return
    assert all(name == queue.name and (queue.concurrency or 1) >= 1 for name, queue in settings.queues.items())


# Retention


@pytest.mark.parametrize(
    ("value", "completed", "dead"),
    [
        (5, 5, None),
        ("604800", 604800, None),
        ("none", None, None),
        (timedelta(days=1), 86400, None),
        ("completed:3600,dead:none", 3600, None),
        ("dead:60", 604800, 60),
        ({"completed": None, "dead": 7}, None, 7),
        ({State.DEAD: 7}, 604800, 7),
    ],
)
def test_retention(value: Any, completed: float | None, dead: float | None) -> None:
    settings = Settings(retention_period=value)
    assert settings.retention_for(State.COMPLETED) == settings.retention_for("completed") == completed
    assert settings.retention_for(State.DEAD) == dead
    assert settings.retention_for(State.RUNNING) is None


# Time zone


def test_celery_timezone_counts_before_the_environment(load: Any) -> None:
    environ = {"KATHIKON_TIMEZONE": "Asia/Tokyo"}
    assert load(make_app().conf, environ).timezone == "Asia/Tokyo"
    assert load(make_app(timezone="Europe/Athens").conf, environ).timezone == "Europe/Athens"
    assert (
        load(make_app(timezone="Europe/Athens", kathikon_timezone="Europe/Oslo").conf, environ).timezone
        == "Europe/Oslo"
    )


def test_timezone_of_django_counts(load: Any) -> None:
    assert load(make_app({"TIME_ZONE": "Asia/Tokyo"}, "CELERY").conf).timezone == "Asia/Tokyo"


def test_timezone_suggestion() -> None:
    with pytest.raises(SettingError, match="did you mean Europe/Athens"):
        Settings(timezone="Europe/Athen")


# Databases and passwords


@pytest.mark.parametrize(
    ("given_url", "expected"),
    [
        ("postgres://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgresql://u:p%40@h:1/d?sslmode=require", "postgresql+psycopg://u:p%40@h:1/d?sslmode=require"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
        ("sqlite+pysqlite:////var/k.db", "sqlite:////var/k.db"),
    ],
)
def test_url_is_normalized(given_url: str, expected: str) -> None:
    assert Settings(database_url=given_url).database_url == expected
    assert parse_url(parse_url(given_url)).render_as_string(hide_password=False) == expected


@pytest.mark.parametrize("kind", ["mysql", "mariadb", "oracle"])
def test_other_database_is_refused_with_a_remedy(kind: str) -> None:
    with pytest.raises(SettingError, match=r"a URL that begins with one of sqlite://, postgresql://$"):
        Settings(database_url=f"{kind}://h/d")


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_other_driver_is_refused_with_a_remedy(driver: str) -> None:
    with pytest.raises(SettingError, match=r"postgresql\+psycopg://, or just postgresql://"):
        Settings(database_url=f"postgresql+{driver}://h/d")


def test_a_file_is_shown_with_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(absolute(parse_url("sqlite:///kathikon.db"))) == f"sqlite:///{tmp_path}/kathikon.db"
    url = parse_url("postgresql://u:p@h/d")
    assert shown(absolute(url)) == "postgresql+psycopg://u:***@h/d"
    assert shown(url, include_password=True) == "postgresql+psycopg://u:p@h/d"


SECRET = "hush-hush"


@pytest.mark.parametrize(
    "url",
    [
        f"oracle://app:{SECRET}@h/d",
        f"postgresql//app:{SECRET}@h/d",
        f"postgresql://app:{SECRET}",
        f"postgresql://app:{SECRET}/with/slash@h:x/d",
        f"postgresql://app:a@{SECRET}@h:x/d",
        f"postgresql://app:a@{SECRET}@h:1/d",
        f"postgresql+psycopg2://h/d?password={SECRET}&sslmode=require",
        f"postgresql+psycopg2://h/d?sslmode=require&sslpassword={SECRET}",
        f"postgresql://app:{SECRET}@h:port/d",
        f"postgresql://app:a@b/{SECRET}@h/d",
        f"postgresql://app:a@{SECRET}/b@h",
    ],
)
def test_no_password_in_errors(url: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings(database_url=url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert SECRET not in mask(url)
    with pytest.raises(SettingError) as caught:
        Settings(queues={"a": url})  # type: ignore[dict-item]
    assert SECRET not in str(caught.value)


def test_no_password_in_repr_and_str() -> None:
    settings = Settings(database_url=f"postgresql://app:{SECRET}@h/d?sslpassword={SECRET}")
    assert SECRET not in repr(settings) + str(settings) + f"{settings}"
    assert "postgresql+psycopg://app:***@h/d" in repr(settings)


@given(st.text(min_size=1), st.sampled_from(["postgresql://app:{}@h/d", "kathikon+postgresql+psycopg://app:{}@h/d"]))
def test_mask_hides_any_password(password: str, url: str) -> None:
    assert mask(url.format(password)) == url.format("***")


@pytest.mark.parametrize(
    "url", ["sqlite:///kathikon.db", "postgresql://app@h:5432/d", "postgresql://h:5432/d", "kathikon://"]
)
def test_mask_leaves_the_rest(url: str) -> None:
    assert mask(url) == url


# RAM


def shell(kernel: object | None) -> types.ModuleType:
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=kernel)
    return ipython  # type: ignore[no-any-return]


def test_ram_in_a_notebook_without_a_database(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not load().in_ram
    monkeypatch.setitem(sys.modules, "IPython", shell(kernel=None))
    assert not load().in_ram
    monkeypatch.setitem(sys.modules, "IPython", shell(kernel=object()))
    assert load().in_ram
    assert not load(None, {"KATHIKON_COPIES": "disc"}).in_ram
    assert not load(None, {"KATHIKON_DATABASE_URL": "sqlite:///jobs.db"}).in_ram


def test_ram_and_a_database_contradict_each_other(load: Any) -> None:
    assert load({"kathikon_copies": "ram"}).in_ram
    with pytest.raises(SettingError, match="remove one of the two"):
        load({"kathikon_copies": "ram"}, {"KATHIKON_DATABASE_URL": "postgresql://h/d"})
