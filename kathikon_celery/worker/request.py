"""Celery's request, which also reports how the task ended, for the job's row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from threading import Lock
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import Terminated
from celery import states
from celery.exceptions import (
    Ignore,
    InvalidTaskError,
    Reject,
    Retry,
    TaskRevokedError,
    WorkerLostError,
    WorkerShutdown,
    WorkerTerminate,
)
from celery.worker import state as worker_state
from celery.worker.request import Request as CeleryRequest

from kathikon_celery.consume.delivery import (
    BACK,
    BEGUN,
    CRASHED,
    DONE,
    LOST,
    PASSED_ON,
    REPLACED,
    WRITTEN,
    Delivery,
    Outcome,
    Verdict,
)
from kathikon_celery.job import Cause, State, in_brief
from kathikon_celery.publish import outbox
from kathikon_celery.results.carrier import Carried
from kathikon_celery.storage import acts
from kathikon_celery.storage.errors import is_lost
from kathikon_celery.transport.channel import Delivered
from kathikon_celery.worker.shutdown import KILLED, NOT_BEGUN, InProcessPool

logger = logging.getLogger(__name__)

#: The text of the `Ignore` that `Task.on_replace` raises. The last task of the replacement has the replaced one's id.
REPLACED_BY_NEW_TASK = "Replaced by new task"


def _ended(state: State, cause: Cause, reason: str, traceback: str | None = None) -> Outcome:
    status = states.FAILURE if state is State.DEAD else states.REVOKED
    return Outcome(Verdict.ENDED, state, cause, reason, status, traceback)


def _settles(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a *callback* of the pool, after which the delivery is settled, whatever else the callback has raised."""

    @wraps(callback)
    def settle(self: Request, *args: Any, **options: Any) -> Any:
        try:
            return callback(self, *args, **options)
        except (WorkerShutdown, WorkerTerminate):
            raise
        except BaseException as error:  # also MemoryError and SystemExit, which would end the worker
            logger.exception(
                "Kathikon: task %s[%s] has ended, and what follows its end has raised %s", self.name, self.id,
                in_brief(error),
            )  # fmt: skip
            return None
        finally:
            self._settle()

    return settle


def _lost(einfo: ExceptionInfo) -> ExceptionInfo:
    """Return the error of a task that a pool without processes has reported as `WorkerLostError`.

    Errors that are no `Exception` are treated as the prefork pool treats them: those that would end its process count
    as a lost process, the others as raised.
    """
    error = einfo.exception
    error = error.exc if isinstance(error, ExceptionWithTraceback) else error
    cause = error.__context__ if isinstance(error, WorkerLostError) else None
    if cause is None or isinstance(cause, Exception | SystemExit | KeyboardInterrupt):
        return einfo
    return ExceptionInfo((type(cause), cause, cause.__traceback__))


def _check_limits(limits: Any) -> None:
    if limits == [None, None]:  # as most are
        return
    is_pair = isinstance(limits, list | tuple) and len(limits) == 2
    if not is_pair or not all(isinstance(limit, int | float | None) for limit in limits):
        raise ValueError(f"timelimit is {limits!r}")


class Unsendable(Exception):
    """A task that the pool cannot serialize for its processes."""


class Request(CeleryRequest):
    """A request whose acknowledgement reports how the job ended (see `TRANSITIONS`)."""

    acknowledged: bool

    def __init__(self, message: Any, **options: Any) -> None:
        self._delivery: Delivery | None = getattr(message, "delivery", None)
        #: See `Delivery.decision`.
        self._decision = Lock()
        self._has_failed = False
        #: A cold shutdown has ended the run, or is about to.
        self._is_cut = False
        if self._delivery is not None:
            self._delivery.decision = self._decision
        try:
            super().__init__(message, **options)
            _check_limits(self.time_limits)
        except (AttributeError, KeyError, TypeError, ValueError, InvalidTaskError) as error:
            reason = in_brief(f"corrupt row: {type(error).__name__}: {error}")
            if self._delivery is not None:
                self._delivery.outcome = Outcome(Verdict.ENDED, State.DEAD, Cause.UNREADABLE, reason)
            raise InvalidTaskError(reason) from error  # anything else would end the worker
        # A claimed job is due: Celery would keep the request in memory and wait once more. The task sees its eta.
        self._eta = None
        self._set_outcome(DONE)
        if not self._decoded and isinstance(message, Delivered) and message.is_read_easily():
            # Decoded here, so that Celery's slower way is not needed. The values are fresh: the task, or a receiver of
            # `task_received`, may change them.
            self._body, self._content_type, self._content_encoding = message._decode(), None, None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Celery makes a subclass for each task, whose methods do not call super(): they are wrapped here.
        super().__init_subclass__(**kwargs)
        succeeded, execute = cls.on_success, cls.execute_using_pool

        @_settles
        def on_success(self: Request, failed__retval__runtime: Any, **options: Any) -> Any:
            if isinstance(failed__retval__runtime, ExceptionInfo):  # see in_process.py
                return self.on_failure(_lost(failed__retval__runtime))
            failed, carried, _ = failed__retval__runtime
            if not failed:  # now: Celery does it in its event loop's next turn, which a shutdown skips
                self._on_ack = self._message.ack_log_error
            if isinstance(carried, Carried):
                self._set_outcome(
                    WRITTEN if carried.written is None else Outcome(Verdict.DONE, written=carried.written)
                )
            return succeeded(self, failed__retval__runtime, **options)

        def execute_using_pool(self: Request, pool: Any, **options: Any) -> Any:
            decides = not isinstance(pool, InProcessPool)  # that one decides when the task begins
            if self._decision.locked() if not decides else not self.take():
                self._leave()
                raise TaskRevokedError("given back")  # Celery goes on with the next message
            try:
                self._leave_strategy()
                return execute(self, pool, **options)
            except Unsendable as error:  # would end this worker, then the one that gets the job next
                self.on_failure(ExceptionInfo())
                raise TaskRevokedError(str(error)) from error

        cls.on_success = on_success
        if "execute_using_pool" in cls.__dict__:  # else the inherited one is wrapped already
            cls.execute_using_pool = execute_using_pool

    def take(self) -> bool:
        """Decide that the task runs; false if the job was given back."""
        return self._decision.acquire(blocking=False)

    def _leave_strategy(self) -> None:
        delivery = self._delivery
        if delivery is None or not delivery.is_kept:
            return
        try:
            may_run = self._intake.leaves_strategy(delivery, is_early(self.task))
        except Exception as error:
            if not is_lost(error):
                raise
            may_run = False
        if not may_run:  # another node has the job, or it is not known who has
            self._intake.finish(delivery.tag, BACK)
            self._leave()
            raise TaskRevokedError("given back")

    def _leave(self) -> None:
        worker_state.reserved_requests.discard(self)
        if worker_state.requests.get(self.id) is self:
            del worker_state.requests[self.id]
        self._message.channel.unacknowledged.discard(self._message.delivery_tag)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        if self._delivery is not None:
            self._intake.accepted(self._delivery)
        try:
            super().on_accepted(pid, time_accepted)
        except Exception as error:  # the task runs all the same
            logger.exception("Kathikon: the start of task %s[%s] has raised %s", self.name, self.id, in_brief(error))

    def cancel(self, pool: Any, signal: Any = None, **options: Any) -> None:
        is_cold = getattr(pool, "is_cold", False)  # otherwise the connection was lost
        if not is_cold or not isinstance(pool, InProcessPool) or pool.can_cut():
            self._is_cut = is_cold
            super().cancel(pool, signal, **options)

    def _announce_cancelled(self, *args: Any, **options: Any) -> None:
        if not self._is_cut:
            super()._announce_cancelled(*args, **options)
            return
        # Celery would store the state RETRY, though nothing retries a task with early acknowledgement.
        worker_state.task_ready(self)
        self.send_event("task-cancelled")
        self._already_cancelled = True

    def on_returned(self, returned: Any) -> None:
        """Called with what a run in the worker's own process has returned."""
        if returned is NOT_BEGUN:
            self._leave()
        elif returned is KILLED:
            self.on_killed()
        else:
            self.on_success(returned)

    def abandon(self) -> None:
        """Give back the job, if the task may run again: the process ends now."""
        if self._delivery is not None:
            self._intake.abandon()

    @_settles
    def on_killed(self) -> None:
        """Report that the process or the greenlet of the task was killed while the task ran."""
        if self._is_cut:
            if self._delivery is not None:
                self._delivery.outcome = self._delivery.when_left
        elif not self._already_revoked and not self._already_cancelled:
            try:
                raise WorkerLostError("the greenlet of the task was killed")
            except WorkerLostError:
                self.on_failure(ExceptionInfo())

    @_settles
    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        if self._is_cut and isinstance(_error_of(exc_info), (Terminated, WorkerLostError, SystemExit)):
            return self.on_killed()
        self._decide(exc_info)
        self._has_failed = True
        self._on_reject = self._message.reject_log_error  # now, as in `on_success`
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if soft:
            super().on_timeout(soft, timeout)
        else:
            self._on_hard_timeout(timeout)

    @_settles
    def _on_hard_timeout(self, timeout: float) -> None:
        self._set_outcome(_ended(State.DEAD, Cause.TIME_LIMIT, f"hard time limit ({timeout} s) exceeded"))
        with outbox.within(is_reported=self._has_failed):  # by billiard: Celery's report is the second
            super().on_timeout(False, timeout)

    def revoked(self) -> bool:
        """Whether the job was revoked, and no operator has retried it since.

        A worker remembers for hours what was revoked; that an operator has retried the job is in the table.
        """
        is_remembered = self.id in worker_state.revoked or (self.stamped_headers and worker_state.revoked_stamps)
        if not is_remembered or not self._was_retried():
            return bool(super().revoked())
        worker_state.revoked.discard(self.id)
        return bool(self._already_revoked)

    def _was_retried(self) -> bool:
        try:
            with self._message.channel.storage.database.read() as connection:
                return acts.was_retried(connection, self.id)
        except Exception as error:
            if not is_lost(error):
                raise
            return False

    @_settles
    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        state, cause = (State.DISCARDED, Cause.EXPIRED) if expired else (State.CANCELLED, Cause.REVOKED)
        self._set_outcome(_ended(state, cause, reason))
        if self._delivery is not None:
            self._delivery.stored = self.store_errors
        super()._announce_revoked(reason, terminated, signum, expired)

    def acknowledge(self) -> None:
        delivery = self._delivery
        if delivery is not None and not self.ignore_result and delivery.outcome.written is None:
            delivery.stored = True
            if delivery.is_kept and delivery.outcome is DONE and is_early(self.task):
                delivery.outcome = BEGUN  # by its strategy
        if self._has_failed and delivery is not None:
            return  # `_settle` reports the end when the failure, which Celery acknowledges first, is stored
        if delivery is None or not delivery.early or delivery.outcome.verdict is Verdict.ENDED:
            super().acknowledge()
        elif not self.acknowledged:  # the task is about to run: `_settle` reports its end
            self._message.channel.unacknowledged.discard(delivery.tag)
            self.acknowledged = True

    @property
    def _intake(self) -> Any:
        return self._message.channel.intake

    def _set_outcome(self, outcome: Outcome) -> None:
        if self._delivery is not None:
            self._delivery.outcome = outcome

    def _decide(self, exc_info: Any) -> None:
        error = _error_of(exc_info)
        if isinstance(error, Retry):
            self._set_outcome(PASSED_ON)
        elif isinstance(error, Ignore):
            self._set_outcome(REPLACED if str(error) == REPLACED_BY_NEW_TASK else DONE)
        elif isinstance(error, Reject):
            if not error.requeue:
                # Celery does nothing for what follows a rejected task: the lifeline does.
                reason = in_brief(f"rejected: {in_brief(error.reason)}")
                self._set_outcome(Outcome(Verdict.ENDED, State.DISCARDED, Cause.REJECTED, reason))
        elif isinstance(error, (WorkerLostError, SystemExit, KeyboardInterrupt)) and self.task.reject_on_worker_lost:
            self._set_outcome(CRASHED)
        else:
            cause = Cause.LOST if isinstance(error, WorkerLostError) else Cause.RAISED
            self._set_outcome(_ended(State.DEAD, cause, in_brief(error), str(exc_info.traceback)))

    def _settle(self) -> None:
        """Report how the task has ended, unless it was acknowledged after its end."""
        delivery = self._delivery
        if delivery is None or (self.acknowledged and not delivery.early):
            return
        self.acknowledged = True
        self._message.channel.unacknowledged.discard(delivery.tag)
        outcome = delivery.outcome
        if self._already_cancelled:
            outcome = delivery.when_left
        elif delivery.early and outcome.verdict is Verdict.CRASHED:
            outcome = LOST
        self._intake.finish(delivery.tag, outcome)


def _error_of(exc_info: Any) -> Any:
    error = exc_info.exception
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def acknowledge_at_the_end(task: Any) -> None:
    """Make *task*, whose requests are not Kathikon's, acknowledge when it ends: nothing else reports its end.

    The row of an early task is marked before the task runs all the same, so that the task does not run twice.
    """
    if is_early(task):
        task.kathikon_is_early = task.acks_late = True
        task.acks_on_failure_or_timeout = task.acks_on_failure = task.acks_on_timeout = True
        task.reject_on_worker_lost = False


def is_early(task: Any) -> bool:
    """Whether the settings of *task* say that it is acknowledged before it runs, so that it does not run twice."""
    return getattr(task, "kathikon_is_early", not task.acks_late)


@cache
def joined(own: type) -> type:
    """Return a task's *own* class of requests on top of `Request`, which does what *own* does not do."""
    if own is CeleryRequest or not issubclass(own, CeleryRequest):
        return Request if own is CeleryRequest else own
    return own if issubclass(own, Request) else type(own.__name__, (own, Request), {})
