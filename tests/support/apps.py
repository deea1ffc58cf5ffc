"""The sample app that integration tests run: ``celery -A tests.support.apps worker``.

Its tasks are shared tasks, so they belong to whichever app is the current one: the module's own in a worker, the one
that the fixture ``client`` made in a test. There, ``apps.add.delay(2, 2)`` goes to the test's own database.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NoReturn
from unittest import mock

from celery import Celery, Signature, Task, current_app, group, maybe_signature, shared_task
from celery._state import _task_stack
from celery.exceptions import Ignore, Reject
from celery.result import allow_join_result
from celery.worker.control import control_command
from celery.worker.request import create_request_cls
from celery.worker.strategy import default
from kombu.utils.imports import symbol_by_name

from kathikon_celery import Unique
from kathikon_celery.publish import fast_path
from kathikon_celery.storage import Unavailable


def create_app(name: str = "tests", /, **conf: Any) -> Celery:
    """Return an app that is configured as a user's, with ``conf`` on top. It does not become the current app."""
    app = Celery(name, set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    if conf:
        app.conf.update(conf)
    return app


app = create_app(**json.loads(os.environ.get("KATHIKON_TEST_CONF") or "{}"))


@control_command()  # type: ignore[untyped-decorator]
def lose_connection(state: Any) -> dict[str, str]:
    """Restart the consumer, as after the loss of its broker."""

    def lose() -> NoReturn:
        raise Unavailable("as asked")

    state.consumer.hub.call_soon(lose)
    return {"ok": "soon"}


@contextmanager
def running(task: Task, **request: Any) -> Iterator[list[Any]]:
    """In this process, as if a worker ran *task* with *request*. Yields the list in which Celery notes its children."""
    children: list[Any] = []
    _task_stack.push(task)
    task.push_request(**request, called_directly=False, children=children)
    try:
        yield children
    finally:
        task.pop_request()
        _task_stack.pop()


def append_line(path: str, line: str) -> None:
    """Append one line to a file at once, so that lines of several processes never mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines that tasks have appended so far; none if there is no file."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


@shared_task
def add(x: int, y: int) -> int:
    return x + y


@shared_task
def total(numbers: list[int]) -> int:
    """Return the sum."""
    return sum(numbers)


@shared_task
def accumulate(values: list[Any]) -> list[Any]:
    """Return what the parts of a chord have returned."""
    return values


@shared_task
def frozen_objects() -> int:
    """Return how many objects of the task's process no garbage collection looks at."""
    return gc.get_freeze_count()


@shared_task
def lengths(values: list[str]) -> list[int]:
    return [len(value) for value in values]


@shared_task(ignore_result=True)
def quiet(value: Any) -> Any:
    """Return the value, which is not stored."""
    return value


@shared_task(bind=True)
def replaced_by_group(self: Task, number: int) -> Any:
    """Leave the work to three other tasks."""
    with allow_join_result():  # eager mode waits for them
        return self.replace(group(add.s(one, number) for one in range(3)))


@shared_task(bind=True)
def hand_over(self: Task, canvas: dict[str, Any]) -> Any:
    """Leave the work to a canvas."""
    with allow_join_result():  # eager mode waits for it
        return self.replace(maybe_signature(canvas, app=self.app))


class Stamping(Task):
    """A task that stamps what replaces it."""

    def on_replace(self, sig: Signature) -> Any:
        sig.stamp(replaced="yes")
        return super().on_replace(sig)


@shared_task(bind=True, base=Stamping)
def stamp_what_replaces(self: Task, canvas: dict[str, Any]) -> Any:
    return self.replace(maybe_signature(canvas, app=self.app))


@shared_task
def send(canvas: dict[str, Any]) -> Any:
    """Send a canvas and return its result as a tuple."""
    return maybe_signature(canvas, app=current_app).apply_async().as_tuple()


@shared_task
def send_many(number: int) -> int:
    """Send *number* tasks; return how many of them Celery did not send."""
    with mock.patch.object(fast_path, "publish_new", wraps=fast_path.publish_new) as publish:
        for value in range(number):
            echo.delay(value)
    return int(publish.call_count)


@shared_task(bind=True)
def add_parts(self: Task, count: int) -> int:
    """Add *count* parts to the chord of this part."""
    for number in range(count):
        self.add_to_chord(add.s(number, number))
    return 100


@shared_task(bind=True, max_retries=None)
def after_retries(self: Task, retries: int, value: Any) -> Any:
    """Return the value after *retries* retries."""
    if self.request.retries < retries:
        raise self.retry(countdown=0)
    return value


@shared_task(bind=True)
def lineage(self: Task, *values: Any) -> list[dict[str, Any]]:
    """Return what the task knows of its workflow, after what the tasks before it have returned."""
    request = self.request
    own = {name: getattr(request, name) for name in ("id", "root_id", "parent_id", "group", "group_index")}
    own |= {"stamps": request.stamps or {}, "stamped_headers": sorted(request.stamped_headers or [])}
    before = [one for value in values for one in (value if isinstance(value[0], dict) else chain.from_iterable(value))]
    return [*before, own]


class OutOfPaper(Exception):
    """An error with arguments of its own."""

    def __init__(self, tray: int, sheets: list[int]) -> None:
        super().__init__(tray, sheets)


@shared_task
def print_page() -> NoReturn:
    raise OutOfPaper(2, [1, 2])


@shared_task
def echo(*args: Any, **kwargs: Any) -> list[Any]:
    return [list(args), kwargs]


@shared_task
def note(value: Any, path: str, label: str) -> None:
    """Append what the task before this one has returned."""
    append_line(path, json.dumps([label, value]))


@shared_task
def fail(message: str = "as asked") -> NoReturn:
    raise ValueError(message)


@shared_task(acks_late=False)
def fail_early(message: str = "as asked") -> NoReturn:
    raise ValueError(message)


@shared_task
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@shared_task
def append(path: str, line: str, seconds: float = 0.0) -> str:
    """Append a line, which counts this start, and work for a while."""
    append_line(path, line)
    time.sleep(seconds)
    return line


@shared_task
def start_and_end(path: str, line: str, seconds: float = 0.05) -> str:
    """Append ``start <line>`` and, after the work, ``end <line>``."""
    append_line(path, f"start {line}")
    time.sleep(seconds)
    append_line(path, f"end {line}")
    return line


@shared_task(acks_late=False)
def append_early(path: str, line: str, seconds: float = 0.0) -> str:
    """As ``append``, but acknowledged before it starts: at most once."""
    return append.run(path, line, seconds)  # type: ignore[no-any-return]


@shared_task(ignore_result=True)
def append_without_result(path: str, line: str) -> str:
    append_line(path, line)
    return line


@shared_task(bind=True, max_retries=None)
def retry_then_succeed(self: Task, path: str, failures: int, countdown: float = 0.0) -> int:
    """Retry until it has been started more than ``failures`` times; return how often it was retried."""
    append_line(path, self.request.id)
    if self.request.retries < failures:
        raise self.retry(countdown=countdown, exc=RuntimeError(f"try {self.request.retries + 1}"))
    return self.request.retries  # type: ignore[no-any-return]


@shared_task(bind=True, autoretry_for=(OSError,), retry_backoff=False, default_retry_delay=0, max_retries=2)
def retry_until_given_up(self: Task, path: str) -> NoReturn:
    append_line(path, self.request.id)
    raise OSError("still broken")


@shared_task
def fail_unless(path: str, value: Any) -> Any:
    """Return the value if there is a file at *path*."""
    if not os.path.exists(path):
        raise RuntimeError("no file yet")
    return value


@shared_task
def big_payload(data: str, size: int) -> str:
    """Take a payload of any size and return one of ``size`` characters."""
    return "x" * size


@shared_task(acks_late=True)
def reject(requeue: bool = False) -> NoReturn:
    raise Reject("as asked", requeue=requeue)


@shared_task(acks_late=False)
def reject_early() -> NoReturn:
    raise Reject("as asked", requeue=True)


@shared_task(acks_late=True)
def reject_until_third_start(path: str, line: str) -> int:
    """Go back to the queue twice, then return the number of starts."""
    append_line(path, line)
    if (starts := len(read_lines(path))) < 3:
        raise Reject("not yet", requeue=True)
    return starts


@shared_task
def ignore() -> NoReturn:
    raise Ignore


@shared_task
def kill_own_process(path: str, line: str, times: int = 1_000_000) -> str:
    """Append a line and kill the process it runs in, ``times`` times over all; then return."""
    append_line(path, line)
    if len(read_lines(path)) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return line


@shared_task(acks_late=False)
def kill_own_process_early(path: str, line: str) -> None:
    """As ``kill_own_process``, but acknowledged before it starts: at most once."""
    append_line(path, line)
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(soft_time_limit=0.5, time_limit=30)
def exceed_soft_limit() -> None:
    time.sleep(60)


@shared_task(time_limit=0.5)
def exceed_hard_limit() -> None:
    time.sleep(60)


@shared_task
def wait_for_file(path: str, journal: str = "", line: str = "") -> str:
    """Run until the file ``path`` appears. Where there is a journal, a line counts this start."""
    if journal:
        append_line(journal, line)
    deadline = time.monotonic() + 100  # shorter than a test may last
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    return "done"


@shared_task(acks_late=False)
def wait_for_file_early(path: str, journal: str) -> str:
    """As ``wait_for_file``, but acknowledged before it starts."""
    return wait_for_file.run(path, journal, "early")  # type: ignore[no-any-return]


@shared_task(bind=True)
def progress(self: Task, until: str) -> str:
    """Report the state PROGRESS with its data, then wait for the file ``until`` to appear."""
    self.update_state(state="PROGRESS", meta={"done": 1, "of": 2})
    return wait_for_file.run(until)  # type: ignore[no-any-return]


@shared_task(bind=True)
def replace(self: Task, x: int, y: int) -> NoReturn:
    raise self.replace(add.s(x, y))


@shared_task(bind=True)
def describe(self: Task) -> dict[str, Any]:
    """Return what the task knows of its delivery, and of its process."""
    request = self.request
    return {
        "id": request.id, "retries": request.retries, "eta": request.eta, "expires": request.expires,
        "priority": request.delivery_info["priority"], "queue": request.delivery_info["routing_key"],
        "hostname": request.hostname, "pid": os.getpid(), "ppid": os.getppid(),
    }  # fmt: skip


#: How many tasks `Collecting` makes one batch of: more than the pool of a test has slots.
COLLECTED = 6


def run_batch(path: str, journal: str, line: str) -> str:
    return wait_for_file.run(path, journal, line)  # type: ignore[no-any-return]


class Collecting(Task):
    """Tasks that are kept until there are enough of them, as celery-batches does; each returns their number."""

    abstract = True
    #: The pool runs `run_batch`, with the arguments of the first.
    in_pool = False

    def Strategy(self, task: Task, app: Celery, consumer: Any) -> Callable[..., None]:  # noqa: N802
        eventer, kept = consumer.event_dispatcher, []
        kind = create_request_cls(
            symbol_by_name(task.Request), task, consumer.pool, consumer.hostname, eventer, app=app
        )

        def keep(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> None:
            kept.append(
                kind(message, on_ack=ack, on_reject=reject, app=app, hostname=consumer.hostname, eventer=eventer,
                     task=task, body=message.body, headers=message.headers, decoded=False, utc=True)
            )  # fmt: skip
            if len(kept) < COLLECTED:
                return
            batch, kept[:] = kept[:], []
            if task.in_pool:
                consumer.pool.apply_async(run_batch, tuple(batch[0].args), callback=partial(self.end, batch))
                return
            for request in batch:
                if not task.acks_late:
                    request.acknowledge()
                if request.args:
                    app.backend.mark_as_failure(request.id, ValueError(*request.args))
                else:
                    app.backend.mark_as_done(request.id, len(batch))
                if task.acks_late:
                    request.acknowledge()

        return keep

    def end(self, batch: list[Any], value: Any) -> None:
        for request in batch:
            self.app.backend.mark_as_done(request.id, value)
            request.acknowledge()


@shared_task(base=Collecting)
def collect(failure: str | None = None) -> NoReturn:
    raise AssertionError("only batches run")


@shared_task(base=Collecting, acks_late=False)
def collect_early(failure: str | None = None) -> NoReturn:
    raise AssertionError("only batches run")


@shared_task(base=Collecting, in_pool=True)
def collect_for_pool(path: str, journal: str, line: str) -> NoReturn:
    raise AssertionError("only batches run")


class PassingOn(Task):
    """Tasks whose strategy does as Celery's own."""

    abstract = True

    def Strategy(self, *args: Any) -> Any:  # noqa: N802
        return default(*args)


@shared_task(base=PassingOn, acks_late=False)
def pass_on_early(path: str, journal: str) -> str:
    return wait_for_file.run(path, journal, "passed on")  # type: ignore[no-any-return]


@shared_task(bind=True)
def how_delivered(self: Task, path: str) -> list[bool]:
    """Retry once, and come again once; return whether each delivery was said to be one more of the same message."""
    append_line(path, str(self.request.delivery_info["redelivered"]))
    lines = read_lines(path)
    if len(lines) == 1:
        raise self.retry(countdown=0)
    if len(lines) == 2:
        raise Reject("once more", requeue=True)
    return [line == "True" for line in lines]


@shared_task(unique=Unique("path"))
def unique_wait(path: str, again: int = 0) -> int:
    """Run until the file ``path`` appears; at most one job for each path."""
    wait_for_file(path)
    return again


@shared_task(unique=Unique("name", while_="waiting", on_conflict="replace"))
def debounced(path: str, name: str, line: str) -> str:
    """Append the line of the last call."""
    append_line(path, line)
    return line


@shared_task(unique=Unique("path", on_conflict="after"))
def one_after_another(path: str, line: str) -> str:
    """Append when this starts and when it ends."""
    return start_and_end(path, line)


@shared_task(unique=Unique(while_="kept", on_conflict="raise"))
def once(path: str, line: str) -> None:
    append_line(path, line)
