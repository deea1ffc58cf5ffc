"""By hand: what operators' verbs do to rows, each in one transaction with its record and the jobs' history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sqlalchemy import Connection
from sqlalchemy import update as update_statement

from kathikon_celery.job import Job
from kathikon_celery.storage import acts, insert, prune
from kathikon_celery.storage.acts import Act
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key
from kathikon_celery.storage.reading import fetch
from kathikon_celery.storage.tables import jobs
from kathikon_celery.storage.update import locked, write_row

#: What a verb makes of the job that it is given. It raises an error for a job that does not allow the verb.
ByHand = Callable[[Job], None]
#: Errors of a `ByHand` for which a job is left as it is. Any other error undoes the whole transaction.
Skips = tuple[type[Exception], ...]


def change(
    database: Database,
    ids: Sequence[str],
    verb: ByHand,
    act: Act,
    is_whole: bool,
    skips: Skips,
) -> list[Job]:
    """Change jobs in one transaction, and note that in their history and in *act*; return the changed jobs.

    Arguments:
        is_whole: this is all of *act*, which is written here; otherwise `begin` has written it.
    """

    def write(again: bool) -> list[Job]:
        with database.write(durable=True) as connection:
            done = acts.done_by(connection, act, [key(job_id) for job_id in ids]) if again else set()
            changed = [job for job_id in ids if (job := _changed(database, connection, job_id, verb, skips, done))]
            if len(changed) > len(done):
                if is_whole:
                    act.changed = len(changed)
                    acts.begin(connection, act, is_whole=True)
                else:
                    acts.count(connection, act, len(changed))
                acts.note(connection, [key(job.id) for job in changed], act.verb, None, act)
        return changed

    return database.patiently(write)


def _changed(
    database: Database,
    connection: Connection,
    job_id: str,
    verb: ByHand,
    skips: Skips,
    done: set[str],
) -> Job | None:
    try:
        job = locked(connection, job_id)
        if key(job_id) in done:  # by the try whose answer was lost
            return job
        old = replace(job)
        verb(job)
    except skips:
        return None
    acts.note_end(connection, old)
    return write_row(database, connection, old, job)


def copy(database: Database, job_id: str, verb: ByHand, act: Act) -> Job:
    """Publish the copy that *verb* makes of a job, with another id; return it as it is then."""

    def write(again: bool) -> Job:
        with database.write(durable=True) as connection:
            job = locked(connection, job_id)
            verb(job)
            if not (again and acts.is_known(connection, act)):
                insert.publish(database, connection, [job])
                connection.execute(update_statement(jobs).where(jobs.c.id == key(job.id)).values(rerun_of=key(job_id)))
                acts.begin(connection, act, is_whole=True)
                acts.note(connection, [key(job_id)], act.verb, f"as {job.id}", act)
            new = fetch(connection, job.id)
            assert new is not None
            return new

    return database.patiently(write)


def remove(database: Database, ids: Sequence[str], verb: ByHand, act: Act, skips: Skips) -> list[Job]:
    """Delete jobs in one transaction, with their history; return those that were deleted, as they were."""

    def write(again: bool) -> list[Job]:
        gone = []
        with database.write(durable=True) as connection:
            for job_id in ids:
                try:
                    job = locked(connection, job_id)
                    verb(job)
                except skips:
                    continue
                gone.append(job)
            if gone:
                prune.delete_rows(connection, [key(job.id) for job in gone])
                acts.count(connection, act, len(gone))
        return gone

    return database.patiently(write)


def begin(database: Database, act: Act) -> None:
    """Write *act*, which changes jobs in several transactions."""

    def write(again: bool) -> None:
        with database.write(durable=True) as connection:
            if not (again and acts.is_known(connection, act)):
                acts.begin(connection, act)

    database.patiently(write)


def end(database: Database, act: Act) -> None:
    """Note that *act* has come to its end."""

    def write(again: bool) -> None:
        with database.write(durable=True) as connection:
            acts.end(connection, act)

    database.patiently(write)
