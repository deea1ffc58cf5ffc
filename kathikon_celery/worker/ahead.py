"""A second job in the pipe of a busy process, so that it need not wait for the next one, and the way to take it back.

Without that way the job would wait for as long as the one before it runs, whoever else is idle.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Lock
from types import SimpleNamespace
from typing import Any

import billiard
from celery.concurrency import asynpool
from celery.worker import state

#: Bytes up to which a write to a pipe happens as a whole or not at all.
ATOMIC = getattr(select, "PIPE_BUF", 512)
#: What a process says when it has read a job that was taken back. Billiard has words up to 4, Celery has 15.
SKIPPED = 16


class Worker(asynpool.Worker):
    """A process, which begins a job only if there is a permit: each job is sent with one, and taken back with it.

    Jobs are read in the order in which they were sent, only the last one is ever taken back, and nothing is sent behind
    it before it was read. So if a permit is missing, then for the job that was taken back.
    """

    wait_for_job: Any  # billiard makes it, in the process

    def contribute_to_object(self, obj: Any) -> Any:
        """Called for this object, which goes to the process, and for what the pool has of the process."""
        if obj is self:
            self.permits = billiard.Semaphore(0)
        obj.permits = self.permits
        return super().contribute_to_object(obj)

    def _make_child_methods(self, **kwargs: Any) -> None:
        super()._make_child_methods(**kwargs)
        self._receive, self.wait_for_job = self.wait_for_job, self._receive_what_is_permitted

    def _receive_what_is_permitted(self) -> Any:
        job = self._receive()
        if job is None or self.permits.acquire(False):
            return job
        self.outq.put((SKIPPED, (self.inqW_fd,)))
        return None  # billiard's word for: ask again


class Ahead:
    """The jobs in the pipes of busy processes, and those that wait for a pipe.

    A pipe is named by the number of the file that it is written to.
    """

    def __init__(self, waiting: deque[Any]) -> None:
        self._waiting = waiting
        self._jobs: dict[int, Any] = {}
        self._to_be_skipped: set[int] = set()
        self._lock = Lock()  # what has no lock is for the main thread only
        #: How many places were left without a job having ended.
        self.free = 0

    def __iter__(self) -> Iterator[Any]:
        return iter([*self._jobs.values(), *self._waiting])

    def __bool__(self) -> bool:
        return bool(self._jobs or self._waiting)

    def is_full(self, pipe: int) -> bool:
        """Whether a busy process may be sent no more."""
        return pipe in self._jobs or pipe in self._to_be_skipped

    def has_rest(self, pipe: int) -> bool:
        """Whether a job that was taken back is still in the pipe."""
        return pipe in self._to_be_skipped

    def send(self, process: Any, job: Any, behind: bool, write: Callable[[int], None]) -> None:
        """*Write* the job that waits first to an idle process, or *behind* what a busy one runs, if it still may be."""
        pipe = process.inqW_fd
        with self._lock:
            if pipe in self._to_be_skipped or not self._waiting or self._waiting[0] is not job:
                return
            if behind:
                self._jobs[pipe] = job
            process.permits.release()
            write(pipe)

    def take_back(self, job: Any) -> bool:
        """Take back a job that waits; false if its process may have begun it."""
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
                self.free += 1
                return True
            process = job._write_to
            pipe = None if process is None else process.inqW_fd
            if pipe is None or self._jobs.get(pipe) is not job or not process.permits.acquire(False):
                return False
            self._jobs.pop(pipe, None)  # unless the job before it has just ended
            self._to_be_skipped.add(pipe)
            return True

    def ended(self, pipe: int) -> bool:
        """A process has ended a job. Whether it is idle: else it begins the next one."""
        return self._jobs.pop(pipe, None) is None

    def skipped(self, pipe: int) -> bool:
        """Where there was a job that was taken back there is none: it was read, maybe before `take_back` was done."""
        with self._lock:
            had_rest = pipe in self._to_be_skipped
            self._to_be_skipped.discard(pipe)
            self.free += had_rest
            return had_rest

    def lost(self, pipe: int) -> bool:
        """A process is gone. Whether there is a job in its pipe that was taken back."""
        with self._lock:
            self._jobs.pop(pipe, None)
        return self.skipped(pipe)

    def places(self) -> int:
        """How many places have become free since the last call."""
        with self._lock:
            free, self.free = self.free, 0
            return free


class AsynPool(asynpool.AsynPool):
    """Processes that are sent a job while they are busy with another one.

    Celery's semaphore lets in as many jobs as there are places for: two for each process. A job that is taken back
    keeps its place until its process has skipped it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        strategy = options.get("sched_strategy")
        #: Celery's other strategy sends a process more than it can begin with, and does not take back.
        self.is_fair = asynpool.SCHED_STRATEGIES.get(strategy, strategy) == asynpool.SCHED_STRATEGY_FAIR
        if self.is_fair:
            self.Worker = Worker
        ends_soon = options.get("maxtasksperchild") or options.get("max_memory_per_child")
        self._goes_ahead = self.is_fair and not ends_soon
        self._given_back: deque[tuple[Any, Callable[[], Any]]] = deque()
        super().__init__(*args, **options)
        self._ahead = Ahead(self.outbound_buffer)
        if self._goes_ahead:
            self._putlock.grow(self._processes)

    def create_result_handler(self) -> Any:
        handler = super().create_result_handler()
        handler.state_handlers[SKIPPED] = self.on_job_skipped
        return handler

    def on_grow(self, n: int) -> None:
        super().on_grow(n)
        if self._goes_ahead:
            self._putlock.grow(n)

    def on_shrink(self, n: int) -> None:
        super().on_shrink(n)
        if self._goes_ahead:
            self._putlock.shrink(n)

    def on_job_ready(self, job: Any, i: Any, obj: Any, inqW_fd: int) -> None:  # noqa: N803 - Celery's name
        if self._ahead.ended(inqW_fd):
            super().on_job_ready(job, i, obj, inqW_fd)

    def on_job_skipped(self, pipe: int) -> None:
        """A process has read a job that was taken back."""
        self._ahead.skipped(pipe)
        self._mark_worker_as_available(pipe)

    def _process_cleanup_queues(self, proc: Any) -> None:
        if self._ahead.lost(proc.inqW_fd):
            self.on_partial_read(SimpleNamespace(_accepted=True), proc)  # nobody shall read that pipe
        super()._process_cleanup_queues(proc)

    def flush(self) -> None:
        """Called when the consumer ends or begins anew: forget what no process has begun.

        Celery forgets all of which it was not told that it has begun, and so the results of some.
        """
        self._given_back.clear()
        for job in list(self._cache.values()):
            if not job._accepted and job._write_to is not None and not self.take_back(job):
                job._accepted = True
        super().flush()

    def take_back(self, job: Any) -> bool:
        """Take back a job that waits; false if its process may have begun it. For any thread."""
        return self._ahead.take_back(job)

    def give_back(self, job: Any, leave: Callable[[], Any]) -> bool:
        """As `take_back`; the main thread then forgets the job and calls *leave*. For any thread."""
        if not self.take_back(job):
            return False
        self._given_back.append((job, leave))
        return True

    def send_waiting(self, write: Callable[[int], None]) -> None:
        """Have each job that waits written into a pipe, as long as there is room. *write* takes the next one."""
        while self._given_back:
            job, leave = self._given_back.popleft()
            leave()
            job.discard()
        if self._ahead and state.revoked:
            self._drop_revoked()
        if self._ahead.free:
            for _ in range(self._ahead.places()):
                self._putlock.release()
        waiting = self.outbound_buffer
        while True:
            pipe = self._idle_pipe()
            if not waiting and (pipe is None or not self._move_one()):
                break
            try:
                job, behind = waiting[0], pipe is None
            except IndexError:  # the intake has taken it back
                continue
            if job._accepted or job._job not in self._cache:
                with suppress(ValueError):
                    waiting.remove(job)
                continue
            if behind and self._goes_ahead and len(job._payload[0]) + job._payload[2] <= ATOMIC:
                pipe = self._pipe_with_room()
            if pipe is None:
                break
            self._ahead.send(self._fileno_to_inq[pipe], job, behind, write)

    def _idle_pipe(self) -> int | None:
        pipe: int
        for pipe in self._all_inqueues:
            if pipe not in self._busy_workers and pipe not in self._active_writes and not self._ahead.has_rest(pipe):
                return pipe
        return None

    def _pipe_with_room(self) -> int | None:
        pipe: int
        for pipe in self._all_inqueues:
            if pipe not in self._active_writes and not self._ahead.is_full(pipe):
                return pipe
        return None

    def _move_one(self) -> bool:
        """Let a job that waits behind another one wait for the next pipe instead."""
        for job in self._ahead:
            if job._write_to.inqW_fd not in self._active_writes and self.take_back(job):
                self._putlock.acquire(int)  # one more place: the old one is free when the job was skipped there
                self.outbound_buffer.append(job)
                return True
        return False

    def _drop_revoked(self) -> None:
        """Celery looks whether a job was revoked before it gives it to the pool."""
        for job in self._ahead:
            if job.correlation_id not in state.revoked:
                continue
            request = state.requests.get(job.correlation_id)
            if request is not None and self.take_back(job):
                job.discard()
                request.revoked()
