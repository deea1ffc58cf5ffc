"""Takes of limits for code that is no job: such as a web request that calls the same API."""

from __future__ import annotations

from itertools import count
from random import getrandbits
from typing import NamedTuple

from sqlalchemy import BigInteger, Connection, bindparam, delete

from kathikon_celery.job import Use
from kathikon_celery.storage import limits
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.tables import slots

_numbers = count(getrandbits(40))
_RELEASE = delete(slots).where(
    slots.c.key == bindparam("of_key", type_=slots.c.key.type), slots.c.seq == bindparam("of_seq", type_=BigInteger())
)


class Taken(NamedTuple):
    """What was taken of the limit *key*. *number*: the slot's, instead of a row's; `None`: a token alone."""

    key: str
    number: int | None


def take(database: Database, use: Use, node_id: int) -> Taken | float | None:
    """Take what *use* says; or return the seconds until there is room, `None` if no clock makes room.

    Arguments:
        node_id: the slot is in use until `release`, or until this node ends.
    """

    def write(again: bool) -> Taken | float | None:
        with database.once() as connection:
            while True:
                with database.dialect.atomic(connection):
                    if (known := limits.locked(connection, {use.key: use})) is not None:
                        return _take(database, connection, known[use.key], use, node_id)
                limits.enter(database, connection, {use.key: use})

    return database.patiently(write, patient=False)


def _take(database: Database, connection: Connection, key: limits.Room, use: Use, node_id: int) -> Taken | float | None:
    if not key.room(use.weight):
        moment = key.next_room(use.weight)
        return None if moment is None else max(0.0, (moment - key.now).total_seconds())
    key.take(use.weight)
    limits.charge(database, connection, key)
    if key.most is None:
        return Taken(use.key, None)
    number = -next(_numbers)
    slot = {"key": use.key, "seq": number, "fence": 0, "node_id": node_id, "weight": use.weight}
    limits.take_slots(connection, [slot])
    return Taken(use.key, number)


def release(database: Database, taken: Taken) -> None:
    """Give back the slot, for the jobs that wait for it."""
    if taken.number is None:
        return

    def write(again: bool) -> None:
        with database.once() as connection:
            connection.execute(_RELEASE, {"of_key": taken.key, "of_seq": taken.number})

    database.patiently(write)
    limits.offer(database, [taken.key])
