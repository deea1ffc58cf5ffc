"""An app whose tasks end badly: ``celery -A tests.support.bad_ends worker``."""

from __future__ import annotations

from typing import Any

from celery import Task, signals

from tests.support.apps import create_app

app = create_app("bad_ends")


class Own(BaseException):
    """An error that is no Exception, as asyncio's CancelledError."""


class Mute(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Unpicklable(Exception):
    def __init__(self, one: Any, two: Any) -> None:
        super().__init__(lambda: one)


ERRORS: dict[str, BaseException] = {
    one.__name__: one("boom") for one in (SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RuntimeError)
}
ERRORS |= {"Own": Own("boom"), "Mute": Mute(), "Unpicklable": Unpicklable(1, 2), "forbidden": ValueError("forbidden")}


def fail(place: str, args: Any) -> None:
    """Raise the error that the task's arguments name, if they name this place."""
    if args and args[0] == place:
        raise ERRORS[args[1]]


class Hooked(Task):
    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        fail("before_start", args)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        fail("on_success", args)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        fail("on_failure", args)

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        fail("on_retry", args)

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        fail("after_return", args)


@app.task(bind=True, base=Hooked, name="end", max_retries=1)
def end(self: Task, place: str, error: str) -> Any:
    """Raise *error* at *place*: the body, a callback or a receiver of a signal."""
    fail("body", (place, error))
    if place in ("on_failure", "task_failure"):
        raise ValueError("the task's own")
    if place == "on_retry":
        raise self.retry(countdown=0.01)
    return {"object": object(), "refused": "refuse this"}.get(place, "returned")


@app.task(name="end_early", acks_late=False)
def end_early(place: str, error: str) -> None:
    fail("early", (place, error))


@app.task(name="say")
def say(value: Any) -> Any:
    return value


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def before(args: Any, **kwargs: Any) -> None:
    fail("task_prerun", args)


@signals.task_postrun.connect  # type: ignore[untyped-decorator]
def after(args: Any, **kwargs: Any) -> None:
    fail("task_postrun", args)


@signals.task_failure.connect  # type: ignore[untyped-decorator]
def failed(args: Any, **kwargs: Any) -> None:
    fail("task_failure", args)
