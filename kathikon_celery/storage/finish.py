"""What a worker reports of the jobs that it holds: started, done, given up, given back.

Each report names the fence of the claim. If the row has moved on, the report changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from sqlalchemy import Boolean, Connection, Text, and_, bindparam, case, false, null, or_, select, update

from kathikon_celery.job import HELD, State, sources
from kathikon_celery.storage.clock import now
from kathikon_celery.storage.dialects import Dialect
from kathikon_celery.storage.dialects.base import Pairs
from kathikon_celery.storage.engine import Database
from kathikon_celery.storage.names import printable
from kathikon_celery.storage.tables import jobs, state_in

#: The reason on the row of a job whose processes were lost once too often.
LOST_TOO_OFTEN = "the process that ran it was lost, as often as max_attempts allows"
LOST_AT_MOST_ONCE = "the worker was lost while the task ran, and acks_late=False forbids to run it again"

IS_HELD = state_in(HELD)


def may_become(state: State) -> Any:
    """The condition that the state machine allows a row to become *state*."""
    return state_in(sources(state))


@lru_cache(maxsize=8)
def _started(dialect: Dialect) -> Any:
    values = {"state": State.RUNNING.value, "started_at": now(), "acked": bindparam("acked_early", type_=Boolean())}
    return update(jobs).where(dialect.among_pairs(jobs), may_become(State.RUNNING)).values(values)


@lru_cache(maxsize=8)
def _completed(dialect: Dialect) -> Any:
    # A job that ended before its start was written started when it was claimed, as far as we know.
    values = {"state": State.COMPLETED.value, "ended_at": now(), "node_id": null()}
    return update(jobs).where(dialect.among_pairs(jobs), may_become(State.COMPLETED)).values(values)


_HELD = and_(jobs.c.seq == bindparam("pair_seq"), jobs.c.fence == bindparam("pair_fence"))
_ERRORS = select(jobs.c.errors, jobs.c.attempts).where(_HELD).with_for_update()


@lru_cache(maxsize=8)
def _ended(state: State) -> Any:
    values = {
        "state": state.value,
        "ended_at": now(),
        "node_id": null(),
        "reason": bindparam("why", type_=Text()),
        "traceback": bindparam("trace", type_=Text()),
        "errors": bindparam("all_errors", type_=Text()),
    }
    return update(jobs).where(_HELD, IS_HELD, may_become(state)).values(values)


def returned(crashed: Any) -> dict[str, Any]:
    """The changes that make a held row ready again; where *crashed* holds, a crash more is on its account."""
    crashes = jobs.c.crashes + case((crashed, 1), else_=0)
    lost = and_(crashed, or_(jobs.c.acked, crashes >= jobs.c.max_attempts))
    why = case((jobs.c.acked, LOST_AT_MOST_ONCE), else_=LOST_TOO_OFTEN)
    return {
        "state": case((lost, State.DEAD.value), else_=State.AVAILABLE.value),
        "ended_at": case((lost, now()), else_=null()),
        "reason": case((lost, why), else_=null()),
        "crashes": crashes,
        "node_id": null(),
        "acked": false(),
        "fence": jobs.c.fence + 1,
        "claimed_at": case((lost, jobs.c.claimed_at), else_=null()),
        "started_at": case((lost, jobs.c.started_at), else_=null()),
        **dict.fromkeys(("status", "result", "traceback", "meta"), null()),
    }


@lru_cache(maxsize=8)
def _returned(dialect: Dialect) -> Any:
    crashed = bindparam("has_crashed", type_=Boolean())
    return update(jobs).where(dialect.among_pairs(jobs), IS_HELD).values(returned(crashed))


def started(database: Database, connection: Connection, pairs: Pairs, acked: bool = False) -> int:
    """The pool has accepted the jobs. *acked*: their messages are acknowledged with it, they never run again."""
    return database.dialect.for_pairs(connection, _started(database.dialect), pairs, {"acked_early": acked})


def completed(database: Database, connection: Connection, pairs: Pairs) -> int:
    """The tasks have returned."""
    return database.dialect.for_pairs(connection, _completed(database.dialect), pairs, {})


def ended(connection: Connection, pair: tuple[int, int], state: State, reason: str, traceback: str | None) -> int:
    """The job is *state* (dead, cancelled or discarded), for that *reason*."""
    values: dict[str, Any] = {"pair_seq": pair[0], "pair_fence": pair[1]}
    row = connection.execute(_ERRORS, values).first()
    if row is None:
        return 0
    errors = row.errors
    if state is State.DEAD:
        errors = with_error(errors, row.attempts, reason)
    values |= {"why": printable(reason), "trace": printable(traceback), "all_errors": errors}
    return connection.execute(_ended(state), values).rowcount


def with_error(errors: str | None, attempt: int, reason: str) -> str:
    """The JSON of *errors* with one more."""
    at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    every = [*json.loads(errors or "[]"), {"at": at, "attempt": attempt, "reason": reason}]
    return json.dumps(sorted(every, key=lambda error: error["attempt"]))  # that of a quick retry may come first


def given_back(database: Database, connection: Connection, pairs: Pairs, crashed: bool = False) -> int:
    """The jobs are ready again for anybody. *crashed*: the process that ran them was lost."""
    return database.dialect.for_pairs(connection, _returned(database.dialect), pairs, {"has_crashed": crashed})


_WHERE_NOW = select(jobs.c.id, jobs.c.seq, jobs.c.fence, jobs.c.state).where(
    jobs.c.seq.in_(bindparam("seqs", expanding=True))
)


def moved_on(connection: Connection, pairs: Pairs) -> list[str]:
    """The ids of those jobs of *pairs* that were given to somebody else since they were claimed."""
    known = {row.seq: row for row in connection.execute(_WHERE_NOW, {"seqs": [seq for seq, _ in pairs]})}
    return [known[seq].id if seq in known else f"#{seq}" for seq, fence in pairs if _is_lost(known.get(seq), fence)]


def _is_lost(row: Any, fence: int) -> bool:
    return row is None or row.fence != fence


def held_by(connection: Connection, node_id: int) -> Iterable[tuple[int, int]]:
    """Number and fence of the rows that the node holds."""
    query = select(jobs.c.seq, jobs.c.fence).where(jobs.c.node_id == node_id)
    return [(row.seq, row.fence) for row in connection.execute(query)]
