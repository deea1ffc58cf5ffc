"""What the pools in the worker's own process report to a request."""

from __future__ import annotations

from typing import Any, NoReturn
from unittest import mock

import pytest
from billiard.einfo import ExceptionInfo
from celery.exceptions import WorkerLostError, WorkerShutdown
from celery.worker import state

from kathikon_celery.worker.in_process import _run


def raising(error: BaseException) -> Any:
    def target() -> NoReturn:
        raise error

    return target


def test_an_error_is_returned_for_the_request() -> None:
    found = _run(raising(MemoryError("none left")), mock.Mock())
    assert isinstance(found, ExceptionInfo)
    assert repr(found.exception.exc) == "MemoryError('none left')"


@pytest.mark.parametrize("asked", [None, 0])
def test_a_task_that_asks_the_worker_to_end_counts_as_lost(monkeypatch: pytest.MonkeyPatch, asked: int | None) -> None:
    """So that it does not end one worker after another. A shutdown that a signal has asked for costs no crash."""
    monkeypatch.setattr(state, "should_stop", asked)
    request = mock.Mock()
    with pytest.raises(WorkerShutdown):
        _run(raising(WorkerShutdown(0)), request)
    reported = [call.args[0].type for call in request.on_failure.mock_calls]
    assert reported == ([WorkerLostError] if asked is None else [])
