from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app
from kombu import pools

from kathikon_celery.storage import Storage
from kathikon_celery.testing.isolation import isolated


def make_app(**conf: Any) -> Celery:
    app = Celery("proj", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.update(conf)

    @app.task(name="proj.add", shared=False)
    def add(x: int, y: int) -> int:
        return x + y

    assert app.conf["broker_url"]  # the configuration is read
    return app


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    return [f"sqlite:///{tmp_path}/{name}.db" for name in ("own", "one", "two")]


def jobs_in(url: str) -> int:
    storage = Storage(url)
    storage.setup()
    try:
        return len(storage.all())
    finally:
        storage.close()


def test_jobs_go_to_the_given_database_and_then_to_the_old_one_again(urls: list[str]) -> None:
    own, one, two = urls
    app = make_app(broker_url=f"kathikon+{own}")
    add = app.tasks["proj.add"]
    add.delay(1, 2)
    app.backend.store_result("stored", 1, "SUCCESS")
    for url in (one, two, one):
        with isolated(app, url) as same:
            assert same is app
            result = add.delay(1, 2)
            assert result.state == "PENDING"
            assert app.AsyncResult("stored").state == "PENDING"
    add.delay(1, 2)
    assert app.AsyncResult("stored").state == "SUCCESS"
    assert [jobs_in(url) for url in urls] == [3, 2, 1]


def test_the_configuration_is_what_it_was(urls: list[str]) -> None:
    app = make_app(kathikon_database_url=urls[0])
    before, current = dict(app.conf.changes), current_app.main

    def test() -> None:
        with isolated(app, urls[1]):
            app.conf.task_always_eager = True
            app.conf.broker_url = "kathikon+sqlite:///elsewhere.db"
            assert current_app.main == "proj"
            raise LookupError

    with pytest.raises(LookupError):
        test()
    assert dict(app.conf.changes) == before
    assert current_app.main == current


def test_no_connection_is_left(urls: list[str]) -> None:
    app = make_app()
    before = set(map(id, pools.connections.values())), set(map(id, pools.producers.values()))
    with isolated(app, urls[1]):
        app.tasks["proj.add"].delay(1, 2)
        with app.pool.acquire() as connection:
            assert connection.connected or connection.connect()
    assert (set(map(id, pools.connections.values())), set(map(id, pools.producers.values()))) == before


@pytest.mark.parametrize(
    "conf", [{"kathikon_copies": "ram"}, {"broker_read_url": "redis://h", "broker_write_url": "redis://h"}]
)
def test_whatever_the_app_was_configured_for(urls: list[str], conf: dict[str, Any]) -> None:
    app = make_app(**conf)
    with isolated(app, urls[1]):
        app.tasks["proj.add"].delay(1, 2)
    assert jobs_in(urls[1]) == 1


def test_an_app_with_another_broker(urls: list[str]) -> None:
    app = Celery("rabbit", broker="amqp://host", backend="redis://host", set_as_current=False)
    with isolated(app, urls[1]):
        result = app.send_task("proj.add", (1, 2))
        assert result.state == "PENDING"
    assert jobs_in(urls[1]) == 1
    assert (app.conf.broker_url, app.conf.result_backend) == ("amqp://host", "redis://host")


def test_a_django_project(urls: list[str]) -> None:
    settings = types.ModuleType("settings")
    exec(f"from kathikon_celery.django import *\nCELERY_KATHIKON_DATABASE_URL = {urls[0]!r}", settings.__dict__)
    app = Celery("django", set_as_current=False)
    app.config_from_object(settings, namespace="CELERY")
    with isolated(app, urls[1]):
        app.send_task("proj.add", (1, 2))
    assert jobs_in(urls[1]) == 1
    assert str(Storage.for_app(app, setup=False).database.url) == urls[0]


@pytest.mark.parametrize("variable", ["CELERY_BROKER_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"])
def test_a_broker_in_the_environment_is_refused(
    urls: list[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    app = make_app()
    monkeypatch.setenv(variable, "redis://:secret@production/0")
    before = dict(app.conf.changes)
    masked = rf"{variable}.* 'redis://:\*\*\*@production/0'; take it out"
    with pytest.raises(RuntimeError, match=masked) as raised, isolated(app, urls[1]):
        pass
    assert "secret" not in str(raised.value)
    assert dict(app.conf.changes) == before


def test_workers_send_no_schedules_meanwhile(urls: list[str]) -> None:
    from kathikon_celery.worker.services.registry import SERVICES

    (scheduler,) = [entry for entry in SERVICES if entry.name == "scheduler"]
    app = make_app()
    assert scheduler.is_wanted(app)
    with isolated(app, urls[0]):
        assert not scheduler.is_wanted(app)
    assert scheduler.is_wanted(app)
