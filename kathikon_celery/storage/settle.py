"""Writes a task's end and all that follows from it in one transaction: results, successors, the count of a chord.

So a process that is killed at any point leaves neither a result whose successor is lost nor a successor sent twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection

from kathikon_celery.job import Cause, Hold, Job, State
from kathikon_celery.storage import chords, insert, results
from kathikon_celery.storage.chords import Header, Part
from kathikon_celery.storage.engine.database import Database


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """The end of one task, for its row. Without *hold*, the first end that is written counts.

    *unreported*: the row has ended already, and this end is its report (see `finish.unreported`).
    """

    task_id: str
    hold: Hold | None
    state: State
    written: dict[str, str | None]
    reason: str | None = None
    cause: Cause | None = None
    unreported: bool = False


@dataclass
class TaskEnd:
    """What is written together. The first of *ends* is the task's own: if the job has moved on, nothing is written."""

    ends: list[JobEnd] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    #: Called after the commit, for example to revoke tasks that can no longer run.
    after: list[Callable[[], None]] = field(default_factory=list)
    #: Of a chord's body: it fails, with a part.
    is_failed: bool = False

    @property
    def is_return(self) -> bool:
        """Whether all that is to be written is the return of one task, whose job this process holds."""
        alone = len(self.ends) == 1 and not (self.parts or self.jobs)
        return alone and self.ends[0].hold is not None and self.ends[0].state is State.COMPLETED


class Incomplete(Exception):
    """Chords have become complete, and their bodies are not prepared yet; nothing was written."""

    def __init__(self, headers: list[Header]) -> None:
        super().__init__(", ".join(header.chord for header in headers))
        self.headers = headers


def settle(database: Database, ending: TaskEnd, bodies: Mapping[str, TaskEnd], on_disk: bool = False) -> bool:
    """Write *ending*. If its job is another node's now, or has ended before, write nothing and return false.

    Arguments:
        bodies: chord id -> what to write as well if that chord becomes complete.
        on_disk: whether all is on disk when this returns; otherwise a server that crashes may forget it as a whole.

    Raises `Incomplete` if a chord becomes complete that is not in *bodies*.
    """

    def write(again: bool) -> bool:
        if ending.is_return:  # one statement
            with database.once(durable=on_disk) as connection:
                return _end(database, connection, ending.ends[0]) or again
        with database.write(durable=on_disk) as connection:
            if ending.ends and not _end(database, connection, ending.ends[0]):
                return again  # written by the try whose answer was lost
            todo, sent, missing = [ending], [], []
            for one in todo:  # the loop adds to the list
                for end in one.ends if one is not ending else one.ends[1:]:
                    _end(database, connection, end)
                sent += one.jobs
                for part in one.parts:
                    if chords.count(database, connection, part):
                        if part.chord in bodies:
                            todo.append(bodies[part.chord])
                            (chords.fail if bodies[part.chord].is_failed else chords.close)(connection, part.chord)
                        else:
                            missing.append(chords.header(connection, part.chord))
            if missing:
                raise Incomplete(missing)
            if sent:
                insert.publish(database, connection, sent)
        published[:] = sent
        return True

    published: list[Job] = []
    is_written = database.patiently(write)
    insert.offer(database, published)
    return is_written


def _end(database: Database, connection: Connection, end: JobEnd) -> bool:
    if end.hold is not None:
        return results.end(database, connection, end.hold, end.state, reason=end.reason, cause=end.cause, **end.written)
    if end.unreported:
        return results.tell(database, connection, end.task_id, **end.written)
    return results.end_alone(database, connection, end.task_id, end.state, end.reason, end.cause, **end.written)
