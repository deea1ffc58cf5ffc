"""What the verbs of a dialect are given: changes, rows to pick, rows to write.

A verb keeps the statement that it makes of them, by their identity: callers give the same objects each time. Bind
parameters must not have the names of columns of the table: SQLAlchemy refuses that in an UPDATE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from sqlalchemy import ColumnElement, Select, Table, update
from sqlalchemy.sql.dml import Update
from sqlalchemy.sql.expression import TextClause

#: An argument of ``where()``.
Condition = ColumnElement[bool] | TextClause


class NewRow(Protocol):
    """The columns of the row to insert, by name."""

    def __getitem__(self, name: str, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Change:
    """An UPDATE of a table without its choice of rows, which a verb adds.

    Arguments:
        values: new values by column. An expression reads columns as they were before the change. A database that sets
            one column after the other has to set those last that other expressions read.
        where: further conditions for the rows.
    """

    table: Table
    values: Mapping[str, Any]
    where: tuple[Condition, ...] = ()

    def of(self, *rows: Condition, **more: Any) -> Update:
        """Return the UPDATE of the rows with the conditions *rows*; *more*: further new values by column."""
        return update(self.table).where(*rows, *self.where).values({**self.values, **more})


@dataclass(frozen=True, eq=False)
class Pick:
    """Which rows a verb takes, without those that another transaction has locked.

    Arguments:
        rows: SELECTs of ``seq`` from *table*, each with ORDER BY and LIMIT. Several are read one after another until
            there are ``at_most`` rows, a parameter.
        index: the index for all of *rows*, for a database that needs a hint.
    """

    table: Table
    rows: tuple[Select[Any], ...]
    index: str


@dataclass(frozen=True, eq=False)
class Claim:
    """Which jobs are claimed, and how.

    Arguments:
        change: the change that claims a job; its parameter ``by_node`` is the claiming node.
        columns: the columns to return, as they are after the change; the first one is ``seq``.
        pick: the jobs; `None`: those that fit the conditions of *change*.
    """

    change: Change
    columns: tuple[ColumnElement[Any], ...]
    pick: Pick | None = None


@dataclass(frozen=True, eq=False)
class Upsert:
    """An INSERT of a row, which changes the existing row with the same key if there is one.

    Arguments:
        key: the columns of a primary key or a unique constraint; empty, without *changes*: of any unique index.
        values: values of the new row by column.
        changes: takes the new row, and returns new values for the existing row by column, which read its columns as
            they were; `None`: the existing row stays as it is.
        where: takes the new row, and returns the condition that the existing row is changed; `None`: always.
    """

    table: Table
    key: tuple[ColumnElement[Any], ...]
    values: Mapping[str, Any]
    changes: Callable[[NewRow], Mapping[str, Any]] | None = None
    where: Callable[[NewRow], Condition] | None = None


class Changed(NamedTuple):
    """A job that a verb has changed or deleted: the keys of its id and its queue, and its task."""

    id: str
    queue: str | None
    task: str


class Taken(NamedTuple):
    """The rows that a verb has taken: their number, and the wanted columns of each."""

    number: int
    rows: Sequence[Any]
