"""The tables. ``migrations/`` makes them; a test compares the two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    Text,
    TextClause,
    UniqueConstraint,
    and_,
    bindparam,
    case,
    desc,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ColumnElement, FunctionElement

from kathikon_celery.job import Hold, State
from kathikon_celery.storage.clock import Instant
from kathikon_celery.storage.column_types import Long, Name, Serial

metadata = MetaData()

jobs = Table(
    "kathikon_jobs",
    metadata,
    Column("seq", Serial, primary_key=True),
    Column("id", Name, nullable=False),
    Column("queue", Name),
    Column("task", Long, nullable=False),
    Column("state", String(20), nullable=False),
    Column("priority", BigInteger, nullable=False),
    Column("publication", BigInteger, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("acked", Boolean(create_constraint=False), nullable=False),
    Column("node_id", BigInteger),
    Column("root_id", Name),
    Column("parent_id", Name),
    Column("group_id", Name),
    Column("inserted_at", Instant, nullable=False),
    Column("scheduled_at", Instant),
    Column("available_at", Instant, nullable=False),
    Column("expires_at", Instant),
    Column("claimed_at", Instant),
    Column("started_at", Instant),
    Column("ended_at", Instant),
    Column("envelope", Long, nullable=False),
    Column("body", Long, nullable=False),
    Column("status", Long),
    Column("result", Long),
    Column("traceback", Long),
    Column("meta", Long),
    Column("reason", Long),
    Column("errors", Long),
    Column("cause", String(20)),
    #: The job of which this one is a copy: see `Kathikon.rerun`.
    Column("rerun_of", Name),
    #: When the job was revoked while a worker held it: then it does not run again.
    Column("revoked_at", Instant),
    #: `job.Use` of each limit, as JSON; the key of the first one; and of the one in whose line the job waits.
    Column("limits", Long),
    Column("line", Name),
    Column("gate", Name),
    #: The job's `job.UniqueKey.key`, in the column that says how long it has the key.
    Column("waiting_key", Name),
    Column("active_key", Name),
    Column("kept_key", Name),
    UniqueConstraint("id", name="kathikon_jobs_id"),
)

# Each index has only the rows that its readers want, so that ended jobs cost a claim nothing. A query repeats the
# index's condition as literal SQL: no planner can match a parameter with an index's condition.
READY = text("state = 'available'")
DUE = text("state IN ('scheduled', 'retryable')")
PENDING = text("state IN ('scheduled', 'retryable', 'available')")
HELD = text("node_id IS NOT NULL")
ENDED = text("ended_at IS NOT NULL")
UNREPORTED = text("state IN ('dead', 'cancelled', 'discarded') AND status IS NULL")
EXPIRING = text("expires_at IS NOT NULL AND state IN ('scheduled', 'retryable', 'available')")
FREE = text("node_id IS NULL")
BLOCKED = text("state = 'blocked'")
EXPIRING_BLOCKED = text("expires_at IS NOT NULL AND state = 'blocked'")
#: Was let out of the line of its first limit, and has not started.
OFFERED = text("line IS NOT NULL AND (state = 'available' OR (state = 'blocked' AND gate <> line))")
#: Was let out of the line of another limit than its first.
OFFERED_LATER = text("gate <> line AND state = 'available'")

Index(
    "kathikon_jobs_ready",
    jobs.c.queue,
    desc(jobs.c.priority),
    jobs.c.available_at,
    jobs.c.seq,
    postgresql_where=READY,
    sqlite_where=READY,
)
Index("kathikon_jobs_due", jobs.c.available_at, postgresql_where=DUE, sqlite_where=DUE)
Index("kathikon_jobs_held", jobs.c.node_id, postgresql_where=HELD, sqlite_where=HELD)
Index("kathikon_jobs_ended", jobs.c.state, jobs.c.ended_at, postgresql_where=ENDED, sqlite_where=ENDED)
Index("kathikon_jobs_expiring", jobs.c.expires_at, postgresql_where=EXPIRING, sqlite_where=EXPIRING)
Index("kathikon_jobs_untold", jobs.c.ended_at, postgresql_where=UNREPORTED, sqlite_where=UNREPORTED)
OF_A_ROOT = text("root_id IS NOT NULL")
Index("kathikon_jobs_root", jobs.c.root_id, postgresql_where=OF_A_ROOT, sqlite_where=OF_A_ROOT)
OF_A_GROUP = text("group_id IS NOT NULL")
Index("kathikon_jobs_group", jobs.c.group_id, postgresql_where=OF_A_GROUP, sqlite_where=OF_A_GROUP)


def values_of(column: Column[Any], condition: ColumnElement[bool] | TextClause) -> Select[Any]:
    """SELECT, as ``value``, each value of *column* in the rows of *condition*: from one to the next in their index.

    A plain DISTINCT reads all of the rows, or the whole table if the planner has old statistics.
    """
    found = select(func.min(column).label("value")).where(condition).cte(f"{column.table.name}_values", recursive=True)
    following = select(func.min(column)).where(condition, column > found.c.value).scalar_subquery()
    found = found.union_all(select(following).where(found.c.value.is_not(None)))
    return select(found.c.value).where(found.c.value.is_not(None))


Index(
    "kathikon_jobs_blocked",
    jobs.c.gate,
    jobs.c.queue,
    desc(jobs.c.priority),
    jobs.c.available_at,
    jobs.c.seq,
    postgresql_where=BLOCKED,
    sqlite_where=BLOCKED,
)
Index(
    "kathikon_jobs_offered",
    jobs.c.line,
    jobs.c.queue,
    jobs.c.available_at,
    postgresql_where=OFFERED,
    sqlite_where=OFFERED,
)
Index(
    "kathikon_jobs_offered_later",
    jobs.c.gate,
    jobs.c.queue,
    jobs.c.available_at,
    postgresql_where=OFFERED_LATER,
    sqlite_where=OFFERED_LATER,
)
Index(
    "kathikon_jobs_expiring_blocked",
    jobs.c.expires_at,
    postgresql_where=EXPIRING_BLOCKED,
    sqlite_where=EXPIRING_BLOCKED,
)


#: How long a job has a unique key -> the condition of the index that keeps out others.
UNIQUE = {
    "waiting": text("waiting_key IS NOT NULL AND state IN ('scheduled', 'retryable', 'available', 'blocked')"),
    "active": text("active_key IS NOT NULL AND ended_at IS NULL"),
    "kept": text("kept_key IS NOT NULL"),
}
for _name, _condition in UNIQUE.items():
    Index(
        f"kathikon_jobs_unique_{_name}",
        jobs.c[f"{_name}_key"],
        unique=True,
        postgresql_where=_condition,
        sqlite_where=_condition,
    )


class ready_in(FunctionElement[bool]):  # noqa: N801 (reads as the SQL function that it might be)
    """The condition that a job is ready in a queue, as ``kathikon_jobs_ready`` is searched; only for an AND.

    A dialect whose database has no partial indexes registers another expression, such as a column that is NULL unless
    the job is ready.
    """

    inherit_cache = True
    name = "ready_in"

    def __init__(self, queue: ColumnElement[Any]) -> None:
        super().__init__(jobs.c.queue, queue)


class due_at(FunctionElement[Any]):  # noqa: N801
    """The moment at which a waiting job is due, as ``kathikon_jobs_due`` is searched and sorted, together with `DUE`.

    A dialect whose database has no partial indexes registers another column.
    """

    inherit_cache = True
    name = "due_at"

    def __init__(self) -> None:
        super().__init__(jobs.c.available_at)


@compiles(ready_in)
def _(element: ready_in, compiler: Any, **options: Any) -> str:
    column, queue = element.clauses
    return f"{compiler.process(column == queue, **options)} AND {READY.text}"


@compiles(due_at)
def _(element: due_at, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


#: Highest value of an `Integer` column.
HIGHEST = 2**31 - 1


def one_more(column: ColumnElement[int]) -> ColumnElement[int]:
    """Return *column* plus one, or its value if that is the highest: one such row must not stop a whole statement."""
    return case((column < HIGHEST, column + 1), else_=column)


def next_fence(table: Table) -> ColumnElement[int]:
    """Return the fence of a row of *table* after its next claim, return or publication."""
    return case((table.c.fence.between(0, HIGHEST - 1), table.c.fence + 1), else_=1)


class first_fence(FunctionElement[int]):  # noqa: N801
    """The fence of a new row, random: the row may reuse the ``seq`` of a deleted one, whose claims must not fit.

    Each dialect registers its expression for a random number from 0 to 2**30.
    """

    type = Integer()
    inherit_cache = True
    name = "first_fence"


class fits(FunctionElement[bool]):  # noqa: N801 (reads as the SQL function that it might be)
    """The condition that a text fits a pattern: ``*`` stands for any characters, ``?`` for one, the rest for itself.

    Each dialect registers its expression.
    """

    type = Boolean()
    inherit_cache = True
    name = "fits"


def state_in(states: Iterable[State]) -> ColumnElement[bool]:
    """Return the condition that a job is in one of *states*, as literal SQL."""
    return jobs.c.state.in_([literal_column(f"'{state.value}'") for state in sorted(states)])


#: The columns of a result, without those of the job's message, which may be large.
OUTCOME = tuple(
    jobs.c[name] for name in ("id", "state", "status", "result", "traceback", "meta", "reason", "ended_at", "cause")
)


def held_as(table: Table, owned: bool = True) -> ColumnElement[bool]:
    """Return the condition that a row of *table* is held under the claim of `of_hold`; *owned*: by its node."""
    by_number = [table.c[name] == bindparam(f"hold_{name}") for name in ("seq", "fence")]
    # A sum, so that no planner uses the index of node_id: seq alone finds the row.
    return and_(*by_number, table.c.node_id + 0 == bindparam("hold_node_id")) if owned else and_(*by_number)


def of_hold(hold: Hold) -> dict[str, Any]:
    """Return the parameters of `held_as`."""
    return {"hold_seq": hold.seq, "hold_fence": hold.fence, "hold_node_id": hold.node_id}


messages = Table(
    "kathikon_messages",
    metadata,
    Column("seq", Serial, primary_key=True),
    Column("queue", Name, nullable=False),
    Column("priority", BigInteger, nullable=False),
    Column("available_at", Instant, nullable=False),
    Column("expires_at", Instant),
    Column("node_id", BigInteger),
    Column("fence", Integer, nullable=False),
    Column("envelope", Long, nullable=False),
    Column("body", Long, nullable=False),
    sqlite_autoincrement=True,
)
Index(
    "kathikon_messages_ready",
    messages.c.queue,
    desc(messages.c.priority),
    messages.c.seq,
    postgresql_where=FREE,
    sqlite_where=FREE,
)
Index("kathikon_messages_held", messages.c.node_id, postgresql_where=HELD, sqlite_where=HELD)
Index("kathikon_messages_expires", messages.c.expires_at)

queues = Table(
    "kathikon_queues",
    metadata,
    Column("name", Name, primary_key=True),
    Column("label", Long, nullable=False),
    Column("durable", Boolean(create_constraint=False), nullable=False),
    Column("auto_delete", Boolean(create_constraint=False), nullable=False),
    Column("expires", Double),
    Column("message_ttl", Double),
    Column("node_id", BigInteger),
    Column("used_at", Instant, nullable=False),
)

exchanges = Table(
    "kathikon_exchanges",
    metadata,
    Column("name", Name, primary_key=True),
    Column("label", Long, nullable=False),
    Column("type", String(20), nullable=False),
)

bindings = Table(
    "kathikon_bindings",
    metadata,
    Column("exchange", Name, primary_key=True),
    Column("queue", Name, primary_key=True),
    Column("routing_key", Name, primary_key=True),
    Column("label", Long, nullable=False),
)
Index("kathikon_bindings_queue", bindings.c.queue)

nodes = Table(
    "kathikon_nodes",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("name", Long, nullable=False),
    Column("machine", Long, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("pid_started", Double, nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("lease_until", Instant, nullable=False),
    #: The queues that an idle node waits for; NULL while it is busy (PostgreSQL wakes by it).
    Column("waiting", Text().with_variant(postgresql.ARRAY(postgresql.TEXT(collation="C")), "postgresql")),
    #: The queues whose jobs the node runs, a list in JSON; NULL: not known (yet).
    Column("consumes", Text()),
    sqlite_autoincrement=True,
)

#: Which process waits for the result of which job (PostgreSQL: the job's end is a NOTIFY to that listener).
waits = Table(
    "kathikon_waits",
    metadata,
    Column("seq", Serial, primary_key=True),
    Column("job", Name, nullable=False),
    Column("listener", BigInteger, nullable=False),
    Column("entered_at", Instant, nullable=False),
)
Index("kathikon_waits_job", waits.c.job)

groups = Table(
    "kathikon_groups",
    metadata,
    Column("id", Name, primary_key=True),
    Column("result", Long, nullable=False),
    Column("inserted_at", Instant, nullable=False),
)
Index("kathikon_groups_inserted", groups.c.inserted_at)

chords = Table(
    "kathikon_chords",
    metadata,
    Column("id", Name, primary_key=True),
    #: Number of its parts, NULL until all but the last are sent; `added`: how many its parts have added since.
    Column("size", Integer),
    Column("added", Integer, nullable=False),
    Column("ended", Integer, nullable=False),
    Column("structure", Long),
    Column("inserted_at", Instant, nullable=False),
    #: Whether its body has failed with a part; then its rows stay, in case that part is retried.
    Column("failed", Boolean(create_constraint=False)),
)
Index("kathikon_chords_inserted", chords.c.inserted_at)

chord_parts = Table(
    "kathikon_chord_parts",
    metadata,
    Column("chord", Name, primary_key=True),
    Column("task_id", Name, primary_key=True),
    Column("label", Long, nullable=False),
    Column("position", Integer),
    Column("ended", Boolean(create_constraint=False), nullable=False),
    Column("succeeded", Boolean(create_constraint=False)),
    Column("result", Long),
)

#: What no worker starts. *kind*: "queue", "task" (a name or pattern) or "all".
pauses = Table(
    "kathikon_pauses",
    metadata,
    Column("kind", String(10), primary_key=True),
    Column("name", Name, primary_key=True),
    Column("label", Long, nullable=False),
    Column("since", Instant, nullable=False),
    Column("until", Instant),
    Column("operator", Long, nullable=False),
    Column("reason", Long),
)

#: What operators did, a row for each call of a verb.
acts = Table(
    "kathikon_acts",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("verb", String(20), nullable=False),
    #: The job's id, the selection as JSON, or what was paused.
    Column("target", Long, nullable=False),
    Column("operator", Long, nullable=False),
    Column("reason", Long),
    Column("began_at", Instant, nullable=False),
    #: NULL: the act goes on, or was interrupted.
    Column("ended_at", Instant),
    #: How many jobs there were to change, counted at the beginning, and how many were changed so far.
    Column("chosen", Integer),
    Column("changed", Integer, nullable=False),
)
Index("kathikon_acts_began", acts.c.began_at)

#: What happened to a job beside what its own row says.
history = Table(
    "kathikon_history",
    metadata,
    Column("seq", Serial, primary_key=True),
    Column("job", Name, nullable=False),
    Column("at", Instant, nullable=False),
    Column("event", String(20), nullable=False),
    Column("text", Long),
    Column("traceback", Long),
    Column("act", BigInteger),
)
Index("kathikon_history_job", history.c.job)

schedules = Table(
    "kathikon_schedules",
    metadata,
    Column("name", Name, primary_key=True),
    Column("label", Long, nullable=False),
    #: Who has made the entry: "code" (``beat_schedule``), "table" (an operator, a program), or "django" (the tables of
    #: django-celery-beat).
    Column("source", String(10), nullable=False),
    Column("task", Long, nullable=False),
    #: JSON; NULL in `timing` is not possible: "code" stands for a schedule that only its code can compute.
    Column("args", Long, nullable=False),
    Column("kwargs", Long, nullable=False),
    Column("options", Long, nullable=False),
    Column("timing", Long, nullable=False),
    Column("zone", Long, nullable=False),
    Column("missed", String(10), nullable=False),
    Column("grace", Double, nullable=False),
    Column("overlap", String(10), nullable=False),
    Column("jitter", Double, nullable=False),
    Column("starts_at", Instant),
    Column("ends_at", Instant),
    Column("max_runs", Integer),
    Column("runs", Integer, nullable=False),
    Column("paused", Boolean(create_constraint=False), nullable=False),
    #: When a worker acts next: `tick_at`, the moment of the timetable, plus the jitter. NULL: never.
    Column("next_at", Instant),
    Column("tick_at", Instant),
    #: The last tick that was sent, when it was sent, and as which job.
    Column("last_tick", Instant),
    Column("last_sent", Instant),
    Column("last_job", Name),
    #: How many ticks were not sent: missed, or because the job before had not ended.
    Column("skipped", Integer, nullable=False),
    #: Why the last attempt to send failed.
    Column("problem", Long),
    #: Of the code's entry: its digest, those that it has had before, and whether an operator has changed the row since.
    Column("digest", String(40)),
    Column("past", Long, nullable=False),
    Column("is_changed", Boolean(create_constraint=False), nullable=False),
    #: The digest of what the tables of django-celery-beat said when they were last followed.
    Column("followed", String(40)),
)
Index("kathikon_schedules_next", schedules.c.next_at)

#: The limits by name: the numbers of the code, as the worker that was started last knows it, and those of an operator.
limits = Table(
    "kathikon_limits",
    metadata,
    Column("name", Name, primary_key=True),
    Column("label", Long, nullable=False),
    Column("concurrency", Integer),
    Column("rate", Integer),
    Column("per", Double, nullable=False),
    Column("burst", Integer, nullable=False),
    #: Whether an operator's numbers count, who set them, when and why.
    Column("is_set", Boolean(create_constraint=False), nullable=False),
    Column("set_concurrency", Integer),
    Column("set_rate", Integer),
    Column("set_per", Double),
    Column("set_burst", Integer),
    Column("operator", Long),
    Column("reason", Long),
    Column("changed_at", Instant),
)

#: The keys of the limits: one for each value of a limit's fields. Whoever lets jobs start locks their rows.
limit_keys = Table(
    "kathikon_limit_keys",
    metadata,
    Column("key", Name, primary_key=True),
    Column("name", Name, nullable=False),
    #: Seconds since 1970: the rate's state (see `storage.rates`), and until when a task has closed the key.
    Column("next_token", Double),
    Column("closed_until", Double),
    #: When jobs that wait for a token are to be let out; NULL: none waits for a moment.
    Column("wake_at", Instant),
)
Index("kathikon_limit_keys_wake", limit_keys.c.wake_at)
Index("kathikon_limit_keys_name", limit_keys.c.name)

#: What is taken of a key: by a run of a job, as long as a node holds its row under that fence, or else by a node.
slots = Table(
    "kathikon_slots",
    metadata,
    Column("key", Name, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("fence", Integer, primary_key=True, autoincrement=False),
    Column("node_id", BigInteger),
    Column("weight", Integer, nullable=False),
)
