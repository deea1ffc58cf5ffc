from __future__ import annotations

import subprocess
import sys

import pytest
from celery import Celery, current_app, shared_task
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult

from kathikon_celery import EmbeddedWorker
from kathikon_celery.job import Job, State
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from kathikon_celery.worker.services.lifeline import Lifeline
from kathikon_celery.worker.services.promoter import Promoter
from kathikon_celery.worker.services.pruner import Pruner

pytest_plugins = ["pytester"]


@shared_task
def multiply(x: int, y: int) -> int:
    return x * y


def test_the_plugin_is_light() -> None:
    code = """
import sys
import kathikon_celery.testing.plugin
heavy = ["celery.app", "celery.worker", "sqlalchemy", "pytest_celery", "docker"]
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_pytest_finds_it_by_itself(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_with_everything(kathikon_storage, kathikon_app, kathikon_worker, mock_storage):
            @kathikon_app.task
            def add(x, y):
                return x + y

            result = add.delay(2, 2)
            assert result.get(timeout=60) == 4
            assert kathikon_storage.fetch(result.id).state == "completed"
            assert mock_storage.all() == []

        def test_that_nothing_is_left(kathikon_storage, kathikon_app):
            @kathikon_app.task
            def add(x, y):
                return x - y

            assert kathikon_storage.all() == []
        """
    )
    pytester.runpytest_subprocess("-W", "error", "-p", "no:celery").assert_outcomes(passed=2)


def test_every_test_has_tables_of_its_own(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from kathikon_celery.job import Job

        @pytest.mark.parametrize("again", [1, 2, 3])
        def test_storage(kathikon_storage, again):
            assert kathikon_storage.counts() == {}
            kathikon_storage.insert(Job(id="the same", task="proj.add"))
            assert kathikon_storage.counts() == {("default", "available"): 1}
        """
    )
    pytester.runpytest_inprocess().assert_outcomes(passed=3)


def test_the_settings_of_the_environment_do_not_reach_the_storage(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("KATHIKON_DATABASE_URL", "postgresql://nobody@nowhere.invalid/production")
    monkeypatch.setenv("KATHIKON_MAX_ATTEMPTS", "3")
    storage: Storage = request.getfixturevalue("kathikon_storage")
    storage.insert(Job(id="1", task="proj.add"))
    assert storage.settings.max_attempts == Settings().max_attempts
    app: Celery = request.getfixturevalue("kathikon_app")
    multiply.delay(6, 7)
    assert len(storage.all()) == 2
    assert Storage.for_app(app).database.url == storage.database.url


class TestWorker:
    @pytest.fixture
    def kathikon_worker_options(self) -> dict[str, object]:
        return {"pool": "solo", "hostname": "tested@here"}

    def test_options(self, kathikon_worker: EmbeddedWorker, kathikon_storage: Storage) -> None:
        assert kathikon_worker.is_running
        assert kathikon_worker.hostname == "tested@here"
        assert multiply.delay(6, 7).get(timeout=60) == 42
        assert [job.state for job in kathikon_storage.all()] == [State.COMPLETED]


def test_the_app_is_the_current_one_for_the_test_only(pytester: pytest.Pytester) -> None:
    before = current_app.main
    pytester.makepyfile(
        """
        from celery import current_app

        def test_app(kathikon_app):
            assert current_app.main == "kathikon_test"
        """
    )
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    assert current_app.main == before


# --- the double, in each step of a worker


def test_promoter_with_the_double(mock_storage: Storage) -> None:
    promoter = Promoter(storage=mock_storage, interval=1)
    assert promoter.step() == 1
    mock_storage.promote_scheduled.assert_not_called()  # type: ignore[attr-defined]
    mock_storage.next_due.side_effect = [-0.5, 0.25]  # type: ignore[attr-defined]
    assert promoter.step() == 0.25
    mock_storage.promote_scheduled.assert_called_once_with()  # type: ignore[attr-defined]


def test_pruner_with_the_double(mock_storage: Storage) -> None:
    mock_storage.prune.side_effect = [500, 500, 0]  # type: ignore[attr-defined]
    assert 8 <= Pruner(storage=mock_storage, interval=10).step() <= 12
    assert mock_storage.prune.call_count == 3  # type: ignore[attr-defined]
    mock_storage.discard_expired.assert_called_once_with()  # type: ignore[attr-defined]


def test_lifeline_with_the_double(mock_storage: Storage) -> None:
    presence = OwnNode(mock_storage, "me")
    assert Lifeline(storage=mock_storage, interval=2, presence=presence).step() == 2


def test_the_double_is_in_use_for_one_test_only(pytester: pytest.Pytester) -> None:
    own = Storage.shared
    pytester.makepyfile(
        """
        from celery import Celery
        from kathikon_celery.storage import Storage

        def test_double(use_mock_storage, mock_storage):
            assert use_mock_storage is mock_storage
            app = Celery("any", broker="kathikon://", set_as_current=False)
            assert Storage.for_app(app) is mock_storage
            mock_storage.setup.assert_called_once_with()
        """
    )
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    assert Storage.shared == own


def test_results_from_the_double(use_mock_storage: Storage) -> None:
    job = Job(id="1", task="proj.add", state=State.COMPLETED, status="SUCCESS", result="42")
    use_mock_storage.fetch.return_value = job  # type: ignore[attr-defined]
    with Celery("any", broker="kathikon://", backend="kathikon", set_as_current=False) as app:
        assert AsyncResult("1", app=app).result == 42
        with pytest.raises(ResultTimeout):
            AsyncResult("2", app=app).get(timeout=0.1)
    use_mock_storage.fetch.assert_any_call("1")  # type: ignore[attr-defined]
