"""`Kathikon`, an operator's hands: verbs for one job, selections of jobs, pauses, and what was done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from getpass import getuser
from socket import gethostname
from typing import TYPE_CHECKING, Any

from kathikon_celery.job import HELD, Cause, Job, State
from kathikon_celery.operate import verbs
from kathikon_celery.operate.explain import Explanation, explain
from kathikon_celery.operate.history import history
from kathikon_celery.operate.limits import Limits
from kathikon_celery.operate.schedules import Schedules
from kathikon_celery.operate.selection import Selection
from kathikon_celery.operate.verbs import NotAllowed
from kathikon_celery.storage import Storage, acts, nodes, pauses, reading, status
from kathikon_celery.storage.acts import Act, Event
from kathikon_celery.storage.errors import NotFound
from kathikon_celery.storage.nodes import Living
from kathikon_celery.storage.pauses import Kind, Pause
from kathikon_celery.storage.selecting import Filter
from kathikon_celery.storage.status import QueueStatus, Status

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult

__all__ = ["Kathikon", "NotAllowed"]


class Kathikon:
    """The jobs of an app, or of a `Storage`, in an operator's hands. No worker needs to run.

    >>> kathikon = Kathikon(app)
    >>> kathikon.jobs(states="dead", task="proj.mail.*").retry(rate="50/s")
    3
    >>> print(kathikon.explain(job_id))
    it waits: no live worker consumes its queue 'mail'

    Each verb is one transition in one transaction, which also records who did it and why. A verb returns the job as it
    is then. It raises `NotFound` for an id that no row has, and `NotAllowed` for a job whose state does not allow it,
    and changes nothing then.

    Arguments:
        app: a Celery app whose broker is Kathikon, or a storage.
        operator: who acts, for the record; default: the user and the machine.

    Raises `TypeError` for another *app*, and the storage's errors, such as `Unavailable`, if the database is away.

    Arguments of the methods:
        job_id: the id of a job, or Celery's `AsyncResult` of it.
        reason: why, for the record of acts and the history of the job.
        name: the name of a queue.
        pattern: the name of a task, in which ``*`` and ``?`` stand for other characters.
        until: the moment (an aware datetime), or the time from now by the database's clock (a timedelta), at which a
            pause ends by itself; `None`: never.
    """

    def __init__(self, app: Celery | Storage, operator: str | None = None) -> None:
        if not (isinstance(app, Storage) or hasattr(app, "conf")):
            raise TypeError(f"{app!r} is neither a Celery app nor a Storage")
        self.storage = app if isinstance(app, Storage) else Storage.for_app(app)
        self.operator = operator or _somebody()
        self._app = None if isinstance(app, Storage) else app
        self.storage.setup()

    @property
    def schedules(self) -> Schedules:
        """The schedules, to see and to change.

        >>> [(one.name, one.next_at) for one in kathikon.schedules.every()]
        """
        return Schedules(self.storage, self._app, self.operator)

    @property
    def limits(self) -> Limits:
        """The limits, to see and to change at run time.

        >>> kathikon.limits.set("stripe", rate="10/m")
        """
        return Limits(self.storage, self.operator)

    # --- one job

    def job(self, job_id: str | AsyncResult) -> Job:
        """Return the job. Raises `NotFound`.

        >>> kathikon.job(result.id).state
        <State.COMPLETED: 'completed'>
        """
        name = _id(job_id)
        job = self.storage.fetch(name)
        if job is None:
            raise NotFound(f"there is no job {name!r}")
        return job

    def explain(self, job_id: str | AsyncResult) -> Explanation:
        """Say why the job does not run, or how it ended. Raises `NotFound`.

        >>> kathikon.explain(job_id).why
        'no_consumer'
        """
        return explain(self.storage, self.job(job_id))

    def history(self, job_id: str | AsyncResult) -> list[Event]:
        """Return what happened to the job, oldest first: its times, failures, rescues, and operators' acts.

        Raises `NotFound`.

        >>> [(event.event, event.operator) for event in kathikon.history(job_id)]
        [('published', None), ('failed', None), ('dead', None), ('retry', 'ada@desk')]
        """
        return history(self.storage, self.job(job_id))

    def errors(self, job_id: str | AsyncResult) -> list[dict[str, Any]]:
        """Return the job's failures, one ``{"at", "attempt", "reason"}`` for each. Raises `NotFound`.

        >>> [failure["reason"] for failure in kathikon.errors(job_id)]
        ["ConnectionError('bank is busy')"]
        """
        return self.job(job_id).errors

    def children(self, job_id: str | AsyncResult) -> list[Job]:
        """Return the jobs that the job's task has sent, oldest first.

        >>> [child.task for child in kathikon.children(job_id)]
        """
        name = _id(job_id)
        return [job for job in self.storage.workflow(name) if job.parent_id == name]

    def result(self, job_id: str | AsyncResult) -> AsyncResult:
        """Return Celery's result of the job. Raises `TypeError` if there is no app.

        >>> kathikon.result(job_id).get(timeout=10)
        """
        if self._app is None:
            raise TypeError("a result is decoded by an app: say Kathikon(app), not Kathikon(storage)")
        return self._app.AsyncResult(_id(job_id))

    def cancel(self, job_id: str | AsyncResult, terminate: bool = False, reason: str | None = None) -> Job:
        """Cancel a job that has not ended: no worker runs it any more, and what a running task returns is not kept.

        A chord learns of it as of a revoked task, and fails; the rest of a chain is never sent. A worker that holds the
        job is told as well, if there is an app: it drops a job that has not begun. *terminate*: it also ends a task
        that runs, as Celery's ``revoke`` does. A running `AbortableTask` sees that it ``is_aborted()``.

        >>> kathikon.cancel(job_id, reason="ordered twice").state
        <State.CANCELLED: 'cancelled'>
        """
        was_held = False
        change = verbs.cancelled(reason or verbs.BY_HAND["cancel"])

        def noting(job: Job) -> None:
            nonlocal was_held
            was_held = job.state in HELD
            change(job)

        job = self._change("cancel", job_id, noting, reason)
        if was_held:
            self.tell_holders([job.id], terminate)
        return job

    def tell_holders(self, ids: Sequence[str], terminate: bool = False) -> None:
        """Tell the workers that hold the cancelled jobs *ids*, if there is an app; *terminate*: see `cancel`."""
        if ids and self._app is not None:
            self._app.control.revoke(list(ids), terminate=terminate)

    def retry(self, job_id: str | AsyncResult, reason: str | None = None) -> Job:
        """Make a job that has ended without success ready to run again, in the same row, with all its attempts.

        A job that waits for its due time, also for a retry, is due now. What Celery knows of earlier retries is
        forgotten, and a moment at which the job expires, since that may have passed. What was to follow the job
        follows it: the next task of its chain, and the body of its chord when all parts have succeeded.

        >>> kathikon.retry(job_id, reason="the bank is back").state
        <State.AVAILABLE: 'available'>
        """
        return self._change("retry", job_id, verbs.retried, reason)

    def rerun(self, job_id: str | AsyncResult, reason: str | None = None) -> Job:
        """Publish a copy of a job in any state, with an id of its own and `Job.rerun_of`; return the copy.

        The copy runs alone: nothing that followed the job follows the copy.

        >>> kathikon.rerun(job_id).rerun_of == job_id
        True
        """
        act = self._act("rerun", _id(job_id), reason)
        return self.storage.backend.copy(_id(job_id), verbs.checked("rerun", verbs.copied()), act)

    def discard(self, job_id: str | AsyncResult, reason: str | None = None) -> Job:
        """Give up a job that is dead or waits: it never runs, unless it is retried by hand.

        >>> kathikon.discard(job_id, reason="the customer is gone").cause
        <Cause.GIVEN_UP: 'given_up'>
        """
        return self._change("discard", job_id, verbs.discarded(reason or verbs.BY_HAND["discard"]), reason)

    def check(self, verb: str, job_id: str | AsyncResult) -> Job:
        """Return the job if *verb* is allowed for it now. Raises `NotFound` or `NotAllowed`."""
        job = self.job(job_id)
        verbs.check(verb, job)
        return job

    def _change(self, verb: str, job_id: str | AsyncResult, change: verbs.Change, reason: str | None) -> Job:
        name = _id(job_id)
        act = self._act(verb, name, reason)
        (job,) = self.storage.backend.change([name], verbs.checked(verb, change), act, True, ())
        return job

    def _act(self, verb: str, target: str, reason: str | None) -> Act:
        return Act(verb=verb, target=target, operator=self.operator, reason=reason)

    # --- many jobs

    def jobs(
        self,
        states: State | str | Collection[State | str] = (),
        *,
        queue: str | None = None,
        task: str | None = None,
        error: str | None = None,
        cause: Cause | str | None = None,
        argument: str | None = None,
        root: str | None = None,
        group: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        ended_since: datetime | None = None,
        ended_until: datetime | None = None,
    ) -> Selection:
        """Return the jobs that fit all that is given. Nothing is read yet.

        >>> kathikon.jobs("dead", task="proj.mail.*", error="*timeout*").count()
        12
        >>> kathikon.jobs(["available", "scheduled"], queue="emails").cancel(reason="wrong list")
        40

        Arguments:
            states: a state or several, as `State` or by name; empty: any.
            queue: the name of the queue.
            task: the name of the task, or a pattern with ``*`` and ``?``.
            error: the reason of the job's end, or a pattern.
            cause: why the job has ended, as `Cause` or by name.
            argument: a pattern within the arguments as they are written in JSON, such as ``"user_id": 42``.
            root: the id of the job with which the workflow began.
            group: the id of the group.
            since: published at that moment or later; an aware datetime, as the next ones.
            until: published before that moment.
            ended_since: ended at that moment or later.
            ended_until: ended before that moment.

        Raises `ValueError` for a state or a cause that does not exist, and for a moment without a time zone, and
        `TypeError` for a pattern that is no text.
        """
        chosen = [states] if isinstance(states, str) else states
        moments: dict[str, Any] = {
            "since": since,
            "until": until,
            "ended_since": ended_since,
            "ended_until": ended_until,
        }
        for name, moment in moments.items():
            _check_aware(name, moment)
        fields = Filter(
            states=frozenset(_member(State, "state", state) for state in chosen),
            cause=None if cause is None else _member(Cause, "cause", cause),
            queue=queue, task=task, error=error, argument=argument, root=root, group=group, **moments,
        )  # fmt: skip
        return Selection(self, fields)

    # --- pauses

    def pause_queue(self, name: str, until: datetime | timedelta | None = None, reason: str | None = None) -> None:
        """Keep all workers from starting jobs of the queue. Jobs that run, run to their end; those that wait, wait.

        >>> kathikon.pause_queue("emails", timedelta(hours=1), reason="the mail server is down")

        Raises `ValueError` for a name that is empty or a moment that is not in the future, and `TypeError` for an
        *until* that is neither a datetime nor a timedelta.
        """
        self._pause(Kind.QUEUE, name, until, reason)

    def pause_task(self, pattern: str, until: datetime | timedelta | None = None, reason: str | None = None) -> None:
        """Keep all workers from starting jobs of a task. Raises as `pause_queue` does.

        >>> kathikon.pause_task("proj.mail.*", reason="wrong template")
        """
        self._pause(Kind.TASK, pattern, until, reason)

    def pause_all(self, until: datetime | timedelta | None = None, reason: str | None = None) -> None:
        """Keep all workers from starting any job. Raises as `pause_queue` does.

        >>> kathikon.pause_all(timedelta(minutes=10), reason="the database moves")
        """
        self._pause(Kind.ALL, "", until, reason)

    def resume_queue(self, name: str, reason: str | None = None) -> bool:
        """End the pause of a queue; return false if there is none.

        >>> kathikon.resume_queue("emails")
        True
        """
        return self._resume(Kind.QUEUE, name, reason)

    def resume_task(self, pattern: str, reason: str | None = None) -> bool:
        """End the pause of a task, named as it was paused; return false if there is none."""
        return self._resume(Kind.TASK, pattern, reason)

    def resume_all(self, reason: str | None = None) -> bool:
        """End the pause of everything; return false if there is none. Pauses of queues and tasks stay."""
        return self._resume(Kind.ALL, "", reason)

    def pauses(self) -> list[Pause]:
        """Return the pauses that hold.

        >>> [str(pause) for pause in kathikon.pauses()]
        ["queue 'emails' is paused since 2026-11-26 10:00:00+00:00 by ada@desk: the mail server is down"]
        """
        with self.storage.database.read() as connection:
            return pauses.every(connection)

    def _pause(self, kind: Kind, name: str, until: datetime | timedelta | None, reason: str | None) -> None:
        if not name and kind is not Kind.ALL:
            raise ValueError(f"the {kind} to pause has no name; pause_all() pauses everything")
        if until is not None:
            if not isinstance(until, datetime | timedelta):
                raise TypeError(f"until = {until!r} is neither a moment nor a time: give a datetime or a timedelta")
            with self.storage.database.read() as connection:
                present = reading.present(connection)
            end = present + until if isinstance(until, timedelta) else until
            _check_aware("until", end)
            if end <= present:
                raise ValueError(f"until = {until} is not in the future: such a pause would be over at once")
            until = end
        self.storage.backend.pause(kind, name, until, self._act("pause", _target(kind, name), reason))

    def _resume(self, kind: Kind, name: str, reason: str | None) -> bool:
        return self.storage.backend.resume(kind, name, self._act("resume", _target(kind, name), reason))

    # --- what there is

    def status(self) -> Status:
        """Return the state of all queues, the workers, the pauses, and how many jobs have ended in the last minute.

        >>> status = kathikon.status()
        >>> status.workers, [(queue.name, queue.ready, queue.oldest) for queue in status.queues]
        (2, [('default', 31, 0.4), ('emails', 0, None)])
        """
        with self.storage.database.read() as connection:
            return status.status(connection)

    def queue_status(self) -> list[QueueStatus]:
        """Return the state of each queue that has jobs, workers or a pause."""
        return self.status().queues

    def workers(self) -> list[Living]:
        """Return the living processes that run jobs, by name.

        >>> [(worker.name, worker.holds) for worker in kathikon.workers()]
        [('celery@web1', 4)]
        """
        with self.storage.database.read() as connection:
            return nodes.living(connection)

    def acts(self, limit: int = 50, before: Act | None = None) -> list[Act]:
        """Return up to *limit* records of what operators did, the newest first, from the one behind *before* on.

        >>> [(act.operator, act.verb, act.changed) for act in kathikon.acts(limit=2)]
        [('ada@desk', 'retry', 12), ('ada@desk', 'cancel', 40)]
        """
        with self.storage.database.read() as connection:
            return acts.page(connection, limit, before)


def _somebody() -> str:
    try:
        return f"{getuser()}@{gethostname()}"
    except (KeyError, OSError):  # a container's user without a name
        return gethostname()


def _id(job: str | AsyncResult) -> str:
    return job if isinstance(job, str) else str(getattr(job, "id", job))


def _target(kind: Kind, name: str) -> str:
    return "everything" if kind is Kind.ALL else f"{kind} {name}"


def _check_aware(name: str, moment: Any) -> None:
    if not isinstance(moment, datetime | None):
        raise TypeError(f"{name} = {moment!r} is no datetime")
    if moment is not None and moment.tzinfo is None:
        raise ValueError(f"{name} = {moment} has no time zone; use an aware datetime")


def _member(kind: Any, word: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"there is no {word} {str(value)!r}; there are: {', '.join(kind)}") from None
