"""What Celery 5.7 does when a canvas fails, or a task is revoked, for older versions.

Celery 5.5 sends a failed chord's errbacks for a single task only, and stores no failure for the parts of a group or a
chain. Up to 5.6 an errback that raises ends the handling of the failure, and an errback with arguments of its own is
called in the wrong way. A worker of Celery 5.5 does not store a revocation until it receives the task.
"""

from __future__ import annotations

import logging
import sys
from functools import partial, wraps
from typing import Any

from celery import VERSION, chord, group, states
from celery.app.task import Context
from celery.backends.base import BaseBackend
from celery.canvas import _chain as chain
from celery.canvas import maybe_signature
from celery.exceptions import NotRegistered
from celery.utils.functional import arity_greater, maybe_list
from kombu.utils.uuid import uuid

logger = logging.getLogger(__name__)


class FailingCanvas(BaseBackend):
    """A result backend that fails a canvas as Celery 5.7 does."""

    def chord_error_from_stack(self, callback: Any, exc: BaseException | None = None) -> None:
        """Fail *callback*, the body of a chord whose header has failed with *exc*, and call its errbacks."""
        self._fail_unsent(callback, exc if exc is not None else sys.exc_info()[1], [])

    def _fail_unsent(self, signature: Any, error: Any, errbacks: list[Any]) -> None:
        """Store that *signature*, which will never be sent, and the tasks that were to follow it, have failed."""
        errbacks = errbacks + [
            one for one in maybe_list(signature.options.get("link_error")) or [] if one not in errbacks
        ]
        if isinstance(signature, group):
            for one in signature.tasks:
                self._fail_unsent(one, error.__cause__ or error, errbacks)
        elif isinstance(signature, chord):
            self._fail_unsent(signature.body, error, errbacks)
        elif isinstance(signature, chain):
            *before, last = signature.tasks
            self._fail_unsent(last, error, errbacks)
            for one in before:
                self._fail_unsent(one, error, [])
        else:
            task_id = signature.options.setdefault("task_id", uuid())
            request = Context(id=task_id, errbacks=errbacks, delivery_info={}, task=signature.task)
            self._call_task_errbacks(request, error, None)
            self.fail_from_current_stack(task_id, exc=error)
        for one in signature.options.get("chain") or []:
            self._fail_unsent(maybe_signature(one, app=self.app), error, [])

    def _call_task_errbacks(self, request: Any, exc: BaseException, traceback: Any) -> None:
        """Call the errbacks that take request, error and traceback; send the others, which take the task's id."""
        to_send = []
        for errback in request.errbacks:
            signature = maybe_signature(errback, app=self.app)
            if takes_an_error(signature):
                try:
                    signature(request, exc, traceback)
                except Exception:
                    logger.exception("Errback %r raised an exception", signature.name)
            else:
                to_send.append(signature)
        if to_send:
            errbacks = group(to_send, app=self.app)
            is_eager = self.app.conf.task_always_eager or request.delivery_info.get("is_eager", False)
            send = errbacks.apply if is_eager else errbacks.apply_async
            send((request.id,), parent_id=request.id, root_id=request.root_id or request.id)


def takes_an_error(errback: Any) -> bool:
    """Whether *errback* takes more than one argument beside its own."""
    try:
        header = getattr(errback.type, "__header__", None)
    except NotRegistered:  # only another worker has the task
        return False
    if header is None or isinstance(header, partial):  # a task class, or bind=True: it is sent, so that it may retry
        return False
    if not errback.immutable and (errback.args or errback.kwargs):
        try:
            return bool(arity_greater(partial(header, *errback.args, **errback.kwargs), 1))
        except (TypeError, ValueError):
            pass
    return bool(arity_greater(header, 1))


def name_group(body: Any, chord_id: str) -> None:
    """Give the *body* of a chord, or its last task, the chord's id as its group, as Celery does from 5.7 on."""
    if VERSION[:2] >= (5, 7):
        return
    while isinstance(body, chain) and body.tasks:
        body = body.tasks[-1]
    if not isinstance(body, (chain, group, chord)):
        body.options.setdefault("group_id", chord_id)


def mark_what_is_revoked() -> None:
    """Make workers store a revocation as soon as they receive it, as Celery does from 5.6 on. May be called twice."""
    from celery.worker import state as worker_state
    from celery.worker.control import Panel

    revoke = Panel.data["revoke"]
    if VERSION[:2] >= (5, 6) or getattr(revoke, "marks", False):
        return

    @wraps(revoke)
    def revoke_and_mark(state: Any, task_id: Any, *args: Any, **kwargs: Any) -> Any:
        running = {request.id for request in worker_state.active_requests}
        answer = revoke(state, task_id, *args, **kwargs)
        backend = state.app.backend
        for one in maybe_list(task_id) or []:
            if one not in running and backend.get_state(one) in (states.PENDING, states.RETRY):
                backend.mark_as_revoked(one, reason="revoked", store_result=True)
        return answer

    revoke_and_mark.marks = True  # type: ignore[attr-defined]
    Panel.data["revoke"] = revoke_and_mark


#: The class that a result backend derives from.
Backend: Any = FailingCanvas if VERSION[:2] < (5, 7) else BaseBackend
