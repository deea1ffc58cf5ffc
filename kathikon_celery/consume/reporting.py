"""Writes how deliveries ended, and remembers for a while what was written."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import Connection

from kathikon_celery.consume.delivery import CRASHED, Delivery, Outcome, Verdict
from kathikon_celery.job import Cause, Hold, State, in_brief
from kathikon_celery.storage import finish, messages, results
from kathikon_celery.storage.backend import StorageBackend
from kathikon_celery.storage.errors import in_words, is_refusal

logger = logging.getLogger(__name__)

#: Seconds for which reports are remembered, as a crashed server may forget them. PostgreSQL flushes in a third of that.
MEMORY = 2.0

#: Deliveries, and how they ended.
Reports = Sequence[tuple[Delivery, Outcome]]


def write(
    backend: StorageBackend, connection: Connection, reports: Reports, complain: Callable[[list[Delivery]], None]
) -> set[str]:
    """Write *reports*; return the keys of the queues to which jobs were returned.

    Arguments:
        complain: called with deliveries of which at least one had moved on when it was reported.
    """
    jobs: defaultdict[Verdict, list[Delivery]] = defaultdict(list)
    gone: list[Hold] = []
    returned: list[Hold] = []
    ends: dict[Hold, Mapping[str, str | None]] = {}
    for delivery, outcome in reports:
        if not delivery.is_job:
            (gone if outcome.verdict in (Verdict.DONE, Verdict.ENDED) else returned).append(delivery.hold)
        elif outcome.written is not None:
            ends[delivery.hold] = outcome.written
        elif outcome.state is None:
            jobs[outcome.verdict].append(delivery)
        elif not backend.ended(
            connection,
            delivery.hold,
            outcome.state,
            outcome.cause,
            outcome.reason,
            outcome.traceback,
            outcome.status,
        ):
            complain([delivery])
    if (done := jobs[Verdict.DONE]) and backend.completed(connection, _holds(done)) != len(done):
        complain(done)
    if awaited := [one.hold for one, outcome in reports if outcome.result_follows]:
        results.await_results(connection, awaited)
    if ends and backend.completed_with(connection, ends) != len(ends):
        complain([one for one, outcome in reports if outcome.written is not None])
    if back := jobs[Verdict.BACK]:
        backend.given_back(connection, _holds(back))
    if unbegun := jobs[Verdict.UNBEGUN]:
        backend.given_back(connection, _holds(unbegun), has_begun=False)
    crashed = jobs[Verdict.CRASHED]
    if crashed and backend.given_back(connection, _holds(crashed), True) != len(crashed):
        complain(crashed)
    if replaced := jobs[Verdict.REPLACED]:
        backend.replaced(connection, _holds(replaced))
    if ready := back + unbegun + crashed:
        backend.database.dialect.wake(connection, {one.queue for one in ready}, len(ready))
    if gone:
        messages.acknowledge(backend.database, connection, gone)
    if returned:
        messages.give_back(backend.database, connection, returned)
    return {one.queue for one in ready}


def write_one(write: Callable[[Reports], None], delivery: Delivery, outcome: Outcome) -> Outcome | None:
    """Call *write* with one report, until the database accepts it; return what was accepted.

    This is *outcome* itself, or, if the database refuses that, another object: an end without the outcome's texts;
    else the job is given back, with one crash more; else nothing is written: `None`.
    """
    reason = ""
    for ended in (outcome, None, CRASHED):
        attempt = ended or Outcome(
            Verdict.ENDED, outcome.state or State.DEAD, Cause.REFUSED, reason, outcome.status
        )  # fmt: skip
        try:
            write([(delivery, attempt)])
            return attempt
        except Exception as error:
            if not is_refusal(error):
                raise
            reason = in_brief(f"the database cannot store how the task ended: {in_words(error)}")
            name = getattr(delivery.item, "id", delivery.tag)
            logger.error("Kathikon: the report of %s, %s, was refused: %s", name, attempt.verdict.name, in_words(error))
    return None


def _holds(deliveries: list[Delivery]) -> list[Hold]:
    return [one.hold for one in deliveries]


def complain(connection: Connection, deliveries: list[Delivery]) -> None:
    """Log which deliveries had moved on when they were reported, so that the report changed nothing."""
    holds = [one.hold for one in deliveries if not one.stored]
    if holds and (lost := finish.moved_on(connection, holds)):
        logger.warning(
            "Kathikon: %s had been given to others, or published anew, before this worker reported its end;"
            " the report changed nothing", ", ".join(lost),
        )  # fmt: skip


class RecentReports:
    """The reports of the last moments: a server that crashed may have forgotten them."""

    def __init__(self) -> None:
        self._said: deque[tuple[float, Delivery, Outcome]] = deque()

    def add(self, now: float, reports: Reports) -> None:
        """Remember *reports*, which were written at the monotonic time *now*, and forget the old ones."""
        self._said += [(now, delivery, outcome) for delivery, outcome in reports if not delivery.stored]
        while self._said and self._said[0][0] < now - MEMORY:
            self._said.popleft()

    def reports(self) -> list[tuple[Delivery, Outcome]]:
        return [(delivery, outcome) for _, delivery, outcome in self._said]
