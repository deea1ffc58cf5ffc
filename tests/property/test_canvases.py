"""Any canvas has the same value, and calls the same callbacks, from real workers as in Celery's eager mode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from hypothesis import given, settings

from tests.property.canvases import canvases
from tests.support.apps import create_app, read_lines
from tests.support.postgresql import new_database
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

_numbers = count()


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def worked_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database of each kind, with a worker that runs all examples."""
    directory = tmp_path_factory.mktemp("canvases")
    with contextmanager(_database)(request, directory) as url, WorkerProcess(url, directory=directory, pool="threads"):
        yield url


def _database(request: pytest.FixtureRequest, directory: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{directory / 'kathikon.db'}"
    else:
        with new_database(request.getfixturevalue("postgresql_server_url")) as url:
            yield url


@pytest.fixture
def app(worked_url: str) -> Iterator[Celery]:
    """A client."""
    app = create_app("client", kathikon_database_url=worked_url)
    app.set_current()
    yield app
    app.close()


def outcome(canvas: Any, journal: Path) -> Any:
    """The value; as JSON has it, since eager mode lets values be what they are."""
    return json.loads(json.dumps(canvas.build(str(journal)).apply_async().get(timeout=60)))


@settings(max_examples=200)
@given(canvas=canvases(depth=3))
def test_value(app: Celery, tmp_path: Path, canvas: Any) -> None:
    eager, real = (tmp_path / f"{mode}-{next(_numbers)}" for mode in ("eager", "real"))
    app.conf.task_always_eager = True
    expected = outcome(canvas, eager)
    app.conf.task_always_eager = False
    assert outcome(canvas, real) == expected
    notes = read_lines(eager)
    # The callbacks of the last task may run when its value is there.
    wait_until(lambda: len(read_lines(real)) >= len(notes), 30, f"{len(notes)} calls")
    assert sorted(read_lines(real)) == sorted(notes)
