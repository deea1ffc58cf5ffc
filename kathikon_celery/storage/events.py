"""What happened to jobs: after each commit, listeners are called once. Without a listener, nothing is done.

History, signals, metrics and limits build on this hook. A listener hears what its own process has written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, select

from kathikon_celery.job import Cause, Job, State
from kathikon_celery.storage.dialects.parameters import Changed
from kathikon_celery.storage.names import key
from kathikon_celery.storage.tables import jobs

logger = logging.getLogger(__name__)

#: Key in ``Connection.info`` of the events of the connection's transaction.
_KEPT = "kathikon_events"
_NOW = select(jobs.c.id, jobs.c.queue, jobs.c.task, jobs.c.state, jobs.c.cause).order_by(jobs.c.seq)
_NOW_OF_IDS = _NOW.where(jobs.c.id.in_(bindparam("which", expanding=True)))
_NOW_OF_SEQS = _NOW.where(jobs.c.seq.in_(bindparam("which", expanding=True)))


def _cause(value: str | None) -> Cause | None:
    return Cause(value) if value else None


class Event(NamedTuple):
    """A job has entered a state."""

    #: The job's id and queue, as keys (see names.py), and its task.
    id: str
    queue: str | None
    task: str
    state: State
    cause: Cause | None = None
    #: The process that held the job was lost.
    is_rescue: bool = False


#: Called with all events of one transaction, in the thread that has committed it, while that thread holds no lock and
#: no connection. It must return soon: a worker claims and reports in that thread. Of two threads, the one that commits
#: first need not be the first to call.
Listener = Callable[[Sequence[Event]], None]


#: Listeners to all databases of this process.
_everywhere: list[Listener] = []


def listen_everywhere(listener: Listener) -> None:
    """Call *listener* after each transaction of this process that has changed jobs, in any database.

    A second call changes nothing.
    """
    if listener not in _everywhere:
        _everywhere.append(listener)


class Events:
    """The events of one database, as far as this process writes them.

    Threads: any thread may listen. Each transaction collects its events on its own connection.

    >>> stop = storage.database.events.listen(lambda events: print(events))
    """

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call *listener* after each transaction that has changed jobs; return a function that ends that."""
        self._listeners += (listener,)

        def stop() -> None:
            self._listeners = tuple(one for one in self._listeners if one is not listener)

        return stop

    def __bool__(self) -> bool:
        return bool(self._listeners or _everywhere)

    def which(self) -> list[Changed] | None:
        """Return a list for a verb's argument of that name; `None` without listeners."""
        return [] if self else None

    def entered(
        self,
        connection: Connection,
        which: Iterable[Changed | Job] | None,
        state: State,
        cause: Cause | None = None,
    ) -> None:
        """Note that the jobs *which* have entered *state* by the transaction of *connection*."""
        if self and which:
            self._add(connection, [Event(job.id, job.queue, job.task, state, cause) for job in which])

    def published(self, connection: Connection, batch: Iterable[Job]) -> None:
        """Note that the transaction of *connection* has published *batch*."""
        if not self:
            return
        now = datetime.now(timezone.utc)
        for job in batch:
            waits = job.scheduled_at is not None and job.scheduled_at > now
            ready = State.BLOCKED if job.limits else State.AVAILABLE
            state = (State.RETRYABLE if job.state is State.RETRYABLE else State.SCHEDULED) if waits else ready
            self._add(connection, [Event(key(job.id), key(job.queue or ""), job.task, state)])

    def changed(
        self, connection: Connection, *, ids: Iterable[str] = (), seqs: Iterable[int] = (), is_rescue: bool = False
    ) -> None:
        """Read and note the states of jobs, after a change whose statement does not return them."""
        ids, seqs = list(ids), list(seqs)
        if self and (ids or seqs):
            rows = connection.execute(_NOW_OF_IDS if ids else _NOW_OF_SEQS, {"which": ids or seqs})
            self._add(connection, [Event(*row[:3], State(row.state), _cause(row.cause), is_rescue) for row in rows])

    def _add(self, connection: Connection, events: list[Event]) -> None:
        connection.info.setdefault(_KEPT, []).extend(events)

    def take(self, connection: Connection) -> list[Event]:
        """Return the events noted for *connection*, and forget them."""
        return connection.info.pop(_KEPT, [])  # type: ignore[no-any-return]

    def tell(self, events: Sequence[Event]) -> None:
        """Call the listeners. The error of a listener is logged, since the events have happened."""
        for listener in (*self._listeners, *_everywhere) if events else ():
            try:
                listener(events)
            except Exception:
                logger.exception("Kathikon: the listener %r failed at %d events", listener, len(events))
