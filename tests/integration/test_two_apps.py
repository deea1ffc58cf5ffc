"""Two apps in one process, each on its own database."""

from __future__ import annotations

import pickle
from pathlib import Path

import kombu.pools
from celery import Celery
from celery.contrib.testing.app import setup_default_app
from kombu import Connection

from kathikon_celery import EmbeddedWorker
from kathikon_celery.storage import Storage
from tests.support import apps


def make(folder: Path, name: str, **conf: object) -> Celery:
    app = apps.create_app(name, kathikon_database_url=f"sqlite:///{folder / name}.db", **conf)

    @app.task(name="whose", shared=False)
    def whose() -> str:
        return name

    return app


def test_each_publishes_to_its_own_database_whichever_is_current(tmp_path: Path) -> None:
    one, two = make(tmp_path, "one"), make(tmp_path, "two")
    for current in (one, two):
        with setup_default_app(current):
            for app, other in ((one, two), (two, one)):
                sent = app.tasks["whose"].delay()
                assert Storage.for_app(app).fetch(sent.id) is not None
                assert Storage.for_app(other).fetch(sent.id) is None
    assert one.pool is not two.pool
    assert kombu.pools.connections[one.connection_for_write()] is one.pool


def test_each_has_its_own_worker(tmp_path: Path) -> None:
    one, two = make(tmp_path, "one"), make(tmp_path, "two")
    with EmbeddedWorker(one), EmbeddedWorker(two):
        sent = [(app, app.send_task("whose")) for app in (one, two) * 3]
        assert [result.get(timeout=60) for _, result in sent] == [app.main for app, _ in sent]


def test_two_apps_on_one_database_have_settings_of_their_own(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    one = apps.create_app("one", kathikon_database_url=url, kathikon_result="discard", kathikon_max_attempts=3)
    two = apps.create_app("two", kathikon_database_url=url, kathikon_lease=5, kathikon_queues="two:1")
    first, second = (Storage.for_app(app) for app in (one, two))
    assert (first.settings.result, first.settings.max_attempts, first.settings.lease) == ("discard", 3, 20.0)
    assert (second.settings.result, second.settings.max_attempts, second.settings.lease) == ("store", 20, 5.0)
    assert first is Storage.for_app(one)
    assert first.database is second.database  # with its connections
    for app in (one, two):
        sent = app.tasks[apps.add.name].delay(1, 1)
        assert second.fetch(sent.id).max_attempts == (3 if app is one else 20)  # type: ignore[union-attr]
    with EmbeddedWorker(one):
        result = one.tasks[apps.add.name].delay(1, 2)
        result.get(timeout=60)
        assert result.result is None
    with EmbeddedWorker(two, queues="celery,two"):
        assert two.tasks[apps.add.name].delay(1, 2).get(timeout=60) == 3


def test_a_connection_survives_being_copied_and_pickled(tmp_path: Path) -> None:
    app = make(tmp_path, "one")
    connection = app.connection_for_write()
    for copy in (connection.clone(), pickle.loads(pickle.dumps(connection))):
        with copy as channel_owner:
            assert channel_owner.transport.storage is Storage.for_app(app)


def test_a_connection_of_plain_kombu_has_no_app(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/plain.db"
    with Connection(f"kathikon+{url}") as connection:
        assert connection.transport.storage.database.url.database == f"{tmp_path}/plain.db"
