"""Canvas: what follows a task's end. A chord counts its parts' rows; the process that ends the last one sends the body.

What Celery does at the end of a task (store the result, send callbacks and the rest of the chain, fail its successors,
count the chord) is collected, and then written in one transaction: see ``storage/settle.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from celery import chord, group, states
from celery.app.task import Context
from celery.canvas import _chain as chain
from celery.canvas import _regen, maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult, result_from_tuple
from celery.utils.functional import maybe_list
from kombu.exceptions import OperationalError

from kathikon_celery.backports import Backend, name_group, takes_an_error
from kathikon_celery.job import Hold, State
from kathikon_celery.publish import callers, outbox
from kathikon_celery.results.carrier import carry, written
from kathikon_celery.results.completion import NOTHING
from kathikon_celery.storage import chords
from kathikon_celery.storage.chords import Header, Part
from kathikon_celery.storage.errors import in_words, is_lost
from kathikon_celery.storage.settle import Incomplete, JobEnd, TaskEnd

if TYPE_CHECKING:
    from kathikon_celery.storage import Storage

logger = logging.getLogger(__name__)


def hold_by(request: Any, task_id: str) -> Hold | None:
    """Return the claim in *request*'s delivery tag; `None` for another task's request, or without such a tag."""
    if getattr(request, "id", None) != task_id:
        return None
    return Hold.of_tag((getattr(request, "properties", None) or {}).get("delivery_tag"))


@contextmanager
def _sending() -> Iterator[None]:
    """Raise what ``delay()`` raises if the database is away: Celery sends a chord through broker and backend."""
    try:
        yield
    except Exception as error:
        if not is_lost(error):
            raise
        raise OperationalError(in_words(error)) from error


class CanvasBackend(Backend):
    """The part of the result backend that handles callbacks, chains and chords."""

    @property
    def storage(self) -> Storage:
        """The storage of the results."""
        raise NotImplementedError

    def _text(self, value: Any) -> str:
        raise NotImplementedError

    def _value(self, text: str | None) -> Any:
        raise NotImplementedError

    def _hold_by(self, request: Any, task_id: str) -> Hold | None:
        return hold_by(request, task_id)

    # --- the end of a task

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Store the result, publish what follows the task, and count the task in its chord, in one transaction."""
        is_collecting = outbox.current(self.storage.database) is not None or outbox.scope().completion is not None
        if not store_result and not (request and request.chord) and not is_collecting:
            return  # no result, no chord, nothing collected: nothing to write
        with self._ending(task_id, request, State.COMPLETED):
            super().mark_as_done(task_id, result, request, store_result, *args, **kwargs)

    def mark_as_failure(
        self, task_id: str, exc: Any, traceback: Any = None, request: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Store the failure, publish the errbacks, and fail the tasks that were to follow, in one transaction."""
        if outbox.scope().bodies is None:
            outbox.take(self.storage.database)  # drop what was collected to follow a success
            if (completion := outbox.scope().completion) is not None:
                outbox.change(completion=None)
                completion.roll_back()
        with self._ending(task_id, request, State.DEAD):
            super().mark_as_failure(task_id, exc, traceback, request, *args, **kwargs)
            self._fail_groups(getattr(request, "chain", None), exc)

    def mark_as_revoked(self, task_id: str, reason: str = "", request: Any = None, *args: Any, **kwargs: Any) -> None:
        """Store that the task was revoked, and count the task in its chord, in one transaction."""
        with self._ending(task_id, request, State.CANCELLED):
            super().mark_as_revoked(task_id, reason, request, *args, **kwargs)

    def _call_task_errbacks(self, request: Any, exc: BaseException, traceback: Any) -> None:
        if any(takes_an_error(maybe_signature(one, app=self.app)) for one in request.errbacks):
            self._show_end(request.id)  # such an errback is called here and now, and may read the task's result
        super()._call_task_errbacks(request, exc, traceback)

    def _show_end(self, task_id: str) -> None:
        """Store the result that is collected for *task_id*; the job's end follows, with what the errbacks send."""
        storage, ending = self.storage.backend, outbox.current(self.storage.database)
        for end in ending.ends if ending is not None else ():
            if end.task_id != task_id or end.written["status"] is None:
                continue
            if end.hold is not None:
                storage.store(end.hold, None, **end.written)  # type: ignore[arg-type]
            elif not end.unreported:
                storage.store_alone(task_id, end.state, reason=end.reason, cause=end.cause, **end.written)

    @contextmanager
    def _ending(self, task_id: str, request: Any, state: State) -> Iterator[None]:
        if outbox.scope().bodies is not None:  # a body fails with its header, while the header's end is collected
            yield
            return
        database, hold = self.storage.database, self._hold_by(request, task_id)
        ending = outbox.take(database)
        with outbox.within(bodies={}):
            with outbox.into(database, ending):
                yield
            is_stored = any(end.task_id == task_id for end in ending.ends)
            completion = outbox.scope().completion
            if hold is not None and not is_stored and (ending.jobs or ending.parts or completion is not None):
                ending.ends.insert(0, JobEnd(task_id=task_id, hold=hold, state=state, written=NOTHING))
            # The worker reports an end without a result too. After a server crash that report would restore the end
            # alone: so it is on disk.
            if completion is not None:
                outbox.change(completion=None)
                with completion.errors():
                    is_ours = self._settle(completion.storage, ending)
                completion.end(task_id, is_ours)
            elif not self._settle(self.storage, ending, on_disk=not is_stored) and not outbox.scope().is_reported:
                logger.warning(
                    "Kathikon: job %s had ended, or had been given to others, before it ended here;"
                    " this end changed nothing", task_id,
                )  # fmt: skip

    def _settle(self, storage: Storage, ending: TaskEnd, on_disk: bool = False) -> bool:
        if not (ending.ends or ending.parts or ending.jobs) or (storage is self.storage and carry(ending)):
            return True
        database = self.storage.database
        known = outbox.scope().bodies or {}
        prepared: dict[str, TaskEnd] = {}
        while True:
            try:
                is_ours = storage.backend.settle(ending, prepared, on_disk)
                if is_ours:
                    written(ending)
                for one in (ending, *prepared.values()) if is_ours else ():
                    for send in one.after:
                        send()
                return is_ours
            except Incomplete as complete:
                # Sending a body runs Celery's and the user's code: no transaction is open meanwhile.
                for header in complete.headers:
                    with outbox.into(database, TaskEnd()) as prepared[header.chord]:
                        self._send_body(header, known[header.chord])

    # --- chords

    @_sending()
    def apply_chord(self, header_result_args: Any, body: Any, **kwargs: Any) -> None:
        """Insert the chord and its parts. Celery calls this before it sends the header."""
        self.ensure_chords_allowed()
        name_group(body, header_result_args[0])
        if isinstance(header_result_args[1], _regen):  # a generator, consumed while the header is sent
            callers.write(self.storage, lambda there: chords.open(there.database, header_result_args[0], [], None))
            return
        result = self.app.GroupResult(*header_result_args)
        is_nested = any(isinstance(one, GroupResult) for one in result.results)
        structure = self._text({"result": result.as_tuple()}) if is_nested else None
        parts = [(task_id, position) for position, task_id in enumerate(_leaves(result))]
        callers.write(self.storage, lambda there: chords.open(there.database, result.id, parts, structure))

    @_sending()
    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Set the number of a chord's parts. Celery calls this before it sends the last part."""
        callers.write(self.storage, lambda there: chords.set_size(there.database, group_id, chord_size))

    @_sending()
    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Raise the number of a chord's parts by one: one of the parts is about to send another."""
        callers.write(self.storage, lambda there: chords.add_part(there.database, chord_id, result.id))

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: Any) -> None:
        """Count a part that has ended; the last part sends the chord's body."""
        chord, task_id = request.group, request.id
        if not chord or not task_id or not request.chord:
            return
        if getattr(request, "subtask_type", None) == "group":  # Celery fails it as a link of a chain; we its members
            return
        part = Part(
            chord=chord,
            task_id=task_id,
            position=request.group_index,
            succeeded=state not in states.PROPAGATE_STATES,
            result=self._text(self.encode_result(result, state)),
        )
        bodies = outbox.scope().bodies
        if bodies is None:
            with self._ending("", None, State.COMPLETED):
                self.on_chord_part_return(request, state, result)
            return
        bodies[chord] = maybe_signature(request.chord, app=self.app)
        ending = outbox.current(self.storage.database)
        assert ending is not None
        ending.parts.append(part)

    def _send_body(self, header: Header, body: Any) -> None:
        """Send the body with the header's results, or fail the body with the error of a part."""
        for part in header.parts:
            if not part.succeeded:
                cause = self.exception_to_python(self._value(part.result))
                self._fail_body(body, f"Dependency {part.task_id} raised {cause!r}", cause)
                ending = outbox.current(self.storage.database)
                assert ending is not None
                ending.is_failed = True
                return
        try:
            values = {part.task_id: self._value(part.result) for part in header.parts}
            if header.structure is None:
                arguments = list(values.values())
            else:
                arguments = _nested(result_from_tuple(self._value(header.structure)["result"], self.app), values)
            body.delay(arguments)
        except Exception as error:
            logger.exception("Kathikon: the body of chord %s could not be sent", header.chord)
            self._fail_body(body, f"Callback error: {error!r}", error)

    def _fail_body(self, body: Any, message: str, cause: BaseException) -> None:
        error = ChordError(message)
        error.__cause__ = cause
        # If the chord is a part of another one, that fails too. `chord.link_error` links an errback to both chords; the
        # outer one calls it, once.
        outer = [_errbacks(maybe_signature(one.options.get("chord"), app=self.app)) for one in _last_tasks(body)]
        body.options["link_error"] = [one for one in _errbacks(body) if not any(one in others for others in outer)]
        self.chord_error_from_stack(body, error)
        links = body.options.get("chain") or []
        self._fail_groups([body, *links] if isinstance(body, chord) else links, error)
        for task in _last_tasks(body):
            self._count_unsent(task, error)

    def _fail_groups(self, links: Any, error: Any) -> None:
        """Fail the members of groups, and of groups and chains that end a chord, among *links* that are never sent.

        Celery fails the links that are tasks.
        """
        for link in links or ():
            signature = maybe_signature(link, app=self.app)
            while isinstance(signature, chord):
                signature = signature.body
            if not isinstance(signature, (group, chain)):
                continue
            for task in _last_tasks(signature):
                if task_id := task.options.get("task_id"):
                    self.store_result(task_id, error, states.FAILURE)
                    self._count_unsent(task, error)

    def _count_unsent(self, task: Any, error: Any) -> None:
        """Count *task*, which has failed before it was sent, if it is a part of a chord: the chord would wait."""
        options = task.options
        request = Context(id=options.get("task_id"), group=options.get("group_id"), chord=options.get("chord"))
        request.group_index = options.get("group_index")
        self.on_chord_part_return(request, states.FAILURE, error)


def _last_tasks(signature: Any) -> Iterator[Any]:
    """Yield the tasks whose results are the results of *signature*."""
    if isinstance(signature, group):
        for one in signature.tasks:
            yield from _last_tasks(one)
    elif isinstance(signature, chain):
        yield from _last_tasks(signature.tasks[-1])
    elif isinstance(signature, chord):
        yield from _last_tasks(signature.body)
    else:
        yield signature


def _errbacks(signature: Any) -> list[Any]:
    return maybe_list(signature.options.get("link_error")) or [] if signature is not None else []


def _leaves(result: Any) -> Iterator[str]:
    for one in result.results:
        if isinstance(one, GroupResult):
            yield from _leaves(one)
        else:
            yield one.id


def _nested(result: Any, values: dict[str, Any]) -> Any:
    if isinstance(result, GroupResult):
        return [_nested(one, values) for one in result.results]
    return values[result.id]
