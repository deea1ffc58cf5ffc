"""Reading jobs, without changing them."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Select,
    Text,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    type_coerce,
    union,
)
from sqlalchemy.types import NullType

from kathikon_celery.job import Cause, Job, State, in_brief
from kathikon_celery.storage import limits
from kathikon_celery.storage.clock import Instant, now
from kathikon_celery.storage.names import key
from kathikon_celery.storage.tables import DUE, UNIQUE, jobs, ready_in

_BY_ID = select(jobs).where(jobs.c.id == bindparam("job_id"))
_LOCKED = _BY_ID.with_for_update()
_COUNTS = select(jobs.c.queue, jobs.c.state, func.count()).group_by(jobs.c.queue, jobs.c.state)
_ENVELOPE = select(jobs.c.envelope).where(jobs.c.queue == bindparam("of_queue")).limit(1)
_FAILURE = {"attempt", "reason"}
_OF_PUBLICATIONS = ("line", *(f"{name}_key" for name in UNIQUE))
_CAUSES = frozenset(cause.value for cause in Cause)
#: The columns without conversion.
_RAW = [type_coerce(column, NullType()).label(column.name) for column in jobs.c]


def jobs_of(connection: Connection, query: Select[Any], values: dict[str, Any] | None = None) -> list[Job]:
    """Return the jobs that *query* selects. A corrupt one is dead in this list, and its reason says what is wrong."""
    try:
        return [_job_of(row._mapping) for row in connection.execute(query, values or {})]
    except (ValueError, TypeError, AttributeError):  # the error does not say in which row
        rows = connection.execute(query.with_only_columns(*_RAW), values or {}).all()
        return [_as_far_as_legible(row._mapping) for row in rows]


def _job_of(row: Any) -> Job:
    """Return the job of *row*. Raises `ValueError`, `TypeError` or `AttributeError` for a corrupt one."""
    values = dict(row)
    values.pop("publication", None)  # a job that is inserted after it was read is another publication
    for name in _OF_PUBLICATIONS:
        values.pop(name, None)
    values["limits"] = limits.read(values.get("limits"))
    values["state"] = State(values["state"])
    values["cause"] = cause_of(values.get("cause"))
    values["errors"] = errors_of(values["errors"])
    if values["id"].startswith("#"):  # a digest stands for it: see names.py
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            values["id"] = json.loads(values["envelope"])["headers"]["id"]
    if values["queue"] is not None and values["queue"].startswith("#"):
        values["queue"] = queue_of(values["queue"], values["envelope"])
    return Job(**values)


def cause_of(value: object) -> Cause | None:
    """Return a row's cause; `None` also for one that only a newer version knows."""
    return Cause(value) if value in _CAUSES else None


def errors_of(text: str | None, with_fence: bool = False) -> list[dict[str, Any]]:
    """Return the failures in a row's ``errors``. Raises `ValueError` for a text that is no list of them.

    *with_fence*: also the fence of the claim of each run, which tells a repeated report from another failure.
    """
    errors = json.loads(text) if text else []
    if not isinstance(errors, list) or not all(isinstance(one, dict) and one.keys() >= _FAILURE for one in errors):
        raise ValueError("no list of failures")
    return errors if with_fence else [{name: one[name] for name in one if name != "fence"} for one in errors]


def queue_of(name_key: str, envelope: Any) -> str:
    """Return the name of the queue with the key *name_key* if a job's *envelope* has it, else the key."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        name = json.loads(envelope)["queue"]
        if key(name) == name_key:
            return str(name)
    return name_key


def _as_far_as_legible(row: Any) -> Job:
    values, wrong = dict(row), []
    for column in jobs.c:
        value = values[column.name]
        try:
            values[column.name] = _converted(column, value)
        except (ValueError, TypeError, AttributeError):
            wrong.append(f"{column.name} is {in_brief(repr(value))}")
            del values[column.name]
    if wrong:
        said = [values["reason"]] if values.get("reason") else []
        values |= {
            "state": State.DEAD,
            "cause": Cause.UNREADABLE.value,
            "reason": "; ".join([f"corrupt row: {', '.join(wrong)}", *said]),
        }
    errors = values.pop("errors", [])
    job = _job_of({"id": "", "queue": None, "envelope": "{}", **values, "errors": None})
    job.errors = errors
    return job


def _converted(column: Column[Any], value: Any) -> Any:
    """Return a stored *value* in the type of *column*. Raises `ValueError` or `TypeError` when it does not fit."""
    if column.name == "state":
        return State(value)
    if column.name == "errors":
        return errors_of(value)
    if column.name == "limits":
        limits.read(value)
    if value is None:
        return None
    if isinstance(column.type, Instant):
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    if isinstance(column.type, Boolean):
        return bool(value)
    if not isinstance(value, column.type.python_type):
        raise TypeError(value)
    return value


def fetch(connection: Connection, job_id: str, lock: bool = False) -> Job | None:
    """Return the job with that id, or `None`. *lock*: lock its row until the transaction ends."""
    found = jobs_of(connection, _LOCKED if lock else _BY_ID, {"job_id": key(job_id)})
    if not found:
        return None
    (job,) = found
    if key(job_id) != job_id:
        job.id = job_id
    return job


def select_all(connection: Connection, queue: str | None = None, state: State | None = None) -> list[Job]:
    """Return all jobs, oldest first, or those of a *queue* or in a *state*."""
    query = select(jobs).order_by(jobs.c.seq)
    if queue is not None:
        query = query.where(jobs.c.queue == key(queue))
    if state is not None:
        query = query.where(jobs.c.state == state.value)
    return jobs_of(connection, query)


_SCHEDULED = (
    select(jobs)
    .where(DUE, jobs.c.queue.in_(bindparam("queues", expanding=True)), jobs.c.scheduled_at > now())
    .order_by(jobs.c.available_at)
    .limit(bindparam("most"))
)


def scheduled(connection: Connection, queues: list[str], limit: int) -> list[Job]:
    """Return up to *limit* jobs of *queues* that wait for their due time, those that are due first."""
    return jobs_of(connection, _SCHEDULED, {"queues": [key(queue) for queue in queues], "most": limit})


def _workflow() -> Select[Any]:
    given = bindparam("of", type_=Text())
    root = func.coalesce(jobs.c.root_id, jobs.c.id).label("root")  # NULL in the root itself
    of_job, of_group = (select(root).where(column == given) for column in (jobs.c.id, jobs.c.group_id))
    roots = union(select(given.label("root")), of_job, of_group).cte("roots")
    # A union: with OR, no planner searches two indexes for a list that is a query.
    columns = (jobs.c.id, jobs.c.root_id)
    members = union(*(select(jobs.c.seq).where(column.in_(select(roots.c.root))) for column in columns))
    return select(jobs).where(jobs.c.seq.in_(members)).order_by(jobs.c.seq)


_WORKFLOW = _workflow()


def workflow(connection: Connection, job_id: str) -> list[Job]:
    """Return the jobs that have the same root as the job, or as a job of the group, with that id; oldest first."""
    return jobs_of(connection, _WORKFLOW, {"of": key(job_id)})


def is_any_waiting(connection: Connection, queue: str) -> bool:
    """Whether a job of the queue is ready, or waits until it is due."""
    of_queue = literal(key(queue), jobs.c.queue.type)
    conditions = (ready_in(of_queue), and_(DUE, jobs.c.queue == of_queue))
    return any(connection.execute(select(jobs.c.seq).where(one).limit(1)).first() for one in conditions)


def counts(connection: Connection) -> dict[tuple[str, str], int]:
    """Return the number of jobs by (queue, state); mere results have an empty queue."""
    found = {(queue or "", state): number for queue, state, number in connection.execute(_COUNTS)}
    names = {queue: queue for queue, _ in found}
    for queue in names:
        if str(queue).startswith("#"):
            names[queue] = queue_of(queue, connection.execute(_ENVELOPE, {"of_queue": queue}).scalar())
    return {(names[queue], state): number for (queue, state), number in found.items()}


def present(connection: Connection) -> datetime:
    """Return the database's present."""
    moment: datetime = connection.execute(select(now())).scalar_one()
    return moment


#: How many jobs are counted at most.
_MOST_BEFORE = 10_000


def ready_before(connection: Connection, job: Job) -> int:
    """Return how many ready jobs of its queue are claimed before *job*, at most 10,000."""
    place = (jobs.c.available_at, job.available_at), (jobs.c.seq, job.seq)
    (at, its_at), (seq, its_seq) = place
    earlier = or_(at < its_at, and_(at == its_at, seq < its_seq))
    is_before = or_(jobs.c.priority > job.priority, and_(jobs.c.priority == job.priority, earlier))
    in_queue = select(jobs.c.seq).where(ready_in(literal(key(job.queue or ""), jobs.c.queue.type)), is_before)
    return int(
        connection.execute(select(func.count()).select_from(in_queue.limit(_MOST_BEFORE).subquery())).scalar_one()
    )
