"""Tasks that end in every way that a result backend has to store: ``celery -A tests.support.outcomes worker``."""

from __future__ import annotations

import time
from importlib import import_module
from threading import Lock
from typing import Any, NoReturn

from celery import Task, group, shared_task
from celery.contrib.abortable import AbortableTask
from celery.exceptions import Ignore, Reject
from celery.result import AsyncResult, GroupResult, allow_join_result

from tests.support.apps import add, app, append_line, wait_for_file

__all__ = ["app", "wait_for_file"]


class TwoWordsError(Exception):
    """Unpickling passes one argument, which fails."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class LockedError(Exception):
    """Has an argument that no serializer takes."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Lock())


@shared_task
def raise_two_words() -> NoReturn:
    raise TwoWordsError("one", "two")


@shared_task
def raise_locked() -> NoReturn:
    raise LockedError("locked")


@shared_task
def raise_local() -> NoReturn:
    """Raise an error that cannot be imported."""

    class LocalError(Exception):
        pass

    raise LocalError("from within")


@shared_task
def raise_only_here() -> NoReturn:
    """Raise an error that only the worker can import, from a module in its folder."""
    raise import_module("only_here").OnlyHereError("from afar")


@shared_task
def return_nothing_storable() -> object:
    return object()


@shared_task
def return_value(value: Any) -> Any:
    return value


@shared_task(bind=True)
def say(self: Task, word: str, then: str = "return") -> str:
    """Store the state *word*, and then return, raise or ignore."""
    self.update_state(state=word, meta={"exc_type": "KeyError", "exc_message": ["said"], "exc_module": "builtins"})
    if then == "raise":
        raise ValueError("raised")
    if then == "ignore":
        raise Ignore
    return "returned"


@shared_task(bind=True)
def say_and_wait(self: Task, path: str, word: str) -> str:
    """Store a state, and run until the file *path* appears."""
    self.update_state(state=word, meta={"done": 1})
    return wait_for_file.run(path)  # type: ignore[no-any-return]


@shared_task(bind=True)
def say_of_another(self: Task, task_id: str, word: str, meta: Any) -> None:
    self.update_state(task_id=task_id, state=word, meta=meta)


@shared_task(bind=True, max_retries=None)
def retry_once_there_is(self: Task, path: str) -> int:
    """Retry, an hour later."""
    raise self.retry(countdown=3600, exc=KeyError("not yet"))


@shared_task
def spread(count: int) -> GroupResult:
    """Leave the work to *count* others, and return their results."""
    return group(spread_further.s(number) for number in range(count))()  # type: ignore[no-any-return]


@shared_task
def spread_further(number: int) -> AsyncResult:
    return add.delay(number, 1)  # type: ignore[no-any-return]


@shared_task
def join_within(allow: str) -> int:
    """Wait for another task, in one of the ways in which Celery allows it, or none."""
    result = add.delay(1, 1)
    if allow == "argument":
        return result.get(timeout=60, disable_sync_subtasks=False)  # type: ignore[no-any-return]
    if allow == "block":
        with allow_join_result():
            return result.get(timeout=60)  # type: ignore[no-any-return]
    return result.get(timeout=60)  # type: ignore[no-any-return]


@shared_task(ignore_result=True)
def fail_quietly() -> NoReturn:
    raise ValueError("nobody asked")


@shared_task(ignore_result=True, store_errors_even_if_ignored=False)
def fail_unheard() -> NoReturn:
    raise ValueError("nobody may ask")


@shared_task(bind=True, base=AbortableTask)
def abortable(self: AbortableTask) -> str:
    return "aborted" if self.is_aborted() else "ran in full"


@shared_task
def note_failure(request: Any, exc: BaseException, traceback: Any, path: str = "") -> None:
    """An errback that Celery calls where the task has failed: append what everybody reads of the task."""
    result = AsyncResult(request.id)
    append_line(path, f"{result.state} {result.result!r}")


@shared_task(bind=True)
def succeed_and_come_again(self: Task) -> str:
    if not self.request.delivery_info["redelivered"]:
        self.backend.store_result(self.request.id, "first run", "SUCCESS")
        raise Reject("once more", requeue=True)
    return "second run"


@shared_task(track_started=True)
def tracked(path: str) -> str:
    """Store STARTED at once, and run until the file *path* appears."""
    return wait_for_file.run(path)  # type: ignore[no-any-return]


@shared_task(bind=True, base=AbortableTask)
def work_until_aborted(self: AbortableTask, journal: str) -> None:
    append_line(journal, "began")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not self.is_aborted():
        time.sleep(0.01)
    append_line(journal, "aborted" if self.is_aborted() else "in vain")


@shared_task(bind=True, max_retries=None)
def retry_when_there(self: Task, path: str, journal: str) -> NoReturn:
    """Wait for the file *path*, then retry at once."""
    wait_for_file.run(path, journal, "began")
    raise self.retry(countdown=0)
