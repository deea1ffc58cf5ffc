"""Selecting: counts the jobs that fit a filter, and reads them page by page, each state in the order of an index."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Connection, Text, and_, func, literal, or_, select
from sqlalchemy.sql.expression import ColumnElement, TextClause

from kathikon_celery.job import HELD as HELD_STATES
from kathikon_celery.job import TERMINAL, WAITING, Cause, Job, State
from kathikon_celery.storage.names import key, printable
from kathikon_celery.storage.reading import jobs_of
from kathikon_celery.storage.tables import BLOCKED, DUE, ENDED, HELD, READY, fits, jobs, state_in

#: The columns of a page: what may be large stays in the table.
_COLUMNS = [column for column in jobs.c if column.name not in ("body", "result", "traceback", "meta")]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which jobs are meant: those that fit each field that is given. `Kathikon.jobs` makes it.

    >>> storage.count(Filter(states={State.DEAD}, queue="emails"))
    12

    Arguments:
        states: one of them; empty: any.
        queue: the name of the queue.
        task: the name of the task, or a pattern with ``*`` and ``?``: see `tables.fits`.
        error: the reason of the job's end, or a pattern.
        cause: why the job has ended.
        argument: a pattern within the arguments as they are written in JSON, such as ``"user_id": 42``.
        root: the id of the job with which the workflow began. That job has no ``root_id``: its ``id`` fits as well.
        group: the id of the group.
        since: published at that moment or later; an aware datetime, as the next ones.
        until: published before that moment.
        ended_since: ended at that moment or later.
        ended_until: ended before that moment.
        with_message: no rows that are only a result, such as that of a chord's body that never ran.
        without_replaced: no jobs that were replaced by others, which have not succeeded.

    Raises `TypeError` for a pattern that is no text, `ValueError` for an empty text.
    """

    states: Collection[State] = ()
    queue: str | None = None
    task: str | None = None
    error: str | None = None
    cause: Cause | None = None
    argument: str | None = None
    root: str | None = None
    group: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    ended_since: datetime | None = None
    ended_until: datetime | None = None
    with_message: bool = False
    without_replaced: bool = False

    def __post_init__(self) -> None:
        for name in ("queue", "task", "error", "argument", "root", "group"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise TypeError(f"{name} = {value!r} is no text")
            if value == "":
                raise ValueError(f"{name} is an empty text, which no job has; leave it out, or name one")

    def __str__(self) -> str:
        """Return the fields that are given, as JSON; without those that a verb adds."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if not one.name.startswith("with")}
        given["states"] = sorted(self.states)
        return json.dumps({name: value for name, value in given.items() if value not in (None, [])}, default=str)

    def conditions(self) -> Iterator[ColumnElement[bool]]:
        """Yield the conditions of all fields but `states`."""
        if self.queue is not None:
            yield jobs.c.queue == key(self.queue)
        for column, pattern in ((jobs.c.task, self.task), (jobs.c.reason, self.error)):
            if pattern is not None:
                is_pattern = "*" in pattern or "?" in pattern
                text = printable(pattern)
                yield fits(column, literal(text, Text())) if is_pattern else column == text
        if self.cause is not None:
            yield jobs.c.cause == self.cause.value
        if self.argument is not None:
            written = "".join(one if one.isascii() else json.dumps(one)[1:-1] for one in self.argument)
            yield fits(jobs.c.body, literal(f"*{printable(written)}*", Text()))
        if self.root is not None:
            yield or_(jobs.c.root_id == key(self.root), jobs.c.id == key(self.root))
        if self.group is not None:
            yield jobs.c.group_id == key(self.group)
        if self.since is not None:
            yield jobs.c.inserted_at >= self.since
        if self.until is not None:
            yield jobs.c.inserted_at < self.until
        if self.ended_since is not None:
            yield jobs.c.ended_at >= self.ended_since
        if self.ended_until is not None:
            yield jobs.c.ended_at < self.ended_until
        if self.with_message:
            yield jobs.c.queue.is_not(None)
        if self.without_replaced:
            yield func.coalesce(jobs.c.cause, "") != Cause.CHILDREN.value


#: A column, and whether its highest value comes first.
_By = tuple[Column[Any], bool]
_NEWEST_FIRST: list[_By] = [(jobs.c.seq, True)]


def _order(state: State | None) -> tuple[TextClause | None, list[_By]]:
    """Return the condition of the index that has the jobs of *state* in order, and that order."""
    if state is None:
        return None, _NEWEST_FIRST
    if state in TERMINAL:
        return ENDED, [(jobs.c.ended_at, True), *_NEWEST_FIRST]
    if state in WAITING:
        return DUE, [(jobs.c.available_at, False), (jobs.c.seq, False)]
    if state is State.AVAILABLE:
        claimed_first: list[_By] = [(jobs.c.priority, True), (jobs.c.available_at, False), (jobs.c.seq, False)]
        return READY, [(jobs.c.queue, False), *claimed_first]
    if state is State.BLOCKED:
        return BLOCKED, [
            (jobs.c.gate, False),
            (jobs.c.queue, False),
            (jobs.c.priority, True),
            (jobs.c.available_at, False),
            (jobs.c.seq, False),
        ]
    if state in HELD_STATES:
        return HELD, [(jobs.c.node_id, False), (jobs.c.seq, False)]
    return None, [(jobs.c.seq, False)]


def _after(last: Job, order: list[_By]) -> ColumnElement[bool]:
    """Return the condition that a row comes after *last* in *order*."""
    values = [key(value) if isinstance(value := getattr(last, column.name), str) else value for column, _ in order]
    later: list[ColumnElement[bool]] = []
    same: list[ColumnElement[bool]] = []
    for (column, is_descending), value in zip(order, values, strict=True):
        later.append(and_(*same, column < value if is_descending else column > value))
        same.append(column == value)
    (first, is_descending), value = order[0], values[0]
    bound: ColumnElement[bool] = first <= value if is_descending else first >= value  # what an index can search
    return and_(bound, or_(*later))


def count(connection: Connection, chosen: Filter, at_most: int | None = None) -> int:
    """Return the number of jobs that fit. *at_most*: stop counting there."""
    found = select(jobs.c.seq).where(*chosen.conditions())
    states: list[State | None] = [state for state in State if state in chosen.states] or [None]
    number = 0
    for state in states:
        index, _ = _order(state)
        query = found if state is None else found.where(state_in([state]))
        query = query if index is None else query.where(index)
        left = None if at_most is None else at_most - number
        if left is not None and left <= 0:
            break
        number += connection.execute(select(func.count()).select_from(query.limit(left).subquery())).scalar_one()
    return number


def page(connection: Connection, chosen: Filter, limit: int, after: Job | None = None) -> list[Job]:
    """Return up to *limit* jobs that fit, without their bodies and results, from the one behind *after* on.

    State by state: jobs that are ready in the order of their queue, those that wait for their time by that, those that
    are held by node, those that have ended from the newest end on. Without states: from the newest job on.
    """
    states: list[State | None] = [state for state in State if state in chosen.states] or [None]
    if after is not None and chosen.states:
        states = states[states.index(after.state) :] if after.state in states else []
    found: list[Job] = []
    for state in states:
        if len(found) < limit:
            index, order = _order(state)
            query = select(*_COLUMNS).where(*chosen.conditions()).limit(limit - len(found))
            query = query.order_by(*(column.desc() if descends else column for column, descends in order))
            if state is not None:
                query = query.where(state_in([state]))
            if index is not None:
                query = query.where(index)
            if after is not None and state in (None, after.state):
                query = query.where(_after(after, order))
            found += jobs_of(connection, query)
    return found
