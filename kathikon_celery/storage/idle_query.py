"""What an idle worker asks the database in one statement: whether there is work, and its services' next questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from sqlalchemy import Connection, or_, select
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.storage import claim, finish, limits, nodes, promote, prune, schedules, topology
from kathikon_celery.storage.dialects import Dialect
from kathikon_celery.storage.engine import prepared
from kathikon_celery.storage.engine.database import Database

#: Name of a question -> values of its parameters.
Questions = Mapping[str, Mapping[str, Any]]


class Asker(Protocol):
    """A service that would ask the database by itself, if the idle worker did not."""

    def asks(self, within: float) -> Questions:
        """Return what the service will ask in the next *within* seconds."""

    def hear(self, answers: Mapping[str, Any]) -> None:
        """Take the answers, by the names of the questions."""


def _next_due(dialect: Dialect) -> Any:
    return promote.NEXT_DUE.scalar_subquery()


def _is_amiss(dialect: Dialect) -> Any:
    """Whether the connection of a node is gone; or a job's end is unreported; or a queue is unused."""
    return or_(nodes.is_any_suspect(dialect), finish.IS_ANY_UNREPORTED, topology.IS_ANY_UNUSED)


def _renewals(dialect: Dialect) -> Any:
    """Which nodes there are, and when their leases end: see `nodes.renewals_of`."""
    return nodes.RENEWALS


def _next_tick(dialect: Dialect) -> Any:
    return schedules.NEXT_TICK.scalar_subquery()


def _next_offer(dialect: Dialect) -> Any:
    return limits.NEXT_OFFER.scalar_subquery()


def _is_anything_old(dialect: Dialect) -> Any:
    return prune.IS_ANYTHING_OLD


_QUESTIONS = {
    "next_due": _next_due,
    "is_amiss": _is_amiss,
    "renewals": _renewals,
    "is_anything_old": _is_anything_old,
    "next_tick": _next_tick,
    "next_offer": _next_offer,
}


@lru_cache(maxsize=64)
def _look(dialect: Dialect, with_messages: bool, knows_pauses: bool, questions: tuple[str, ...]) -> Any:
    answers = [_QUESTIONS[name](dialect).label(name) for name in questions]
    return select(claim.is_anything_there(with_messages, knows_pauses), *answers)


@lru_cache(maxsize=4)
def _there(with_messages: bool, knows_pauses: bool) -> tuple[ColumnElement[bool]]:
    return (claim.is_anything_there(with_messages, knows_pauses),)


def look(
    database: Database,
    connection: Connection,
    queues: Sequence[str],
    with_messages: bool = True,
    asked: Sequence[tuple[Asker, Questions]] = (),
) -> bool:
    """Whether a job or a message is ready in one of *queues* (keys); the askers in *asked* get their answers."""
    parameters = {name: values for _, questions in asked for name, values in questions.items()}
    values: dict[str, Any] = {"queues": list(queues)}
    for one in parameters.values():
        values |= one
    statement = _look(database.dialect, with_messages, database.knows_pauses, tuple(parameters))
    # The text of a question may depend on its parameters.
    (row,) = connection.execute(statement, values) if asked else prepared.rows(connection, statement, values)
    answers = dict(zip(parameters, row[1:], strict=True))
    for asker, questions in asked:
        asker.hear({name: answers[name] for name in questions})
    return bool(row[0])


def renew(
    database: Database, queues: Sequence[str], with_messages: bool, node: nodes.Registered, lease: float
) -> bool | None:
    """`look` and renew the node's lease to *lease* seconds, in one statement; `None` if the node was taken for dead."""
    values = {"queues": list(queues), **nodes.of_renewal(node, lease)}
    with database.once() as connection:
        there = _there(with_messages, database.knows_pauses)
        found = database.dialect.change_and_read(connection, nodes.RENEW, there, values)
    return bool(found[0]) if found is not None else None
