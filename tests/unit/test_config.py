from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.defaults import SETTING_KEYS
from kombu.transport import TRANSPORT_ALIASES

from kathikon_celery import config
from kathikon_celery import django as django_config
from kathikon_celery.routing import ConfiguredQueues, Router
from kathikon_celery.settings import SettingError, Settings


@pytest.fixture(autouse=True)
def no_pyproject_upward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_app(source: Any = "kathikon_celery.config", namespace: str | None = None) -> Celery:
    app = Celery("config", set_as_current=False)
    app.config_from_object(source, namespace=namespace)
    return app


def own_module(text: str) -> types.ModuleType:
    module = types.ModuleType("celeryconfig")
    exec(text, module.__dict__)
    return module


def check(app: Celery) -> None:
    """What every way to configure an app must lead to."""
    assert app.conf.broker_url == "kathikon://"
    assert app.conf.result_backend == "kathikon"
    assert app.conf.task_acks_late is app.conf.task_reject_on_worker_lost is True
    assert app.conf.task_default_queue == "default"
    assert isinstance(app.conf.task_routes[0], Router)
    assert isinstance(app.conf.task_queues, ConfiguredQueues)
    app.finalize()
    assert app.tasks["celery.backend_cleanup"].acks_late is True


def test_config_from_object() -> None:
    check(make_app())
    assert TRANSPORT_ALIASES["kathikon"] == "kathikon_celery.transport:Transport"


def test_own_module_with_star_import() -> None:
    app = make_app(
        own_module("import kathikon_celery\nfrom kathikon_celery.config import *\nkathikon_queues = 'a,b'\n")
    )
    check(app)
    assert list(app.amqp.queues) == ["a", "b"]


def test_own_module_overrides() -> None:
    app = make_app(
        own_module("from kathikon_celery.config import *\ntask_acks_late = False\ntimezone = 'Asia/Tokyo'\n")
    )
    assert app.conf.task_acks_late is False
    assert str(app.timezone) == "Asia/Tokyo"


def test_django_namespace() -> None:
    settings = own_module(
        "from kathikon_celery.django import *\n"
        "DEBUG = True\n"
        "TIME_ZONE = 'Europe/Athens'\n"
        "CELERY_KATHIKON_QUEUES = {'mail': {'tasks': ['m.*']}, 'default': 2}\n"
    )
    app = make_app(settings, namespace="CELERY")
    check(app)
    assert list(app.amqp.queues) == ["mail", "default"]
    assert app.amqp.router.route({}, "m.x")["queue"].name == "mail"
    assert str(app.timezone) == Settings.load(app.conf).timezone == "Europe/Athens"


def test_only_settings_that_celery_knows() -> None:
    assert set(config.__all__) <= SETTING_KEYS
    assert dir(config) == config.__all__
    assert django_config.__all__ == [f"CELERY_{name.upper()}" for name in config.__all__]
    with pytest.raises(AttributeError, match="no attribute 'task_acks_early'"):
        config.task_acks_early  # noqa: B018


def test_timezone_is_looked_up_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    monkeypatch.setenv("KATHIKON_TIMEZONE", "Asia/Tokyo")
    assert str(app.timezone) == "Asia/Tokyo"
    monkeypatch.setenv("KATHIKON_TIMEZONE", "Asia/Sparta")
    with pytest.raises(SettingError, match="environment variable KATHIKON_TIMEZONE"):
        make_app().timezone  # noqa: B018


def test_timezone_that_is_not_set_is_left_to_celery() -> None:
    assert config.timezone is None
    assert make_app().uses_utc_timezone()


def test_configuration_can_be_listed() -> None:
    """``inspect conf``, ``celery report`` and the bug report go through all of it."""
    app = make_app()
    table = app.conf.table(with_defaults=True)
    assert table["broker_url"].startswith("kathikon+")  # the database of the current app, which may be another one
    assert "Router()" in app.conf.humanize()
    json.dumps(table, default=repr)


def test_password_is_hidden_in_reports() -> None:
    app = make_app()
    app.conf.kathikon_database_url = "postgresql://u:hush-hush@h/d"
    assert "hush-hush" not in app.conf.humanize()


def test_no_warning_from_celery() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        app = make_app()
        app.finalize()
        assert not app.conf.maybe_warn_deprecated_settings()


def test_importing_it_reads_no_setting(tmp_path: Path) -> None:
    code = "import kathikon_celery.config, os; print(os.listdir())"
    environ = {"KATHIKON_LEASE": "wrong", "PYTHONPATH": str(Path(config.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
