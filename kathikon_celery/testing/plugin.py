"""Fixtures for tests of an app on Kathikon. pytest finds them wherever this package is installed.

Each of them may be overridden in a ``conftest.py``; all others use the `kathikon_database_url`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery import Celery

    from kathikon_celery import EmbeddedWorker
    from kathikon_celery.storage import Storage

#: Seconds that a test's worker has for its running tasks when the test has ended.
PATIENCE = 30.0


@pytest.fixture
def kathikon_database_url(tmp_path: Path) -> str:
    """The database of this test: a SQLite file that does not exist yet. Override it to test on another database."""
    return f"sqlite:///{tmp_path / 'kathikon-test.db'}"


@pytest.fixture
def kathikon_storage(kathikon_database_url: str) -> Iterator[Storage]:
    """The storage of this test: empty tables, and default settings, but publishing does not wait for the disk."""
    from kathikon_celery.settings import Settings
    from kathikon_celery.storage import Storage

    storage = Storage(settings=Settings(database_url=kathikon_database_url, copies="disc", publish_durability="server"))
    storage.setup()
    yield storage
    storage.close()


@pytest.fixture
def kathikon_app(kathikon_database_url: str) -> Iterator[Celery]:
    """An app on the database of this test. It is the current app, and has all shared tasks and its own.

    Override it to test your own app::

        @pytest.fixture
        def kathikon_app(kathikon_database_url):
            with isolated(proj.celery.app, kathikon_database_url) as app:
                yield app
    """
    from kathikon_celery.testing.isolation import ScratchApp, isolated

    with ScratchApp("kathikon_test", set_as_current=False) as app:
        app.config_from_object("kathikon_celery.config")
        with isolated(app, kathikon_database_url):
            yield app


@pytest.fixture
def kathikon_worker_options() -> dict[str, Any]:
    """Arguments of the `EmbeddedWorker` of this test, such as ``{"pool": "solo"}``."""
    return {}


@pytest.fixture
def kathikon_worker(kathikon_app: Celery, kathikon_worker_options: dict[str, Any]) -> Iterator[EmbeddedWorker]:
    """A worker in this process that runs what `kathikon_app` publishes, with real claims, acks and retries."""
    from kathikon_celery import EmbeddedWorker

    worker = EmbeddedWorker(kathikon_app, **kathikon_worker_options).start()
    yield worker
    worker.stop(PATIENCE)


@pytest.fixture
def mock_storage() -> Storage:
    """A mock of the storage without jobs, to be injected: ``Promoter(storage=mock_storage, interval=1.0).step()``."""
    from kathikon_celery.testing.doubles import storage_double

    return storage_double()


@pytest.fixture
def use_mock_storage(mock_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """`mock_storage`, in place of the storage of every app in this process while the test runs."""
    from kathikon_celery.storage import Storage

    monkeypatch.setattr(Storage, "shared", lambda *_: mock_storage)
    return mock_storage
