"""Updating: writes a changed job back to its row, if the state machine allows the change."""

from __future__ import annotations

import json
from dataclasses import fields

from sqlalchemy import Connection
from sqlalchemy import update as update_statement

from kathikon_celery.job import TERMINAL, WAITING, Job, State, check_transition
from kathikon_celery.storage import chords, insert, transitions
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.errors import MovedOn, NotFound
from kathikon_celery.storage.names import key
from kathikon_celery.storage.reading import fetch
from kathikon_celery.storage.tables import UNIQUE, jobs

_KEPT = {
    "seq",
    "id",
    "fence",
    "state",
    "publication",
    "rerun_of",
    "limits",
    "line",
    "gate",
    *(f"{name}_key" for name in UNIQUE),
}
_COLUMNS = [column for column in jobs.c if column.name not in _KEPT]
_NAMES = ("queue", "root_id", "parent_id", "group_id")


def update(database: Database, job: Job) -> None:
    """Write every field of *job* to its row, then update *job* from the row: a new state changes more columns.

    Raises `TransitionError` if the row's state may not change to the job's, `MovedOn` if the row was claimed, given
    back or published since *job* was read, `NotFound` if there is no row.
    """

    def write(again: bool) -> None:
        with database.write(durable=True) as connection:
            old = locked(connection, job.id)
            if old.fence != job.fence and not (again and old.state is job.state):
                raise MovedOn(
                    f"job {job.id!r} has moved on: it was read under fence {job.fence} and has {old.fence} now;"
                    " fetch it again"
                )
            new = write_row(database, connection, old, job)
        for field in fields(Job):
            setattr(job, field.name, getattr(new, field.name))

    database.patiently(write)


def locked(connection: Connection, job_id: str) -> Job:
    """Return the job, and lock its row until the transaction ends. Raises `NotFound`."""
    job = fetch(connection, job_id, lock=True)
    if job is None:
        raise NotFound(f"there is no job {job_id!r}")
    return job


def write_row(database: Database, connection: Connection, old: Job, job: Job) -> Job:
    """Write *job*, which was the row *old*; return the job as it is then."""
    values = {column.name: getattr(job, column.name) for column in _COLUMNS}
    values = {name: value for name, value in values.items() if value is not None or jobs.c[name].nullable}
    values |= {name: key(values[name]) for name in _NAMES if values[name]}
    values |= {
        "envelope": insert.envelope_of(job),
        "errors": json.dumps(job.errors) if job.errors else None,
    }
    if old.state is not job.state:
        check_transition(job.id, old.state, job.state)
        values |= transitions.put_back(job, old.state)
        if old.state in TERMINAL and job.state not in TERMINAL:
            chords.reopen(connection, old.group_id, old.id)
    connection.execute(update_statement(jobs).where(jobs.c.seq == old.seq).values(values))
    if job.state is State.AVAILABLE:
        database.dialect.wake(connection, [values["queue"]], 1)
    elif job.state in WAITING:
        database.dialect.ring(connection)
    if old.state is not job.state:
        database.events.changed(connection, seqs=[old.seq])
    new = fetch(connection, job.id)
    assert new is not None
    return new
