"""Settings that change what a worker does with a job."""

from __future__ import annotations

from datetime import timedelta

from kathikon_celery.job import State
from kathikon_celery.storage import Storage
from tests.support import apps
from tests.support.waiting import wait_until


def test_retry_failed_waits_for_kathikons_backoff(database_url, start_worker, client) -> None:
    with start_worker(env={"KATHIKON_RETRY_FAILED": "true", "KATHIKON_MAX_ATTEMPTS": "2"}):
        sent = apps.fail.delay("no luck")
        storage = Storage.for_app(client)
        wait_until(lambda: storage.fetch(sent.id).errors, 60, "the first failure is noted")
        job = storage.fetch(sent.id)
        assert job.state is State.RETRYABLE
        assert "no luck" in job.last_error
        assert job.scheduled_at - job.inserted_at >= timedelta(seconds=5)
        wait_until(lambda: storage.fetch(sent.id).state is State.DEAD, 60, "the second failure is the last")
        assert len(storage.fetch(sent.id).errors) == 2


def test_results_may_be_discarded(database_url, start_worker, client) -> None:
    with start_worker(env={"KATHIKON_RESULT": "discard"}):
        sent = apps.echo.delay("not kept")
        assert sent.get(timeout=60) is None
        assert Storage.for_app(client).fetch(sent.id).state is State.COMPLETED
