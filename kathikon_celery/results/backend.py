"""The result backend: results live on the rows of their jobs."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from time import monotonic
from typing import Any

from celery import states
from celery._state import get_current_task
from celery.contrib.abortable import ABORTED
from celery.exceptions import NotRegistered, Reject, TaskRevokedError, WorkerLostError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult, ResultSet, result_from_tuple
from kombu.utils.encoding import ensure_bytes
from sqlalchemy.engine import URL, make_url

from kathikon_celery import frameworks
from kathikon_celery.job import TERMINAL, Cause, Hold, Job, State, in_brief
from kathikon_celery.publish import callers, outbox
from kathikon_celery.results.canvas import CanvasBackend
from kathikon_celery.results.waiting import Wait
from kathikon_celery.settings import Settings, absolute, shown
from kathikon_celery.settings.brokers import broker_of, databases_of, is_kathikon
from kathikon_celery.storage import Storage, prune, result_listeners, results
from kathikon_celery.storage.errors import is_lost
from kathikon_celery.storage.names import key
from kathikon_celery.storage.settle import JobEnd

#: Celery's state -> the job state that storing it sets.
STATES = {
    states.SUCCESS: State.COMPLETED,
    states.FAILURE: State.DEAD,
    states.REVOKED: State.CANCELLED,
    states.STARTED: State.RUNNING,
}

#: Job state -> Celery's state, while the row has no ``status``.
WORDS = {
    State.SCHEDULED: states.PENDING,
    State.AVAILABLE: states.PENDING,
    State.BLOCKED: states.PENDING,
    State.CLAIMED: states.PENDING,
    State.RUNNING: states.PENDING,  # Celery stores STARTED if the task has `track_started`
    State.WAITING_FOR_CHILDREN: states.PENDING,
    State.RETRYABLE: states.RETRY,
    State.COMPLETED: states.SUCCESS,
    State.DEAD: states.FAILURE,
    State.CANCELLED: states.REVOKED,
    State.DISCARDED: states.REVOKED,
}

#: Prefix of a column's text whose rest is binary data in base64.
BINARY = "base64,"

#: Shortest time between two calls of ``on_interval``, in seconds.
SHORTEST_INTERVAL = 0.01
#: Longest `Wait.take`, in seconds, if the caller set no timeout; then `take` is called again.
LONG = 3600.0
#: Seconds between two checks, during a wait, that no transaction of this process keeps the workers from writing.
CHECK_WRITERS = 5.0


class KathikonBackend(CanvasBackend):
    """``result_backend = "kathikon"``: results in the broker's database. ``kathikon+postgresql://…`` names another."""

    persistent = True
    supports_native_join = True
    supports_result_compression = True
    supports_failure_expires = True
    is_async = True  # only then Celery's ResultSet calls the callbacks given to `then`

    def __init__(self, app: Any, url: str | None = None, **kwargs: Any) -> None:
        super().__init__(app=app, url=url, **kwargs)
        frameworks.install()
        databases_of([url or ""], "result_backend")
        self._own_url = url if url and not url.startswith("kathikon:") else None

    @cached_property
    def storage(self) -> Storage:
        """The storage of the results, with its tables."""
        if self._own_url is None:
            storage = Storage.for_app(self.app, setup=False)
        else:
            urls = databases_of([f"kathikon+{self._own_url}"], "result_backend")
            storage = Storage.shared(urls, Settings.load(self.app.conf))
        storage.database.patiently(lambda again: storage.setup())  # a pool child may start while the database is away
        return storage

    @property
    def supports_autoexpire(self) -> bool:
        """Whether workers prune the results. In another database than the broker's, Celery calls `cleanup` instead."""
        return self._own_url is None and is_kathikon(broker_of(self.app.conf))

    def as_uri(self, include_password: bool = False) -> str:
        """Return the URL of the database, also if only the settings name it; its password if *include_password*."""
        return f"kathikon+{shown(self._url, include_password)}"

    @cached_property
    def _url(self) -> URL:
        if self._own_url is not None:
            return absolute(make_url(self._own_url))
        return Storage.for_app(self.app, setup=False).database.url

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        return super().__reduce__(args, dict(kwargs or {}, url=self._own_url))

    @cached_property
    def _is_beside(self) -> bool:
        """Whether the results are in another database than the broker's, so that no worker holds their rows."""
        return self._own_url is not None and self.storage is not Storage.for_app(self.app, setup=False)

    def _hold_by(self, request: Any, task_id: str) -> Hold | None:
        hold = super()._hold_by(request, task_id)
        return None if hold is None or self._is_beside else hold

    # --- storing

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: str | None = None, request: Any = None, **kwargs: Any
    ) -> Any:
        meta = self._get_result_meta(result, state, traceback, request)
        rest = {name: meta[name] for name in meta if name not in ("status", "result", "traceback")}
        rest |= getattr(request, "kathikon_meta", None) or {}  # of the task itself
        storage, database = self.storage.backend, self.storage.database
        if state == states.SUCCESS and self.storage.settings.result == "discard":
            result = None
        written: dict[str, Any] = {"status": state, "result": self._text(result), "traceback": traceback}
        if state not in states.EXCEPTION_STATES and traceback is not None:
            written["traceback"] = str(traceback)
        written["meta"] = self._text(rest)
        hold, becomes = self._hold_by(request, task_id), STATES.get(state)
        if hold is not None and state == states.RETRY:
            if outbox.scope().refused == task_id:
                outbox.change(refused=None)
            else:
                del written["status"]
                storage.store_retry(hold, **written, reason="Retry" if result is None else _reason(result))
            return result
        reason = cause = None
        if state in states.EXCEPTION_STATES:
            reason, cause = _reason(result), _cause(result)
        if cause in (Cause.EXPIRED, Cause.REJECTED):
            becomes = State.DISCARDED
        ending = outbox.current(database)
        if ending is not None and becomes in TERMINAL:
            unreported = outbox.scope().unreported == task_id
            why: dict[str, Any] = {"reason": reason, "cause": cause, "unreported": unreported}
            ending.ends.append(JobEnd(task_id=task_id, hold=hold, state=becomes, written=written, **why))
        elif hold is None:
            storage.store_alone(task_id, becomes, reason=reason, cause=cause, **written)
        else:  # update_state() from a running task, even 'SUCCESS', is progress: the real end follows
            storage.store(hold, State.RUNNING if becomes is State.RUNNING else None, **written)
        return result

    def _text(self, value: Any) -> str:
        encoded = self.encode(value)
        if isinstance(encoded, str) and not encoded.startswith(BINARY):  # YAML's text may start with it
            return encoded
        return BINARY + b64encode(ensure_bytes(encoded)).decode()

    def _value(self, text: str | None) -> Any:
        if text is None:
            return None
        return self.decode(b64decode(text[len(BINARY) :]) if text.startswith(BINARY) else text)

    # --- reading

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        known = outbox.scope().known
        job = known[task_id] if task_id in known else self.storage.fetch(task_id)
        if job is None:
            return {"status": states.PENDING, "result": None}
        meta = {**self._meta_of(job), "task_id": task_id}
        if job.state is State.CANCELLED and _is_running_here(task_id):
            meta["status"] = ABORTED
        return meta

    def task_result_exists(self, task_id: str) -> bool:
        """Whether the task has a row: true while the task waits in its queue, false after `forget`."""
        job = self.storage.fetch(task_id)
        return job is not None and not (job.status == results.FORGOTTEN and job.meta is None)

    def _meta_of(self, job: Job) -> dict[str, Any]:
        word = job.status or WORDS[job.state]
        if job.status is None and job.state is State.DISCARDED and job.cause is Cause.REJECTED:
            word = states.FAILURE
        result, traceback = self._value(job.result), job.traceback
        if job.status is None and word not in states.EXCEPTION_STATES:
            result = traceback = None  # left by an earlier run
        if word in states.EXCEPTION_STATES and result is None:
            result = error_of(job)
        meta = {"status": word, "result": result, "traceback": traceback, "task_id": job.id, "children": []}
        if job.ended_at is not None:
            meta["date_done"] = job.ended_at.isoformat()
        meta |= self._value(job.meta) or {}
        return self.meta_from_decoded(meta)  # type: ignore[no-any-return]

    def wait_for(
        self, task_id: str, timeout: float | None = None, interval: float = 0.5, no_ack: bool = True,
        on_interval: Any = None, on_message: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the task's meta when it is ready. Raises Celery's `TimeoutError` after *timeout* seconds."""
        ((_, meta),) = self.get_many([task_id], timeout, interval, no_ack, on_message, on_interval)
        return meta

    def wait_for_pending(
        self, result: AsyncResult, timeout: float | None = None, interval: float = 0.5, no_ack: bool = True,
        on_message: Any = None, on_interval: Any = None, callback: Any = None, propagate: bool = True,
    ) -> Any:  # fmt: skip
        """Wait for ``AsyncResult.get``, which passes an *on_interval* that raises the errors of parent tasks."""
        if result.parent is not None:
            callers.refuse_waiting(self.storage, (leaf.id for one in result._parents() for leaf in _leaves(one)))
        if on_interval is not None:
            on_interval = partial(self._knowing_parents, result, on_interval)
        meta = self.wait_for(result.id, timeout, interval, no_ack, on_interval, on_message)
        result._maybe_set_cache(dict(meta))
        if on_interval is not None and meta["status"] in states.PROPAGATE_STATES:
            on_interval()  # as with Redis: a part's own error instead of the ChordError about it
        return result.maybe_throw(propagate=propagate, callback=callback)

    def _knowing_parents(self, result: AsyncResult, call: Callable[[], Any]) -> None:
        """Run *call*, which reads each parent of *result* separately, and answer all its reads from one query."""
        before = [leaf.id for parent in result._parents() for leaf in _leaves(parent) if leaf._cache is None]
        found = {
            job.id: job
            for job in result_listeners.look(self.storage.database, [key(one) for one in before], ready=False)
        }
        with outbox.within(known={one: found.get(key(one)) for one in before}):
            call()

    def get_many(
        self, task_ids: Iterable[str], timeout: float | None = None, interval: float | None = 0.5, no_ack: bool = True,
        on_message: Callable[[dict[str, Any]], Any] | None = None, on_interval: Callable[[], Any] | None = None,
        max_iterations: int | None = None, READY_STATES: Any = states.READY_STATES,  # noqa: N803
    ) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
        """Yield id and meta of each task when it is ready. Raises Celery's `TimeoutError` after *timeout* seconds.

        *on_message* is called with the meta of each task that is ready, or has news such as progress.
        *max_iterations*: return after so many calls of `Wait.take`.
        """
        self._ensure_not_eager()
        deadline = None if timeout is None else monotonic() + timeout
        pause = max(0.5 if interval is None else interval, SHORTEST_INTERVAL)
        remaining = set(task_ids)
        callers.refuse_waiting(self.storage, remaining)
        for task_id in list(remaining):
            meta = self._cache.get(task_id)
            if meta is not None and meta["status"] in READY_STATES:
                remaining.discard(task_id)
                yield task_id, meta
        step, looks, storage, check_at = 0.0, 0, self.storage, monotonic() + CHECK_WRITERS
        with Wait(storage.database, remaining, storage.settings.poll_interval, on_message is not None) as wait:
            while not wait.is_over:
                jobs = wait.take(step)
                for job in jobs:
                    meta = self._meta_of(job)
                    if on_message is not None:
                        on_message(meta)
                    if result_listeners.is_ready(job):
                        if meta["status"] == states.SUCCESS:
                            self._cache[job.id] = meta
                        yield job.id, meta
                looks += 1
                if looks == max_iterations:
                    return
                if jobs:
                    continue
                if on_interval:
                    on_interval()
                left = LONG if deadline is None else deadline - monotonic()
                if left <= 0:
                    raise wait.loss or ResultTimeout("The operation timed out.")
                if monotonic() >= check_at:
                    storage.database.check_writers()
                    check_at = monotonic() + CHECK_WRITERS
                step = min(left, pause if on_interval else CHECK_WRITERS if max_iterations is None else left)

    def iter_native(
        self, result: ResultSet, timeout: float | None = None, interval: float = 0.5, no_ack: bool = True,
        on_message: Any = None, on_interval: Any = None,
    ) -> Iterator[tuple[str, Any]]:  # fmt: skip
        """Yield id and meta of each member when it is ready; for a nested group its id and results, when all are."""
        self._ensure_not_eager()
        owners: dict[str, list[tuple[AsyncResult, _Member]]] = {}
        for one in result.results:
            leaves = list(_leaves(one))
            member = _Member(one, {leaf.id for leaf in leaves if leaf._cache is None})
            for leaf in leaves:
                if leaf._cache is None:
                    owners.setdefault(leaf.id, []).append((leaf, member))
            if not member.waits_for:
                yield member.meta()
        for task_id, meta in self.get_many(owners, timeout, interval, no_ack, on_message, on_interval):
            ready = {}
            for leaf, member in owners.pop(task_id):
                leaf._maybe_set_cache(dict(meta))
                member.waits_for.discard(task_id)
                if not member.waits_for:
                    ready[member.result.id] = member
            for member in ready.values():
                yield member.meta()

    def _forget(self, task_id: str) -> None:
        self.storage.backend.forget(task_id)

    # --- groups

    def _save_group(self, group_id: str, result: Any) -> Any:
        text = self._text({"result": result.as_tuple()})
        callers.write(self.storage, lambda there: results.save_group(there.database, group_id, text))
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        meta = self._value(results.restore_group(self.storage.database, group_id))
        if meta is not None:
            meta["result"] = result_from_tuple(meta["result"], self.app)
        return meta  # type: ignore[no-any-return]

    def _delete_group(self, group_id: str) -> None:
        results.delete_group(self.storage.database, group_id)

    def cleanup(self) -> None:
        """Delete results and groups older than their retention. With `supports_autoexpire` the workers do it."""
        while self.storage.prune():
            pass
        kept = self.storage.settings.retention_for(State.COMPLETED)
        if kept is not None:
            prune.old_groups(self.storage.database, kept)

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether *exc* says that the database was away."""
        return is_lost(exc)


class _Member:
    """A member of a `ResultSet`, and the ids of its tasks that are not ready."""

    def __init__(self, result: Any, waits_for: set[str]) -> None:
        self.result = result
        self.waits_for = waits_for

    def meta(self) -> tuple[str, Any]:
        return self.result.id, self.result.results if isinstance(self.result, ResultSet) else self.result._cache


def _leaves(result: Any) -> Iterator[AsyncResult]:
    """The results of single tasks in *result*."""
    if isinstance(result, ResultSet):
        for one in result.results:
            yield from _leaves(one)
    else:
        yield result


def _type_and_arguments(result: Any) -> tuple[str, tuple[Any, ...]]:
    """Return type name and arguments of an exception or a serialized exception; an empty name for other values."""
    if isinstance(result, BaseException):
        return type(result).__name__, result.args
    if isinstance(result, dict) and "exc_type" in result:
        message = result.get("exc_message")
        return result["exc_type"], tuple(message) if isinstance(message, (list, tuple)) else (message,)
    return "", ()


_EXCEPTIONS: Mapping[Cause, type[Exception]] = {
    Cause.REJECTED: Reject,
    Cause.LOST: WorkerLostError,
    Cause.LOST_ONCE: WorkerLostError,
}


def error_of(job: Job) -> Exception:
    """Return the exception for a job that ended without a stored result."""
    if job.cause is Cause.UNREGISTERED:
        return NotRegistered(job.task)  # type: ignore[no-any-return]
    by_state = TaskRevokedError if job.state in (State.CANCELLED, State.DISCARDED) else Exception
    kind = _EXCEPTIONS.get(job.cause, by_state) if job.cause is not None else by_state
    return kind(job.reason or job.state.value)


_CAUSES = {"Reject": Cause.REJECTED, "TimeLimitExceeded": Cause.TIME_LIMIT, "WorkerLostError": Cause.LOST}


def _cause(result: Any) -> Cause:
    """Return why the task failed or was revoked, from the exception that Celery stores."""
    kind, arguments = _type_and_arguments(result)
    if kind == "TaskRevokedError":  # its argument is Celery's reason
        return Cause.EXPIRED if arguments[:1] == ("expired",) else Cause.REVOKED
    return _CAUSES.get(kind, Cause.RAISED)


def _reason(result: Any) -> str:
    """Return a failure in one line: the exception's type and arguments, or Celery's reason for a revocation."""
    kind, arguments = _type_and_arguments(result)
    if kind == "TaskRevokedError":
        return str(arguments[0] if arguments else "revoked")
    if kind == "Reject":
        return in_brief(f"rejected: {arguments[0] if arguments else None}")
    return in_brief(f"{kind}({', '.join(map(repr, arguments))})" if kind else result)


def _is_running_here(task_id: str) -> bool:
    """Whether this thread runs the task. If the task was cancelled, ``AbortableTask.is_aborted()`` asks for that."""
    task = get_current_task()
    return task is not None and task.request.id == task_id
