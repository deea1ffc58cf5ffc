"""The prefork pool, with fewer calls of the system: for short tasks they are a large part of what Celery costs.

A task's message goes into the pipe of its process in one write instead of two, and at once instead of after another
turn of the event loop; all that processes have sent is read in one go. And they share their memory for longer.
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from celery.concurrency import asynpool, prefork

from kathikon_celery.worker.prefork import ahead
from kathikon_celery.worker.request import Request, Unsendable

#: Bytes that are read at once: what a pipe holds.
CHUNK = 65536
#: Bytes before a message, which say its length.
HEADER = 4


class ResultHandler(asynpool.ResultHandler):
    """Reads what the processes say."""

    def _recv_message(
        self, add_reader: Callable[..., Any], fd: int, callback: Callable[[Any], Any], **kwargs: Any
    ) -> Iterator[None]:
        """Read what has come from *fd*. Until a message that is cut off is complete, this iterator is the reader."""
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
    """Call *callback* with each message; an error is raised after the last one, as they are all out of the pipe."""
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
    """The messages that are complete; what is left in *data* is cut off."""
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
    """The event loop, of which nothing is asked that it need not do: few pipes are ever waited for."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self.add, self.add_writer, self.remove = hub.add, hub.add_writer, hub.remove
        self.consolidate_callback: Callable[[list[int]], Any]

    def remove_writer(self, fd: int) -> None:
        if fd in self._hub.writers:
            self._hub.remove_writer(fd)


class FastPool(ahead.ReadAheadPool):
    """The processes."""

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
            if ahead.is_atomic(job):  # whoever has written the header is not asked to write more
                header, body, _ = job._payload
                job._payload = memoryview(b"".join((header, body))), memoryview(b""), 0

        def write(pipe: int) -> None:
            self._mark_worker_as_available(pipe)  # else Celery sends it nothing
            schedule_writes([pipe])

        self._quick_put = send_whole_job
        if self.is_fair:
            self.on_poll_start = partial(self.send_waiting, write)


class TaskPool(prefork.TaskPool):
    """What a worker of ours uses where Celery's own prefork pool is asked for."""

    Pool = FastPool

    def give_back(self, request: Request) -> bool:
        """Take back a request that the pool was given; false if a process may have begun it. For any thread."""
        result = request._apply_result
        job = None if result is None else result()
        return job is not None and isinstance(self._pool, FastPool) and self._pool.give_back(job, request._leave)

    def on_start(self) -> None:
        """Start the processes.

        To collect garbage, each would write into all that it has of the worker, and so copy it: half of its memory.
        """
        gc.collect()
        gc.freeze()
        super().on_start()

    def on_stop(self) -> None:
        """Stop the processes."""
        super().on_stop()
        gc.unfreeze()
