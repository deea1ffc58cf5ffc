"""`Kathikon`, an operator's hands: verbs for one job, and for all jobs of a selection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from celery.utils.time import rate as per_second

from kathikon_celery.job import HELD, TERMINAL, Cause, Job, State
from kathikon_celery.operate.explain import Explanation, explain
from kathikon_celery.publish.envelope import anew
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import MovedOn, NotFound
from kathikon_celery.storage.selecting import Filter

if TYPE_CHECKING:
    from celery import Celery

#: The states of which each verb makes another one.
MAY = {
    "cancel": frozenset(State) - TERMINAL,
    "retry": frozenset({State.DEAD, State.CANCELLED, State.DISCARDED, State.RETRYABLE, State.SCHEDULED}),
    "discard": frozenset(State) - HELD - {State.COMPLETED, State.CANCELLED, State.DISCARDED},
}
#: How many jobs a bulk verb reads at once.
CHUNK = 100
#: How often a verb is tried while the job moves on.
TRIES = 20

Progress = Callable[[int], object]


class NotAllowed(ValueError):
    """The job's state does not allow the verb; nothing was changed."""

    def __init__(self, verb: str, job: Job) -> None:
        self.job = job
        allowed = ", ".join(state for state in State if state in MAY[verb])
        what = f"is {job.state}" if job.queue is not None else "is only a result, without a message,"
        super().__init__(f"job {job.id!r} {what}; nothing was done: {verb} is for jobs that are {allowed}")


class Kathikon:
    """The jobs of an app, or of a `Storage`, in an operator's hands. No worker needs to run.

    >>> kathikon = Kathikon(app)
    >>> kathikon.jobs(states="dead", task="proj.mail.*").retry(rate="50/s")
    3
    >>> print(kathikon.explain(job_id))
    it waits: no live worker consumes its queue 'mail'

    Each verb is one transition in one transaction. It returns the job as it is then. It raises `NotFound` for an id
    that no row has, and `NotAllowed` for a job whose state does not allow it, and changes nothing then.

    Arguments:
        app: a Celery app whose broker is Kathikon, or a storage.
    """

    def __init__(self, app: Celery | Storage) -> None:
        self.storage = app if isinstance(app, Storage) else Storage.for_app(app)
        self._app = None if isinstance(app, Storage) else app
        self.storage.setup()

    # --- one job

    def job(self, job_id: str) -> Job:
        """Return the job. Raises `NotFound`."""
        job = self.storage.fetch(job_id)
        if job is None:
            raise NotFound(f"there is no job {job_id!r}")
        return job

    def explain(self, job_id: str) -> Explanation:
        """Say why the job does not run, or how it ended. Raises `NotFound`."""
        return explain(self.storage, self.job(job_id))

    def cancel(self, job_id: str, terminate: bool = False, reason: str = "cancelled by hand") -> Job:
        """Cancel a job that has not ended: no worker runs it any more, and what a running task returns is not kept.

        Chains and chords learn of it as of a revoked task. A worker that holds the job is told as well, if there is an
        app: it drops a job that has not begun. *terminate*: it also ends a task that runs, as Celery's ``revoke`` does.
        """
        was_held = False

        def change(job: Job) -> None:
            nonlocal was_held
            was_held = job.state in HELD
            job.state, job.cause, job.reason = State.CANCELLED, Cause.REVOKED, reason

        job = self._change("cancel", job_id, change)
        if was_held and self._app is not None:
            self._app.control.revoke(job_id, terminate=terminate)
        return job

    def retry(self, job_id: str) -> Job:
        """Make a job that has ended without success ready to run again, in the same row, with all its attempts.

        A job that waits for its due time, also for a retry, is due now. What Celery knows of earlier retries is
        forgotten, and a moment at which the job expires, since that may have passed.
        """

        def change(job: Job) -> None:
            job.state, job.scheduled_at, job.expires_at = State.AVAILABLE, None, None
            job.envelope = anew(job.envelope)

        return self._change("retry", job_id, change)

    def discard(self, job_id: str, reason: str = "discarded by hand") -> Job:
        """Give up a job that is dead or waits: it never runs, unless it is retried by hand."""

        def change(job: Job) -> None:
            job.state, job.cause, job.reason = State.DISCARDED, Cause.GIVEN_UP, reason

        return self._change("discard", job_id, change)

    def check(self, verb: str, job_id: str) -> Job:
        """Return the job if *verb* is allowed for it now. Raises `NotFound` or `NotAllowed`."""
        job = self.job(job_id)
        if job.state not in MAY[verb] or job.queue is None:
            raise NotAllowed(verb, job)
        return job

    def _change(self, verb: str, job_id: str, change: Callable[[Job], None]) -> Job:
        for _ in range(TRIES):
            job = self.check(verb, job_id)
            change(job)
            with suppress(MovedOn):
                self.storage.update(job)
                return job
        raise MovedOn(f"job {job_id!r} moves on faster than it can be changed; try again")

    # --- many jobs

    def jobs(
        self,
        states: State | str | Collection[State | str] = (),
        *,
        queue: str | None = None,
        task: str | None = None,
        error: str | None = None,
        cause: Cause | str | None = None,
        root: str | None = None,
        group: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Selection:
        """Return the jobs that fit all that is given: see `Filter`. Nothing is read yet.

        Raises `ValueError` for a state or a cause that does not exist, and for a moment without a time zone.
        """
        chosen = [states] if isinstance(states, str) else states
        for name, moment in (("since", since), ("until", until)):
            if moment is not None and moment.tzinfo is None:
                raise ValueError(f"{name} = {moment} has no time zone; use an aware datetime")
        fields = Filter(
            states=frozenset(_member(State, "state", state) for state in chosen),
            cause=None if cause is None else _member(Cause, "cause", cause),
            queue=queue, task=task, error=error, root=root, group=group, since=since, until=until,
        )  # fmt: skip
        return Selection(self, fields)


def _member(kind: Any, word: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"there is no {word} {str(value)!r}; there are: {', '.join(kind)}") from None


@dataclass(frozen=True)
class Selection:
    """The jobs that fit a filter, whenever they are asked for.

    A bulk verb changes job by job, each in its own transaction: one that is interrupted has changed those that it has
    reached, and the next call goes on with the others. A job whose state does not allow the verb is left out.

    Arguments of the verbs:
        rate: at most so many, in Celery's words: ``"50/s"``.
        progress: called after each job with the number of those that were changed so far.
    """

    kathikon: Kathikon
    filter: Filter

    def count(self) -> int:
        """Return the number of jobs."""
        return self.kathikon.storage.count(self.filter)

    def page(self, limit: int = 50, after: Job | None = None) -> list[Job]:
        """Return up to *limit* jobs, from the one behind *after* on, without their bodies and results.

        Jobs that are ready come in the order of their queue, those that wait for their time by that, those that have
        ended from the newest end on; if no state is asked for, all from the newest on.
        """
        return self.kathikon.storage.page(self.filter, limit, after)

    def __iter__(self) -> Iterator[Job]:
        last = None
        while found := self.page(CHUNK, last):
            yield from found
            last = found[-1]

    def cancel(self, rate: str | None = None, progress: Progress | None = None, **options: Any) -> int:
        """`Kathikon.cancel` each job; return the number of those that were changed."""
        return self._each("cancel", rate, progress, options)

    def retry(self, rate: str | None = None, progress: Progress | None = None) -> int:
        """`Kathikon.retry` each job; return the number of those that were changed."""
        return self._each("retry", rate, progress, {})

    def discard(self, rate: str | None = None, progress: Progress | None = None, **options: Any) -> int:
        """`Kathikon.discard` each job; return the number of those that were changed."""
        return self._each("discard", rate, progress, options)

    def able(self, verb: str) -> Selection:
        """Return those of the jobs whose state allows *verb*. Raises `ValueError` if none that is asked for does."""
        asked = frozenset(self.filter.states or State)
        states = MAY[verb] & asked
        if not states:  # an empty filter would mean every state
            raise ValueError(
                f"{verb} is for jobs that are {', '.join(sorted(MAY[verb]))}, and not for those that are"
                f" {', '.join(sorted(asked))}"
            )
        return replace(self, filter=replace(self.filter, states=states))

    def _each(self, verb: str, rate: str | None, progress: Progress | None, options: dict[str, Any]) -> int:
        act = getattr(self.kathikon, verb)
        pause = 1 / per_second(rate) if rate and per_second(rate) else 0.0
        number, next_at = 0, monotonic()
        for job in self:
            if job.state not in MAY[verb]:
                continue
            sleep(max(0.0, next_at - monotonic()))
            next_at = max(next_at, monotonic() - 1.0) + pause  # what was slow is made up for by a second at most
            with suppress(NotAllowed, NotFound):
                act(job.id, **options)
                number += 1
                if progress is not None:
                    progress(number)
        return number
