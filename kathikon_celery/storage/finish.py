"""What a worker reports of the jobs that it holds: started, done, given up, given back.

Each report names the claim under which the job is held. If the row has moved on, the report changes nothing. A report
returns the number of jobs that it has changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Boolean, Connection, Integer, Text, bindparam, case, null, or_, select, update

from kathikon_celery.job import Cause, Hold, Job, State, in_brief
from kathikon_celery.storage import transitions
from kathikon_celery.storage.clock import now
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import printable
from kathikon_celery.storage.reading import errors_of, jobs_of
from kathikon_celery.storage.tables import UNREPORTED, held_as, jobs, of_hold
from kathikon_celery.storage.transitions import IS_HELD

#: The error of a run whose process was lost.
LOST = "the process that ran it was lost"


_STARTED = transitions.started(acked=bindparam("acked_early", type_=Boolean()))
#: The change of `completed`, also for `Dialect.complete_and_claim`.
#: Without a result of its own, the end is not hidden by what Celery has stored on the way.
COMPLETED = transitions.ended(
    State.COMPLETED,
    status=case((or_(jobs.c.status == "RETRY", jobs.c.status == "STARTED"), null()), else_=jobs.c.status),
)
_REPLACED = transitions.replaced()
_RETURNED = transitions.returned(crashed=transitions.is_so("has_crashed"), begun=transitions.is_so("has_begun"))


@lru_cache(maxsize=8)
def _ended(state: State) -> Any:
    texts = {name: bindparam(parameter, type_=Text()) for name, parameter in _TEXTS.items()}
    return transitions.ended(state, held_as(jobs), IS_HELD, **texts).of()


_TEXTS = {"reason": "why", "traceback": "trace", "status": "word", "cause": "because"}


def started(database: Database, connection: Connection, holds: Sequence[Hold], acked: bool = False) -> int:
    """Report that the pool has accepted the jobs. *acked*: they are acknowledged now, and never run again."""
    which = database.events.which()
    number = database.dialect.change_held(connection, _STARTED, holds, {"acked_early": acked}, which=which)
    database.events.entered(connection, which, State.RUNNING)
    return number


def completed(database: Database, connection: Connection, holds: Sequence[Hold]) -> int:
    """Report that the tasks have returned."""
    which = database.events.which()
    number = database.dialect.change_held(connection, COMPLETED, holds, {}, which=which)
    database.events.entered(connection, which, State.COMPLETED)
    return number


def ended(
    database: Database,
    connection: Connection,
    hold: Hold,
    state: State,
    cause: Cause | None,
    reason: str,
    traceback: str | None = None,
    status: str | None = None,
) -> int:
    """Report that the job has ended in *state* (dead, cancelled or discarded). *reason*: the *cause* in words.

    *status*: Celery's state, if errbacks, chains and chords know of the end; `None`: see `unreported`.
    """
    texts = {"why": printable(reason), "trace": printable(traceback)}
    values = {**of_hold(hold), **texts, "word": status, "because": cause.value if cause else None}
    changed = connection.execute(_ended(state), values).rowcount
    if changed:
        database.events.changed(connection, seqs=[hold.seq])
    if changed and state is State.DEAD:
        add_error(connection, hold.seq, reason, hold.fence)
    return changed


def replaced(database: Database, connection: Connection, holds: Sequence[Hold]) -> int:
    """Report that the tasks were replaced by others, the last of which will be published under the same id."""
    which = database.events.which()
    number = database.dialect.change_held(connection, _REPLACED, holds, {}, which=which)
    database.events.changed(connection, ids=[job.id for job in which or ()])
    return number


_UNREPORTED = select(jobs).where(UNREPORTED).order_by(jobs.c.ended_at).limit(100)
#: Whether a job is `unreported`.
IS_ANY_UNREPORTED = (
    select(jobs.c.seq).where(UNREPORTED).order_by(jobs.c.ended_at).limit(1).scalar_subquery().is_not(None)
)


def unreported(connection: Connection) -> list[Job]:
    """Return up to 100 jobs that did not succeed, and whose errbacks, chains and chords do not know that yet."""
    return jobs_of(connection, _UNREPORTED)


#: A run's failure is noted before the fence of its row has grown by this.
_SOON = 1000
#: A new row may have the `seq` of a deleted one; its fence is far off (see `first_fence`).
_ERRORS = (
    select(jobs.c.errors, jobs.c.attempts, jobs.c.fence, now().label("at"))
    .where(
        jobs.c.seq == bindparam("of_seq"),
        jobs.c.fence.between(bindparam("of_fence"), bindparam("of_fence", type_=Integer()) + _SOON),
    )
    .with_for_update()
)
_SET_ERRORS = update(jobs).where(jobs.c.seq == bindparam("of_seq")).values(errors=bindparam("all", type_=Text()))


def add_error(connection: Connection, seq: int, reason: str, fence: int) -> None:
    """Add *reason* to the job's errors, for the run claimed under *fence*. A repeated call adds nothing."""
    row = connection.execute(_ERRORS, {"of_seq": seq, "of_fence": fence}).first()
    if row is None:
        return
    # A retry may run already, or have ended. A claim adds 1 to the fence, and so does the next publication or return.
    # A later claim whose task never began makes this number one too low.
    try:
        attempt = max(1, row.attempts - (row.fence - fence) // 2)
    except TypeError:  # SQLite has texts in columns of numbers, if somebody writes them
        attempt = 1
    at: datetime = row.at
    try:
        every = errors_of(row.errors, with_fence=True)
    except ValueError:  # the end of the job is written even if its errors are corrupt
        said = f"corrupt row: errors is {in_brief(repr(row.errors))}"
        every = [{"at": at.isoformat(timespec="milliseconds"), "attempt": 0, "reason": said}]
    if any((error.get("fence"), error["reason"]) == (fence, reason) for error in every):
        return
    new = {"at": at.isoformat(timespec="milliseconds"), "attempt": attempt, "reason": reason, "fence": fence}
    # The error of a quick retry may be written first. Attempts are counted anew when an operator retries the job.
    later = [error for error in every if error.get("fence", 0) > fence]
    every = [*(error for error in every if error not in later), new, *later]
    connection.execute(_SET_ERRORS, {"of_seq": seq, "all": json.dumps(every)})


def given_back(
    database: Database, connection: Connection, holds: Sequence[Hold], crashed: bool = False, has_begun: bool = True
) -> int:
    """Make the jobs ready again, for any node.

    Arguments:
        crashed: the process that ran them was lost.
        has_begun: their tasks have begun; if not, the claim does not count as an attempt.
    """
    which = database.events.which()
    values = {"has_crashed": crashed, "has_begun": has_begun}
    changed = database.dialect.change_held(connection, _RETURNED, holds, values, which=which)
    database.events.changed(connection, ids=[job.id for job in which or ()])
    if crashed and changed:
        note_crashes(connection, holds)
    return changed


_GIVEN_BACK = select(jobs.c.seq, jobs.c.fence, jobs.c.crashes).where(jobs.c.seq.in_(bindparam("seqs", expanding=True)))


def note_crashes(connection: Connection, holds: Sequence[Hold]) -> None:
    """Add `LOST` to the errors of those jobs that were given back, and not changed again, since *holds*."""
    fences = {hold.seq: hold.fence for hold in holds}
    for row in connection.execute(_GIVEN_BACK, {"seqs": list(fences)}).all():
        if row.fence == fences[row.seq] + 1:
            add_error(connection, row.seq, LOST, fences[row.seq])


_WHERE_NOW = select(jobs.c.id, jobs.c.seq, jobs.c.fence).where(jobs.c.seq.in_(bindparam("seqs", expanding=True)))


def moved_on(connection: Connection, holds: Sequence[Hold]) -> list[str]:
    """Return the ids of those jobs of *holds* whose fence has changed since; ``#seq`` if the row is gone."""
    known = {row.seq: row for row in connection.execute(_WHERE_NOW, {"seqs": [hold.seq for hold in holds]})}
    return [
        known[hold.seq].id if hold.seq in known else f"#{hold.seq}"
        for hold in holds
        if hold.seq not in known or known[hold.seq].fence != hold.fence
    ]


def held_by(connection: Connection, node_id: int) -> Iterable[Hold]:
    """Return the claims of the jobs that the node holds."""
    query = select(jobs.c.seq, jobs.c.fence).where(jobs.c.node_id == node_id)
    return [Hold(row.seq, row.fence, node_id) for row in connection.execute(query)]
