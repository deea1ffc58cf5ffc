"""Selections: the jobs that fit a filter, and the verbs for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import monotonic, sleep
from typing import TYPE_CHECKING

from celery.utils.time import rate as per_second

from kathikon_celery.job import HELD, Job
from kathikon_celery.operate import verbs
from kathikon_celery.operate.verbs import BY_DEFAULT, MAY, Change, NotAllowed
from kathikon_celery.storage.acts import Act
from kathikon_celery.storage.errors import NotFound
from kathikon_celery.storage.selecting import Filter

if TYPE_CHECKING:
    from kathikon_celery.operate.kathikon import Kathikon

#: How many jobs a bulk verb reads at once, and changes in one transaction.
CHUNK = 100
#: How many transactions a second a paced verb makes at most, so that its pace is even.
STEPS = 10.0

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Selection:
    """The jobs that fit a filter, whenever they are asked for.

    A bulk verb changes up to 100 jobs in each transaction: one that is interrupted has changed those that it has
    reached, and the next call goes on with the others. A job whose state does not allow the verb is left out. Each call
    is recorded: see `Kathikon.acts`. Iterating over a selection yields its jobs, page by page, as `page` does.

    >>> dead = kathikon.jobs("dead", task="proj.mail.*")
    >>> dead.count()
    1200
    >>> dead.retry(rate="50/s", reason="the mail server is back")
    1200

    Arguments:
        kathikon: the operator's hands, which have made the selection.
        filter: which jobs are meant.

    Arguments of the verbs:
        rate: at most so many jobs, in Celery's words: ``"50/s"``, ``"600/m"`` or ``"1000/h"``; `None`: no limit.
        progress: called after each transaction with the number of jobs that were changed so far.
        reason: why, for the record.
        terminate: end tasks that run, too.

    Raises `ValueError` for another rate, and from a verb that none of the selection's states allows.
    """

    kathikon: Kathikon
    filter: Filter

    def count(self, at_most: int | None = None) -> int:
        """Return the number of jobs. *at_most*: stop counting there; else the database reads all that may fit."""
        return self.kathikon.storage.count(self.filter, at_most)

    def page(self, limit: int = 50, after: Job | None = None) -> list[Job]:
        """Return up to *limit* jobs, from the one behind *after* on, without their bodies and results.

        Jobs that are ready come in the order of their queue, those that wait for their time by that, those that have
        ended from the newest end on; if no state is asked for, all from the newest on.
        """
        return self.kathikon.storage.page(self.filter, limit, after)

    def preview(self, verb: str, limit: int = 5) -> tuple[int, list[Job]]:
        """Return how many jobs *verb* would change, and the first *limit* of them. Raises `ValueError` as `able` does.

        >>> number, first = kathikon.jobs(queue="emails").preview("cancel")
        """
        able = self.able(verb)
        return able.count(), able.page(limit)

    def __iter__(self) -> Iterator[Job]:
        for found in self._pages(CHUNK):
            yield from found

    def _pages(self, limit: int) -> Iterator[list[Job]]:
        last = None
        while found := self.page(limit, last):
            yield found
            last = found[-1]

    def cancel(
        self,
        rate: str | None = None,
        progress: Progress | None = None,
        terminate: bool = False,
        reason: str | None = None,
    ) -> int:
        """`Kathikon.cancel` each job; return the number of those that were changed."""

        def tell(page: list[Job]) -> None:
            self.kathikon.tell_holders([job.id for job in page if job.state in HELD], terminate)

        change = verbs.cancelled(reason or verbs.BY_HAND["cancel"])
        return self._each("cancel", change, rate, progress, reason, tell)

    def retry(self, rate: str | None = None, progress: Progress | None = None, reason: str | None = None) -> int:
        """`Kathikon.retry` each job; return the number of those that were changed."""
        return self._each("retry", verbs.retried, rate, progress, reason)

    def discard(self, rate: str | None = None, progress: Progress | None = None, reason: str | None = None) -> int:
        """`Kathikon.discard` each job; return the number of those that were changed."""
        change = verbs.discarded(reason or verbs.BY_HAND["discard"])
        return self._each("discard", change, rate, progress, reason)

    def delete(self, rate: str | None = None, progress: Progress | None = None, reason: str | None = None) -> int:
        """Delete the rows of jobs that have ended, with results and history; return the number of deleted ones."""
        return self._each("delete", None, rate, progress, reason)

    def able(self, verb: str) -> Selection:
        """Return those of the jobs that allow *verb*. Raises `ValueError` if no state that is asked for does.

        Without a state, ``retry`` is for dead jobs only: not for those that somebody has cancelled or discarded, and
        not for those that wait for their time.
        """
        asked = frozenset(self.filter.states or BY_DEFAULT[verb])
        states = MAY[verb] & asked
        if not states:  # an empty filter would mean every state
            raise ValueError(
                f"{verb} is for jobs that are {', '.join(sorted(MAY[verb]))}, and not for those that are"
                f" {', '.join(sorted(asked))}"
            )
        is_run = verb != "delete"
        chosen = replace(self.filter, states=states, with_message=is_run, without_replaced=verb == "retry")
        return replace(self, filter=chosen)

    def _each(
        self,
        verb: str,
        change: Change | None,
        rate: str | None,
        progress: Progress | None,
        reason: str | None,
        after: Callable[[list[Job]], None] = lambda page: None,
    ) -> int:
        """Change the jobs page by page; return the number of those that were changed.

        Arguments:
            change: what *verb* makes of a job; `None`: delete the job.
            after: called after each transaction with its page, as the jobs were before.
        """
        backend = self.kathikon.storage.backend
        by_hand = verbs.checked(verb, change or verbs.unchanged)
        able = self.able(verb)
        a_second = pace(rate)
        size = max(1, min(CHUNK, int(a_second / STEPS))) if a_second else CHUNK
        act = Act(verb=verb, target=str(self.filter), operator=self.kathikon.operator, reason=reason)
        backend.begin(act)
        number, next_at = 0, monotonic()
        for page in able._pages(size):
            sleep(max(0.0, next_at - monotonic()))
            ids, skips = [job.id for job in page], (NotAllowed, NotFound)
            if change is None:
                done = backend.remove(ids, by_hand, act, skips)
            else:
                done = backend.change(ids, by_hand, act, False, skips)
            if a_second:  # what was slow is made up for by a second at most
                next_at = max(next_at, monotonic() - 1.0) + len(done) / a_second
            after(page)
            number += len(done)
            if progress is not None:
                progress(number)
        backend.end(act)
        return number


def pace(rate: str | float | None) -> float:
    """Return how many jobs a second *rate* means; 0: no limit. Raises `ValueError`."""
    if rate is None:
        return 0.0
    try:
        found = float(per_second(rate))
    except (ValueError, TypeError, KeyError, OverflowError):
        found = -1.0
    if not 0 < found < 1e9:
        raise ValueError(f"rate = {rate!r} is no rate above 0, such as 50/s, 600/m or 1000/h")
    return found
