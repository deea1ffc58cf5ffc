"""The prefork pool, with fewer system calls: they take a large part of Celery's time for short tasks.

A task's message goes into its process's pipe in one write instead of two, and at once instead of in the event loop's
next turn. All that a process has sent is read in one go. The processes share the worker's memory for longer.
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from celery.concurrency import asynpool, prefork
from celery.worker import state

from kathikon_celery.worker.prefork import ahead
from kathikon_celery.worker.request import Request, Unsendable

#: Bytes in one read: the size of a pipe.
CHUNK = 65536
#: Bytes of the prefix that has a message's length.
HEADER = 4


class ResultHandler(asynpool.ResultHandler):
    """Reads the messages of the processes."""

    def _recv_message(
        self, add_reader: Callable[..., Any], fd: int, callback: Callable[[Any], Any], **kwargs: Any
    ) -> Iterator[None]:
        """Read the messages in *fd*. While the last one is incomplete, this iterator stays the reader of *fd*."""
        data, was_cut_off = bytearray(), False
        while True:
            try:
                chunk = os.read(fd, CHUNK)
            except OSError as error:
                if error.errno not in asynpool.UNAVAIL:
                    raise
                was_cut_off = True
                yield
                continue
            if not chunk:
                raise OSError("End of file during message") if data else EOFError()
            data += chunk
            messages = _taken_from(data)
            if not data:
                break
            _tell(messages, callback)
            was_cut_off = True
            yield
        if was_cut_off:
            add_reader(fd, self.handle_event, fd)
        _tell(messages, callback)


def _tell(messages: list[bytes], callback: Callable[[Any], Any]) -> None:
    """Call *callback* with each message. Raises the first error after the last one: all are out of the pipe."""
    failure: Exception | None = None
    for data in messages:
        try:
            if message := pickle.loads(data):
                callback(message)
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _taken_from(data: bytearray) -> list[bytes]:
    """Remove the complete messages from *data* and return them."""
    messages, start = [], 0
    while len(data) >= start + HEADER:
        end = start + HEADER + int.from_bytes(data[start : start + HEADER], "big")
        if len(data) < end:
            break
        messages.append(bytes(data[start + HEADER : end]))
        start = end
    del data[:start]
    return messages


class _Writers:
    """The event loop, without calls that do nothing: most pipes have no writer that could be removed."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self.add, self.add_writer, self.remove = hub.add, hub.add_writer, hub.remove
        self.consolidate_callback: Callable[[list[int]], Any]

    def remove_writer(self, fd: int) -> None:
        if fd in self._hub.writers:
            self._hub.remove_writer(fd)


class FastPool(ahead.ReadAheadPool):
    """The pool's processes."""

    ResultHandler = ResultHandler

    def _create_write_handlers(self, hub: Any, **kwargs: Any) -> None:
        writers = _Writers(hub)
        super()._create_write_handlers(writers, **kwargs)
        hub.consolidate_callback = schedule_writes = writers.consolidate_callback
        send_job, cache = vars(self)["_quick_put"], self._cache

        def send_whole_job(task: Any) -> None:
            try:
                send_job(task)
            except Exception as error:
                del cache[task[1][0]]
                raise Unsendable(f"{type(error).__name__}: {error}") from error
            job = cache[task[1][0]]
            if ahead.is_atomic(job):  # header and body in one write: no body is left to write
                header, body, _ = job._payload
                job._payload = memoryview(b"".join((header, body))), memoryview(b""), 0

        def write(pipe: int) -> None:
            self._mark_worker_as_available(pipe)  # else Celery does not write to it
            schedule_writes([pipe])

        self._quick_put = send_whole_job
        if self.is_fair:
            self.on_poll_start = partial(self.send_waiting, write)


class TaskPool(prefork.TaskPool):
    """The pool of our workers where Celery's prefork pool is asked for."""

    #: Celery shows the last part of this name as the pool's: "prefork".
    __module__ = prefork.__name__
    Pool = FastPool
    #: A cold shutdown has begun.
    is_cold = False

    def give_back(self, request: Request) -> bool:
        """Take back a request from the pool; return false if a process may have begun it. Any thread may call it."""
        result = request._apply_result
        job = None if result is None else result()
        return job is not None and isinstance(self._pool, FastPool) and self._pool.give_back(job, request._leave)

    def on_start(self) -> None:
        """Start the processes, after ``gc.freeze``.

        Garbage collection would write into each object, and copy half of a process's memory: what it shares.
        """
        gc.collect()
        gc.freeze()
        super().on_start()

    def on_stop(self) -> None:
        """Stop the processes when their tasks have ended.

        A cold shutdown calls this in its handler of signals. That has perhaps interrupted the reader of a process, and
        would wait in vain for what the reader has in its hands. So the processes stop later, in `on_terminate`.
        """
        if self.is_cold:
            self.on_close()
            return
        super().on_stop()
        gc.unfreeze()

    def on_terminate(self) -> None:
        """End the tasks that have begun since the signal, and stop the processes when all that they sent is read."""
        if self.is_cold:
            for request in tuple(state.active_requests):
                request.cancel(self)
            super().on_stop()
        super().on_terminate()
