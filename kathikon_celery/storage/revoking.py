"""Revoking: jobs that wait are cancelled, jobs that a worker holds do not run again.

A cancelled job is unreported: a worker's lifeline tells its errbacks, chains and chords.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, bindparam, not_, select

from kathikon_celery.job import TERMINAL, State
from kathikon_celery.storage import transitions
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.names import key
from kathikon_celery.storage.tables import jobs, state_in
from kathikon_celery.storage.transitions import IS_HELD, may_become

#: Jobs of one transaction, and rows that one query reads.
CHUNK = 500
_REVOKED = transitions.revoked(jobs.c.id.in_(bindparam("keys", expanding=True))).of()
#: Those that will be cancelled, for the events.
_WAITING = (
    select(jobs.c.id)
    .where(jobs.c.id.in_(bindparam("keys", expanding=True)), may_become(State.CANCELLED), not_(IS_HELD))
    .with_for_update()
)
_OPEN = (
    select(jobs.c.seq, jobs.c.id, jobs.c.envelope)
    .where(jobs.c.seq > bindparam("after"), not_(state_in(TERMINAL)), jobs.c.envelope.contains("stamped_headers"))
    .order_by(jobs.c.seq)
    .limit(CHUNK)
)


def revoke(database: Database, ids: Sequence[str]) -> int:
    """Revoke the jobs with these ids; return how many have not ended. An id without a row is passed over."""
    return _revoke(database, sorted({key(job_id) for job_id in ids}))


def _revoke(database: Database, keys: Sequence[str]) -> int:
    number = 0
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK]
        with database.write(durable=True) as connection:
            number += revoke_in(database, connection, chunk)
    return number


def revoke_in(database: Database, connection: Connection, keys: Sequence[str]) -> int:
    """Revoke the jobs with these keys as a part of a transaction; return how many have not ended."""
    waiting = list(connection.execute(_WAITING, {"keys": keys}).scalars()) if database.events else []
    number = connection.execute(_REVOKED, {"keys": keys}).rowcount
    database.events.changed(connection, ids=waiting)
    return number


def revoke_stamped(database: Database, headers: Mapping[str, Collection[str]]) -> int:
    """Revoke the open jobs that carry one of the stamps: header -> values; return their number. Reads all open jobs."""
    found: list[str] = []
    with database.read() as connection:
        for name, envelope in _stamped(connection):
            stamps = _stamps_of(envelope)
            if any(stamps.get(header, frozenset()) & frozenset(values) for header, values in headers.items()):
                found.append(name)
    return _revoke(database, found)


def _stamped(connection: Connection) -> Iterator[tuple[str, str]]:
    after = 0
    while rows := connection.execute(_OPEN, {"after": after}).all():
        yield from ((row.id, row.envelope) for row in rows)
        after = rows[-1].seq


def _stamps_of(envelope: str) -> dict[str, frozenset[str]]:
    """Return the stamps in *envelope* by header; none if the envelope cannot be read."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        headers: dict[str, Any] = json.loads(envelope)["headers"]
        stamps = headers.get("stamps") or {}
        return {name: frozenset([value] if isinstance(value, str) else value) for name, value in stamps.items()}
    return {}
