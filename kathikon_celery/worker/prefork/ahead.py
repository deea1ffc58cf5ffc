"""A second job in the pipe of a busy process, so that the process need not wait for one, and the way to take it back.

Otherwise the second job would wait for the end of the first, even while other processes are idle.
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

#: Largest write to a pipe, in bytes, that happens as a whole or not at all.
ATOMIC = getattr(select, "PIPE_BUF", 512)
#: Pipe message code: the process has read a job that was taken back. billiard uses 0-4, Celery 15.
SKIPPED = 16


class Worker(asynpool.Worker):
    """A process that begins a job only if there is a permit: each job is sent with one, and taken back with it.

    Jobs are read in the order in which they were sent, only the last one is ever taken back, and no job is sent behind
    that one before it was read. So a job that finds no permit was taken back.
    """

    wait_for_job: Any  # billiard makes it, in the process

    def contribute_to_object(self, obj: Any) -> Any:
        """Called by billiard for this object, which goes to the process, and for the pool's object of the process."""
        if obj is self:
            self.permits = billiard.Semaphore(0)
        obj.permits = self.permits
        return super().contribute_to_object(obj)

    def __reduce__(self) -> Any:  # for a process that is spawned, not forked
        return (*super().__reduce__(), {"permits": self.permits})

    def _make_child_methods(self, **kwargs: Any) -> None:
        super()._make_child_methods(**kwargs)
        self._receive, self.wait_for_job = self.wait_for_job, self._receive_what_is_permitted

    def _receive_what_is_permitted(self) -> Any:
        job = self._receive()
        if job is None or self.permits.acquire(False):
            return job
        self.outq.put((SKIPPED, (self.inqW_fd,)))
        return None  # makes billiard ask again


class Ahead:
    """The jobs in the pipes of busy processes, and those that wait for a pipe.

    A pipe is named by its file descriptor for writing.
    """

    def __init__(self, waiting: deque[Any]) -> None:
        self._waiting = waiting
        self._jobs: dict[int, Any] = {}
        self._to_be_skipped: set[int] = set()
        self._free = 0
        self._lock = Lock()  # methods that do not take it are for the main thread only

    def __iter__(self) -> Iterator[Any]:
        return iter([*self._jobs.values(), *self._waiting])

    def __bool__(self) -> bool:
        return bool(self._jobs or self._waiting)

    def behind(self, pipe: int) -> Any:
        """Return the job that waits in the pipe, if any."""
        return self._jobs.get(pipe)

    def is_full(self, pipe: int) -> bool:
        """Whether no further job may be sent to a busy process."""
        return pipe in self._jobs or pipe in self._to_be_skipped

    def has_rest(self, pipe: int) -> bool:
        """Whether a job that was taken back is still in the pipe."""
        return pipe in self._to_be_skipped

    def send(self, process: Any, job: Any, behind: bool, write: Callable[[int], None]) -> None:
        """*Write* *job*, if it still waits first, to an idle process, or *behind* the job that a busy process runs."""
        pipe = process.inqW_fd
        with self._lock:
            if pipe in self._to_be_skipped or not self._waiting or self._waiting[0] is not job:
                return
            if behind:
                self._jobs[pipe] = job
            process.permits.release()
            write(pipe)

    def take_back(self, job: Any) -> bool:
        """Take back a job that waits; return false if its process may have begun it."""
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
                self._free += 1
                return True
            process = job._write_to
            pipe = None if process is None else process.inqW_fd
            if pipe is None or self._jobs.get(pipe) is not job or not process.permits.acquire(False):
                return False
            self._jobs.pop(pipe, None)  # not there if the job before it has just ended
            self._to_be_skipped.add(pipe)
            return True

    def wait_first(self, job: Any) -> None:
        """Undo `take_back`, for a job that was in no pipe."""
        with self._lock:
            self._waiting.appendleft(job)
            self._free -= 1

    def ended(self, pipe: int) -> bool:
        """Note that a process has ended a job; return whether it is idle, else it begins the next job."""
        return self._jobs.pop(pipe, None) is None

    def skipped(self, pipe: int) -> None:
        """Note that a process has read the job that was taken back, perhaps before `take_back` was done."""
        self._clear_rest(pipe)

    def lost(self, pipe: int) -> bool:
        """Note that a process is gone; return whether its pipe has a job that was taken back."""
        self._jobs.pop(pipe, None)
        return self._clear_rest(pipe)

    def _clear_rest(self, pipe: int) -> bool:
        with self._lock:
            had_rest = pipe in self._to_be_skipped
            self._to_be_skipped.discard(pipe)
            self._free += had_rest
            return had_rest

    def places(self) -> int:
        """Return how many places have become free since the last call, other than by the end of a job."""
        if not self._free:
            return 0
        with self._lock:
            free, self._free = self._free, 0
            return free


def is_limited(request: Any) -> bool:
    """Whether a job counts for limits: behind another job it would keep others from starting."""
    delivery = getattr(request, "_delivery", None)
    return bool(delivery is not None and getattr(delivery.item, "limits", ()))


def is_atomic(job: Any) -> bool:
    """Whether a job is written into a pipe as a whole or not at all."""
    first, _, rest = job._payload
    return bool(len(first) + rest <= ATOMIC)


def request_of(job: Any) -> Any:
    """Return Celery's request of a job of the pool; `None` if Celery has forgotten it."""
    request = state.requests.get(job.correlation_id)
    result = getattr(request, "_apply_result", None)
    return request if result is not None and result() is job else None


class ReadAheadPool(asynpool.AsynPool):
    """Processes that are sent a job while they are busy with another one.

    Celery's semaphore lets in as many jobs as there are places: two for each process. A job that is taken back keeps
    its place until its process has skipped it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        strategy = options.get("sched_strategy")
        #: Celery's other strategy fills the pipe of a process by itself, and takes no job back.
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
        """Note that a process has read a job that was taken back."""
        self._ahead.skipped(pipe)
        self._mark_worker_as_available(pipe)

    def _process_cleanup_queues(self, proc: Any) -> None:
        if self._ahead.lost(proc.inqW_fd):
            self.on_partial_read(SimpleNamespace(_accepted=True), proc)  # the pipe must not be read by another process
        super()._process_cleanup_queues(proc)

    def flush(self) -> None:
        """Forget the jobs that have not begun; called when the consumer ends or restarts.

        Celery forgets each job whose process has not yet said that it has begun it, though the job may run.
        """
        self._forget_given_back()
        self.maintain_pool()  # jobs that were sent to a process that is gone wait again
        unsaid = [job for job in self._cache.values() if job._write_to is not None and not job._accepted]
        unsaid = [job for job in unsaid if not self.take_back(job)]
        for job in unsaid:
            job._accepted = True
        begun = [job for job in self._cache.values() if job._accepted]
        super().flush()
        for job in begun:  # Celery below 5.7 forgets these as well
            if not job.ready():
                self._cache[job._job] = job
                if job._write_to is not None and job._write_to._is_alive():
                    self._busy_workers.add(job._write_to.inqW_fd)
        for job in unsaid:
            job._accepted = job._worker_pid is not None

    def take_back(self, job: Any) -> bool:
        """Take back a job that waits; return false if its process may have begun it. Any thread may call it."""
        return self.is_fair and self._ahead.take_back(job)

    def give_back(self, job: Any, leave: Callable[[], Any]) -> bool:
        """As `take_back`; the main thread then forgets the job and calls *leave*."""
        if not self.take_back(job):
            return False
        self._given_back.append((job, leave))
        return True

    def _forget_given_back(self) -> None:
        while self._given_back:
            job, leave = self._given_back.popleft()
            leave()
            job.discard()

    # --- sending

    def send_waiting(self, write: Callable[[int], None]) -> None:
        """Write the waiting jobs into pipes, as long as there is room. *write*(pipe) takes the next job."""
        self._forget_given_back()
        if self._ahead and state.revoked:
            self._drop_revoked()
        for _ in range(self._ahead.places()):
            self._putlock.release()
        waiting = self.outbound_buffer
        while True:
            pipe = self._idle_pipe()
            if not waiting and (pipe is None or not any(map(self._move, self._ahead))):
                break
            try:
                job, behind = waiting[0], pipe is None
            except IndexError:  # the intake has taken it back
                continue
            if job._accepted or job._job not in self._cache:
                with suppress(ValueError):
                    waiting.remove(job)
                continue
            request = request_of(job)
            lapses = request is not None and bool(request.expires or request.stamped_headers)
            if behind:
                may = self._goes_ahead and is_atomic(job) and not lapses and not is_limited(request)
                pipe = self._pipe_with_room() if may else None
            elif lapses and self._has_lapsed(job, request):
                continue
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

    def _move(self, job: Any) -> bool:
        """Take back a job that waits behind another one, and make it wait for a pipe; return false if it has begun."""
        if job._write_to.inqW_fd in self._active_writes or not self.take_back(job):
            return False
        self._putlock.acquire(int)  # a second place: the first is free when the process has skipped the job
        self.outbound_buffer.appendleft(job)
        return True

    # Celery checks whether a job was revoked, or has expired, only before it gives the job to the pool.

    def _drop_revoked(self) -> None:
        for job in self._ahead:
            request = request_of(job) if job.correlation_id in state.revoked else None
            if request is not None and self.take_back(job):
                job.discard()
                request.revoked()

    def _has_lapsed(self, job: Any, request: Any) -> bool:
        if not self.take_back(job):
            return True
        if request.revoked():
            job.discard()
            return True
        self._ahead.wait_first(job)
        return False

    # --- ending a running job: its process may have ended it and begun the next one before we have read that

    def _is_over(self, pipe: int) -> bool:
        """Whether the job that we think a process runs is over: the one behind it has begun, and is not moved away."""
        behind = self._ahead.behind(pipe)
        return behind is not None and pipe not in self._active_writes and not self._move(behind)

    def _has_ended(self, job: int) -> bool:
        return job in self._cache and self._is_over(self._cache[job]._write_to.inqW_fd)

    def _on_soft_timeout(self, job: int, soft: float, hard: float | None, hub: Any) -> None:
        if not self._has_ended(job):
            super()._on_soft_timeout(job, soft, hard, hub)

    def _on_hard_timeout(self, job: int) -> None:
        if self._has_ended(job):
            return
        if job in self._cache:
            process, _ = self._process_by_pid(self._cache[job]._worker_pid)
            if process:  # first: its task may hold a transaction that keeps out the report of its end
                self._timeout_handler._trywaitkill(process)
        super()._on_hard_timeout(job)

    def terminate_job(self, pid: int, sig: int | None = None) -> None:
        """Kill the process of a job, if it still runs that job."""
        process, _ = self._process_by_pid(pid)
        if process is None or not self._is_over(process.inqW_fd):
            super().terminate_job(pid, sig)
