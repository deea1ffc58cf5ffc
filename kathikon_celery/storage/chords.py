"""Chords: one row for each part, so that the transaction that ends the last part knows it, and may send the body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Boolean,
    Connection,
    Integer,
    Text,
    bindparam,
    case,
    delete,
    false,
    func,
    insert,
    not_,
    or_,
    select,
    true,
    update,
)

from kathikon_celery.job import TERMINAL
from kathikon_celery.storage.clock import now, seconds
from kathikon_celery.storage.dialects.parameters import Change, NewRow, Upsert
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key, printable
from kathikon_celery.storage.tables import chord_parts, chords, jobs, state_in

#: Parts in one INSERT.
CHUNK = 1000


@dataclass(frozen=True, kw_only=True)
class Part:
    """How one part of a chord has ended. *result* as the backend encoded it."""

    chord: str
    task_id: str
    position: int | None
    succeeded: bool
    result: str


@dataclass(frozen=True)
class Header:
    """A chord all of whose parts have ended: its parts in the order of the header, and how they were nested."""

    chord: str
    parts: list[Part]
    structure: str | None


def open(database: Database, chord: str, parts: Sequence[tuple[str, int]], structure: str | None) -> None:  # noqa: A001
    """Insert a chord that is about to be sent, with (id, position) of its parts; replaces a chord of the same id."""
    name = key(chord)
    rows = [
        {"chord": name, "task_id": key(task_id), "label": task_id, "position": position, "ended": False}
        for task_id, position in parts
    ]

    def write(again: bool) -> None:
        with database.write() as connection:
            _close(connection, name)
            values = {"id": name, "ended": 0, "added": 0, "structure": structure, "inserted_at": now()}
            connection.execute(insert(chords).values(values))
            for start in range(0, len(rows), CHUNK):
                connection.execute(insert(chord_parts), rows[start : start + CHUNK])

    database.patiently(write)


_SIZE = bindparam("new_size", type_=Integer())
_SIZED = Upsert(
    chords,
    (chords.c.id,),
    {"id": bindparam("chord"), "size": _SIZE, "ended": 0, "added": 0, "inserted_at": now()},
    # Celery below 5.7 sets the size again, of a group alone, when a chain of the header reaches its last group.
    lambda new: {"size": case((func.coalesce(chords.c.size, 0) < new["size"], new["size"]), else_=chords.c.size)},
)


def set_size(database: Database, chord: str, size: int) -> None:
    """Set the number of parts, before the last one is sent."""

    def write(again: bool) -> None:
        with database.once() as connection:
            database.dialect.upsert(connection, _SIZED, {"chord": key(chord), "new_size": size})

    database.patiently(write)


_NEW_PART = Upsert(
    chord_parts,
    (chord_parts.c.chord, chord_parts.c.task_id),
    {
        "chord": bindparam("of_chord"),
        "task_id": bindparam("task"),
        "label": bindparam("name", type_=Text()),
        "ended": false(),
    },
)


def add_part(database: Database, chord: str, task_id: str) -> None:
    """Raise the number of parts by one, for the task *task_id*; a part that is added twice counts once."""
    name = key(chord)

    def write(again: bool) -> None:
        with database.write() as connection:
            if connection.execute(_LOCKED, {"chord": name}).first() is None:
                return
            values = {"of_chord": name, "task": key(task_id), "name": task_id}
            if database.dialect.upsert(connection, _NEW_PART, values):
                connection.execute(update(chords).where(chords.c.id == name).values(added=chords.c.added + 1))

    database.patiently(write)


_LOCKED = select(chords.c.id, chords.c.failed).where(chords.c.id == bindparam("chord")).with_for_update()
_COUNTED = Change(chords, {"ended": chords.c.ended + 1}, (chords.c.id == bindparam("chord"),))
#: After the body has failed with a part, the chord is complete again only when every part has succeeded.
_NOT_SUCCEEDED = (
    select(chord_parts.c.task_id)
    .where(chord_parts.c.chord == bindparam("chord"))
    .where(or_(not_(chord_parts.c.ended), chord_parts.c.succeeded.is_not(True)))
    .limit(1)
)
#: The size may become known only when more parts than that have ended: those that a failure has counted.
_IS_LAST = ((chords.c.ended >= chords.c.size + chords.c.added).label("is_last"),)


def _changes(new: NewRow) -> dict[str, Any]:
    # Celery 5.5 gives the members of a group that replaces a part the position of that part.
    position = func.coalesce(chord_parts.c.position, new["position"])
    return {"position": position, **{name: new[name] for name in ("ended", "succeeded", "result")}}


_ENDED = Upsert(
    chord_parts,
    (chord_parts.c.chord, chord_parts.c.task_id),
    {
        "chord": bindparam("of_chord"),
        "task_id": bindparam("task"),
        "label": bindparam("name", type_=Text()),
        "position": bindparam("at", type_=Integer()),
        "ended": true(),
        "succeeded": bindparam("well", type_=Boolean()),
        "result": bindparam("text", type_=Text()),
    },
    _changes,
    lambda new: chord_parts.c.ended == false(),
)
#: A part that had failed was retried, or follows one that was, and succeeds after all. It was counted when it failed.
_MENDED = (
    update(chord_parts)
    .where(chord_parts.c.chord == bindparam("of_chord"), chord_parts.c.task_id == bindparam("task"))
    .where(chord_parts.c.ended, chord_parts.c.succeeded.is_not(True))
    .values(succeeded=true(), result=bindparam("text", type_=Text()))
)


def count(database: Database, connection: Connection, part: Part) -> bool:
    """Note that a part has ended; return true when the chord is complete by that. A part that ends twice counts once.

    A chord whose body has failed is complete when all of its parts have succeeded after all.
    """
    chord = key(part.chord)
    row = connection.execute(_LOCKED, {"chord": chord}).first()
    if row is None:
        return False  # its body was sent
    values = {
        "of_chord": chord,
        "task": key(part.task_id),
        "name": part.task_id,
        "at": part.position,
        "well": part.succeeded,
        "text": printable(part.result),
    }
    if database.dialect.upsert(connection, _ENDED, values):
        counted = database.dialect.change_and_read(connection, _COUNTED, _IS_LAST, {"chord": chord})
        if counted is None or not counted[0]:
            return False
    elif not (part.succeeded and _is_mended(connection, values) and row.failed):
        return False
    return not row.failed or connection.execute(_NOT_SUCCEEDED, {"chord": chord}).first() is None


def _is_mended(connection: Connection, values: dict[str, Any]) -> bool:
    named = {name: values[name] for name in ("of_chord", "task", "text")}
    return connection.execute(_MENDED, named).rowcount > 0


_PARTS = (
    select(chord_parts.c.label, chord_parts.c.position, chord_parts.c.succeeded, chord_parts.c.result)
    .where(chord_parts.c.chord == bindparam("chord"), chord_parts.c.ended)
    .order_by(chord_parts.c.position, chord_parts.c.task_id)
)
_STRUCTURE = select(chords.c.structure).where(chords.c.id == bindparam("chord"))


def header(connection: Connection, chord: str) -> Header:
    """Return the complete chord."""
    values = {"chord": key(chord)}
    parts = [
        Part(chord=chord, task_id=label, position=position, succeeded=succeeded, result=result)
        for label, position, succeeded, result in connection.execute(_PARTS, values)
    ]
    return Header(chord, parts, connection.execute(_STRUCTURE, values).scalar())


def close(connection: Connection, chord: str) -> None:
    """Delete a chord whose body is sent."""
    _close(connection, key(chord))


def fail(connection: Connection, chord: str) -> None:
    """Note that a chord's body has failed with a part. Its rows stay until `prune` deletes them: see `reopen`."""
    connection.execute(update(chords).where(chords.c.id == key(chord)).values(failed=true()))


_REOPENED = (
    update(chord_parts)
    .where(chord_parts.c.chord == bindparam("of_chord"), chord_parts.c.task_id == bindparam("task"))
    .where(chord_parts.c.ended, chord_parts.c.succeeded.is_not(True))
    .values(ended=false())
)


def reopen(connection: Connection, chord: str | None, task_id: str) -> None:
    """Count the part *task_id*, which had failed and runs again, as one that has not ended."""
    if chord is None or connection.execute(_LOCKED, {"chord": key(chord)}).first() is None:
        return
    if connection.execute(_REOPENED, {"of_chord": key(chord), "task": key(task_id)}).rowcount:
        connection.execute(update(chords).where(chords.c.id == key(chord)).values(ended=chords.c.ended - 1))


def _close(connection: Connection, name: str) -> None:
    connection.execute(delete(chord_parts).where(chord_parts.c.chord == name))
    connection.execute(delete(chords).where(chords.c.id == name))


# A value, no EXISTS: of that a planner may make a join with all jobs.
_ALIVE = select(jobs.c.seq).where(jobs.c.group_id == chords.c.id, not_(state_in(TERMINAL))).limit(1).scalar_subquery()
_OLD = (
    select(chords.c.id)
    .where(chords.c.inserted_at < now(seconds("minus_age")), _ALIVE.is_(None))
    .limit(CHUNK)
    .with_for_update(skip_locked=True)
)


def prune(database: Database, age: float) -> int:
    """Delete up to `CHUNK` chords older than *age* seconds without a waiting or running part; return their number.

    They will never be complete: their sender was killed before it had sent all parts, or parts were deleted.
    """
    with database.write() as connection:
        names = connection.execute(_OLD, {"minus_age": -age}).scalars().all()
        for name in names:
            _close(connection, name)
    return len(names)
