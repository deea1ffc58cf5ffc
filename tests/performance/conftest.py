"""A table of 20,000 jobs in all states, and the plans of the statements that are run on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Integer, Text, case, cast, insert, literal, null, select, text
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.job import HELD, TERMINAL, State
from kathikon_celery.storage import Storage
from kathikon_celery.storage.clock import now
from kathikon_celery.storage.tables import acts, chords, history, jobs, limit_keys, limits, messages, schedules, slots
from tests.storage.actors import Worker
from tests.support.postgresql import new_database
from tests.support.statements import heard

ROWS = 20_000
NODES = 20
#: How many of a hundred jobs are in each state.
MIX = {
    State.COMPLETED: 55,
    State.DEAD: 5,
    State.CANCELLED: 2,
    State.DISCARDED: 2,
    State.SCHEDULED: 13,
    State.RETRYABLE: 2,
    State.AVAILABLE: 15,
    State.CLAIMED: 3,
    State.RUNNING: 3,
}


@dataclass(frozen=True)
class Access:
    """How a plan reaches the rows of one table. *condition*: what the index is searched by."""

    table: str
    index: str | None
    condition: str = ""


@dataclass
class Plan:
    """How a database would run a statement."""

    statement: str
    accesses: list[Access] = field(default_factory=list)
    sorts: bool = False

    def __str__(self) -> str:
        return "\n  ".join(
            [*map(str, self.accesses), "with a sort" if self.sorts else "without a sort", self.statement]
        )

    def add_node(self, node: dict[str, Any]) -> None:
        """Read a node of PostgreSQL's plan."""
        kind = node["Node Type"]
        if kind == "Bitmap Index Scan" or ("Relation Name" in node and kind not in ("ModifyTable", "Bitmap Heap Scan")):
            index = node.get("Index Name")
            table = node.get("Relation Name") or "_".join(index.split("_")[:2])
            self.accesses.append(Access(table, index, node.get("Index Cond", "")))
        self.sorts = self.sorts or "Sort" in kind
        for part in node.get("Plans", []):
            self.add_node(part)

    def add_line(self, line: str) -> None:
        """Read a line of SQLite's plan."""
        self.sorts = self.sorts or "TEMP B-TREE FOR ORDER BY" in line
        match = re.match(
            r"(?:SCAN|SEARCH) (kathikon_\w+)(?: USING (?:COVERING )?(INTEGER PRIMARY KEY|INDEX \w+))?(.*)", line
        )
        if match:
            table, index, condition = match.groups()
            names = {
                "INTEGER PRIMARY KEY": f"{table}_pkey",
                f"INDEX sqlite_autoindex_{table}_1": f"{table}_{'id' if table == 'kathikon_jobs' else 'pkey'}",
            }
            self.accesses.append(Access(table, index and names.get(index, index.removeprefix("INDEX ")), condition))


class Plans:
    """Runs storage functions, and says how the database runs their statements."""

    def __init__(self, storage: Storage, worker: Worker, is_analyzed: bool) -> None:
        self.storage = storage
        self.is_analyzed = is_analyzed
        self.database = storage.database
        self.worker = worker

    @contextmanager
    def of(self) -> Iterator[list[Plan]]:
        """The plans of the statements that are run inside, each in all the ways the database may plan it."""
        ran: dict[str, Any] = {}
        plans: list[Plan] = []

        def hear(statement: str, values: Any, many: bool) -> None:
            if statement.split()[0] in ("SELECT", "UPDATE", "DELETE", "INSERT", "WITH"):
                ran[statement] = values[0] if many else values

        with heard(hear):
            yield plans
        assert ran
        for statement, values in ran.items():
            plans += self._explain(statement, values)

    def _explain(self, statement: str, values: Any) -> list[Plan]:
        if self.database.dialect.name == "postgresql":
            return [self._explain_execute(statement, values, mode) for mode in ("custom", "generic")]
        plan = Plan(statement)
        with self.database.read() as connection:
            for line in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).scalars(3):
                plan.add_line(line)
        return [plan]

    def _explain_execute(self, statement: str, values: dict[str, Any], mode: str) -> Plan:
        """PostgreSQL's plan of a prepared statement: for these *values*, or one for all."""
        names: list[str] = []

        def number(match: re.Match[str]) -> str:
            if match[1] not in names:
                names.append(match[1])
            return f"${names.index(match[1]) + 1}"

        numbered = re.sub(r"%\((\w+)\)s", number, statement).replace("%%", "%")
        literals = sql.SQL(", ").join(sql.Literal(values[name]) for name in names)
        arguments = sql.SQL("({})").format(literals) if names else sql.SQL("")
        url = self.database.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url) as connection:
            connection.execute(f"SET plan_cache_mode = force_{mode}_plan".encode())
            connection.execute(f"PREPARE statement AS {numbered}".encode())
            explained = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE statement{}").format(arguments))
            row = explained.fetchone()
        assert row is not None
        plan = Plan(f"({mode} plan) {statement}")
        plan.add_node(row[0][0]["Plan"])
        return plan


def _name(prefix: str, number: ColumnElement[int]) -> ColumnElement[str]:
    return literal(prefix).concat(cast(number, Text))  # SQLite's || comes before %


def _fill(storage: Storage) -> None:
    number = select(literal(0, Integer).label("i")).cte("numbers", recursive=True)
    number = number.union_all(select(number.c.i + 1).where(number.c.i < ROWS - 1))
    i, hundredth = number.c.i, number.c.i % 100
    bounds, bound = [], 0
    for state, share in MIX.items():
        bound += share
        bounds.append((hundredth < bound, literal(state.value)))
    state = case(*bounds)

    def only(states: frozenset[State], value: ColumnElement[Any]) -> ColumnElement[Any]:
        return case((state.in_([one.value for one in states]), value), else_=null())

    columns = {
        "id": _name("id-", i),
        "queue": _name("queue-", i % 3),
        "task": literal("proj.task"),
        "state": state,
        "priority": i % 5,
        "publication": i,
        "root_id": case((i % 10 != 0, _name("id-", i % 5000)), else_=null()),
        "group_id": case((i % 4 == 0, _name("group-", i % 5000)), else_=null()),
        "fence": literal(1),
        "attempts": literal(1),
        "crashes": literal(0),
        "max_attempts": literal(20),
        "acked": literal(False),
        "node_id": only(HELD, i % NODES + 1),
        "inserted_at": now(-i),
        "available_at": now(i * 1.0 - 1000),
        "expires_at": case((i % 20 == 0, now(i * 1.0 - 1000)), else_=null()),
        "ended_at": only(TERMINAL, now(i * -60.0)),
        "envelope": literal("{}"),
        "body": literal("x" * 500),
    }
    with storage.database.write() as connection:
        connection.execute(insert(jobs).from_select(list(columns), select(*columns.values())))
        # A tenth more, which wait for limits: one line of many jobs, many of few, and some jobs that have left theirs.
        line = case((i % 2 == 0, literal("hot")), else_=_name("key-", i % 500))
        limited = case((i % 50 < 2, literal(State.AVAILABLE.value)), else_=literal(State.BLOCKED.value))
        more = {
            "id": _name("limited-", i),
            "queue": literal("limited"),
            "state": limited,
            "line": line,
            "gate": line,
            "limits": literal('[["').concat(line).concat('","name",1,50,null,1,1]]'),
            "active_key": _name("unique-", i),
        }
        own = {**columns, **more, "root_id": null(), "group_id": null(), "node_id": null(), "ended_at": null()}
        connection.execute(insert(jobs).from_select(list(own), select(*own.values()).where(i < ROWS // 10)))
        columns = {
            "queue": _name("queue-", i % 10),
            "priority": i % 2,
            "available_at": now(),
            "expires_at": now(i * 1.0 - 100),
            "node_id": case((i % 10 == 0, i % NODES + 1), else_=null()),
            "fence": literal(1),
            "envelope": literal("{}"),
            "body": literal("x" * 200),
        }
        connection.execute(insert(messages).from_select(list(columns), select(*columns.values()).where(i < ROWS // 10)))
        columns = {
            "id": _name("group-", i),
            "ended": literal(0),
            "added": literal(0),
            "inserted_at": now(i * -600.0),
        }
        connection.execute(insert(chords).from_select(list(columns), select(*columns.values()).where(i < ROWS // 10)))
        columns = {"job": _name("id-", i % 5000), "at": now(-i), "event": literal("retry"), "act": i % 500}
        connection.execute(insert(history).from_select(list(columns), select(*columns.values())))
        columns = {
            "id": i,
            "verb": literal("retry"),
            "target": literal("{}"),
            "operator": literal("ada"),
            "began_at": now(-i),
            "changed": literal(40),
        }
        connection.execute(insert(acts).from_select(list(columns), select(*columns.values()).where(i < ROWS // 10)))
        columns = {name: literal("") for name in ("task", "args", "kwargs", "options", "timing", "zone", "past")}
        columns |= {name: literal("x") for name in ("missed", "overlap")}
        columns |= {name: literal(False) for name in ("paused", "is_changed")}
        columns |= {name: literal(0) for name in ("grace", "jitter", "runs", "skipped")}
        columns |= {
            "name": _name("schedule-", i),
            "label": _name("schedule-", i),
            "source": case((i % 2 == 0, literal("code")), else_=literal("table")),
            "next_at": now(i * 1.0 - 100),
        }
        connection.execute(insert(schedules).from_select(list(columns), select(*columns.values())))
        columns = {"name": _name("limit-", i), "label": _name("limit-", i), "per": literal(1.0), "burst": literal(1)}
        columns |= {"concurrency": literal(50), "is_set": literal(False)}
        connection.execute(insert(limits).from_select(list(columns), select(*columns.values()).where(i < 20)))
        columns = {"key": _name("key-", i), "name": _name("limit-", i % 20)}
        connection.execute(
            insert(limit_keys).from_select(list(columns), select(*columns.values()).where(i < ROWS // 4))
        )
        columns = {"key": _name("key-", i), "seq": i + 1, "fence": literal(1), "weight": literal(1)}
        connection.execute(insert(slots).from_select(list(columns), select(*columns.values()).where(i % 18 == 0)))


@pytest.fixture(
    scope="module",
    params=[
        "sqlite",
        "sqlite analyzed",
        pytest.param("postgresql", marks=pytest.mark.postgresql),
        pytest.param("postgresql analyzed", marks=pytest.mark.postgresql),
    ],
)
def plans(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plans]:
    """Plans on the full table. Nobody analyzes a SQLite file, unless its owner does; PostgreSQL does in a minute."""
    with ExitStack() as stack:
        if request.param.startswith("postgresql"):
            url = stack.enter_context(new_database(request.getfixturevalue("postgresql_server_url")))
        else:
            url = f"sqlite:///{tmp_path_factory.mktemp('plans') / 'kathikon.db'}"
        storage = stack.enter_context(closing(Storage(url)))
        storage.setup()
        workers = [Worker(storage) for _ in range(NODES)]
        _fill(storage)
        is_analyzed = request.param.endswith("analyzed")
        if is_analyzed:
            with storage.database.once() as connection:
                connection.execute(text("ANALYZE"))
        yield Plans(storage, workers[0], is_analyzed)
