"""The result backend: results live on the rows of their jobs."""

from __future__ import annotations

from base64 import b64decode, b64encode
from functools import cached_property
from time import monotonic, sleep
from typing import Any

from celery import states
from celery.exceptions import TimeoutError as ResultTimeout

from kathikon_celery.canvas import CanvasBackend, hold_by
from kathikon_celery.job import TERMINAL, Job, State, in_brief
from kathikon_celery.settings import Settings, broker_database, mask
from kathikon_celery.storage import Storage, results
from kathikon_celery.storage.errors import is_lost
from kathikon_celery.storage.settle import End
from kathikon_celery.transport import collecting

#: Which state of a job a state of Celery's makes it take.
STATES = {
    states.SUCCESS: State.COMPLETED,
    states.FAILURE: State.DEAD,
    states.REVOKED: State.CANCELLED,
    states.STARTED: State.RUNNING,
}

#: Celery's word for a job whose result nobody has stored.
WORDS = {
    State.SCHEDULED: states.PENDING,
    State.AVAILABLE: states.PENDING,
    State.CLAIMED: states.PENDING,
    State.RUNNING: states.STARTED,
    State.WAITING_FOR_CHILDREN: states.STARTED,
    State.RETRYABLE: states.RETRY,
    State.COMPLETED: states.SUCCESS,
    State.DEAD: states.FAILURE,
    State.CANCELLED: states.REVOKED,
    State.DISCARDED: states.REVOKED,
}

#: Marks what is no text and therefore kept in base64.
BINARY = "base64,"

#: Seconds between two looks at a result that is waited for: from the first, doubled up to the last.
FIRST_LOOK, LAST_LOOK = 0.002, 0.05


class KathikonBackend(CanvasBackend):
    """``result_backend = "kathikon"``: the broker's database. ``kathikon+postgresql://…`` names another one."""

    persistent = True
    supports_autoexpire = True

    def __init__(self, app: Any, url: str | None = None, **kwargs: Any) -> None:
        super().__init__(app=app, url=url, **kwargs)
        own = url if url and not url.startswith("kathikon:") else None
        self._own_url = own

    @cached_property
    def storage(self) -> Storage:
        """The database."""
        if self._own_url is None:
            storage = Storage.for_app(self.app, setup=False)
        else:
            url = broker_database(f"kathikon+{self._own_url}", "result_backend")
            storage = Storage.shared(url, Settings.load(self.app.conf))
        storage.database.patiently(lambda again: storage.setup())  # a pool child may begin while the database is away
        return storage

    def as_uri(self, include_password: bool = False) -> str:
        """The URL for people."""
        if self._own_url is None:
            return "kathikon://"
        return f"kathikon+{self._own_url if include_password else mask(self._own_url)}"

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        return super().__reduce__(args, dict(kwargs or {}, url=self._own_url))

    # --- storing

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: str | None = None, request: Any = None, **kwargs: Any
    ) -> Any:
        meta = self._get_result_meta(result, state, traceback, request)
        rest = {name: meta[name] for name in meta if name not in ("status", "result", "traceback")}
        database = self.storage.database
        if state == states.SUCCESS and self.storage.settings.result == "discard":
            result = None
        written: dict[str, Any] = {"status": state, "result": self._text(result), "traceback": traceback}
        if state not in states.EXCEPTION_STATES and traceback is not None:
            written["traceback"] = str(traceback)
        hold, becomes = hold_by(request, task_id), STATES.get(state)
        if hold is not None and state == states.RETRY:
            if not getattr(request, "was_refused", False):
                del written["status"]
                results.store_retry(database, hold, **written, reason=_reason(result))
            return result
        written["meta"] = self._text(rest)
        reason = _reason(result) if state in states.EXCEPTION_STATES else None
        if reason == "expired" or _type_and_arguments(result)[0] == "Reject":
            becomes = State.DISCARDED
        ending = collecting.current(database)
        if ending is not None and becomes in TERMINAL:
            untold = getattr(request, "is_untold", False) and request.id == task_id
            end = End(task_id=task_id, hold=hold, state=becomes, written=written, reason=reason, untold=untold)
            ending.ends.append(end)
        elif hold is None:
            results.store_alone(database, task_id, becomes, reason=reason, **written)
        else:
            results.store(database, hold, becomes, **written, reason=reason)
        return result

    def _text(self, value: Any) -> str:
        encoded = self.encode(value)
        return encoded if isinstance(encoded, str) else BINARY + b64encode(encoded).decode()

    def _value(self, text: str | None) -> Any:
        if text is None:
            return None
        return self.decode(b64decode(text[len(BINARY) :]) if text.startswith(BINARY) else text)

    # --- reading

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        job = self.storage.fetch(task_id)
        if job is None:
            return {"status": states.PENDING, "result": None}
        return self._meta_of(job)

    def _meta_of(self, job: Job) -> dict[str, Any]:
        word = job.status or WORDS[job.state]
        if job.status is None and job.state is State.DISCARDED and job.reason != "expired":
            word = states.FAILURE
        result = self._value(job.result)
        if word in states.EXCEPTION_STATES and result is None:
            kind = "TaskRevokedError" if word == states.REVOKED else "Exception"
            module = "celery.exceptions" if word == states.REVOKED else "builtins"
            result = {"exc_type": kind, "exc_message": [job.reason or job.state.value], "exc_module": module}
        meta = {"status": word, "result": result, "traceback": job.traceback, "task_id": job.id, "children": []}
        if job.ended_at is not None:
            meta["date_done"] = job.ended_at.isoformat()
        meta |= self._value(job.meta) or {}
        return self.meta_from_decoded(meta)  # type: ignore[no-any-return]

    def wait_for(
        self, task_id: str, timeout: float | None = None, interval: float = 0.5, no_ack: bool = True,
        on_interval: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The meta of the task as soon as it is ready; raises Celery's TimeoutError after *timeout* seconds."""
        self._ensure_not_eager()
        deadline = None if timeout is None else monotonic() + timeout
        pause = FIRST_LOOK
        while True:
            meta: dict[str, Any] = self.get_task_meta(task_id)
            if meta["status"] in states.READY_STATES:
                return meta
            if on_interval:
                on_interval()
            left = pause if deadline is None else deadline - monotonic()
            if left <= 0:
                raise ResultTimeout("The operation timed out.")
            sleep(min(pause, left))
            pause = min(pause * 2, LAST_LOOK, max(interval, FIRST_LOOK))

    def _forget(self, task_id: str) -> None:
        results.forget(self.storage.database, task_id)

    # --- groups

    def _save_group(self, group_id: str, result: Any) -> Any:
        results.save_group(self.storage.database, group_id, self._text({"result": result.as_tuple()}))
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        from celery.result import result_from_tuple

        meta = self._value(results.restore_group(self.storage.database, group_id))
        if meta is not None:
            meta["result"] = result_from_tuple(meta["result"], self.app)
        return meta  # type: ignore[no-any-return]

    def _delete_group(self, group_id: str) -> None:
        results.delete_group(self.storage.database, group_id)

    def cleanup(self) -> None:
        """Nothing to do: the worker's pruner deletes what is older than its retention."""

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether the database was away."""
        return is_lost(exc)


def _type_and_arguments(result: Any) -> tuple[str, tuple[Any, ...]]:
    """Name and arguments of a failure's exception as a result serializer takes it; an empty name for what is none."""
    if isinstance(result, BaseException):
        return type(result).__name__, result.args
    if isinstance(result, dict) and "exc_type" in result:
        message = result.get("exc_message")
        return result["exc_type"], tuple(message) if isinstance(message, (list, tuple)) else (message,)
    return "", ()


def _reason(result: Any) -> str:
    """A failure in one line: the exception's type and message, or Celery's word for why a task was revoked."""
    kind, arguments = _type_and_arguments(result)
    if kind == "TaskRevokedError":
        return str(arguments[0] if arguments else "revoked")
    if kind == "Reject":
        return in_brief(f"rejected: {arguments[0] if arguments else None}")
    return in_brief(f"{kind}({', '.join(map(repr, arguments))})" if kind else result)
