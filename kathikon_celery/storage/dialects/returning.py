"""The verbs for databases that have UPDATE and DELETE … RETURNING, and INSERT … ON CONFLICT."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from sqlalchemy import Connection, Integer, ScalarSelect, Select, Table, bindparam, delete, select, union_all
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import Delete, Update
from sqlalchemy.sql.expression import ColumnElement

from kathikon_celery.job import Hold
from kathikon_celery.storage.dialects.base import Dialect
from kathikon_celery.storage.dialects.parameters import Change, Changed, Claim, Pick, Taken, Upsert
from kathikon_celery.storage.engine import prepared

#: The two INSERTs of SQLAlchemy that have ON CONFLICT.
Insert = postgresql.Insert | sqlite.Insert
#: Prefix of a text that comes with a claim; the column that it is written into follows.
BROUGHT = "new_"


class ReturningDialect(Dialect):
    """Each verb is one prepared statement, made of fragments that differ."""

    # --- fragments

    @abstractmethod
    def _insert(self, table: Table) -> Insert:
        """Return an INSERT with the methods ``on_conflict_do_update`` and ``on_conflict_do_nothing``."""

    @abstractmethod
    def _is_among(self, table: Table, rows: ScalarSelect[int]) -> ColumnElement[bool]:
        """Return the condition that the ``seq`` of a row of *table* is among *rows*."""

    @abstractmethod
    def _held(self, table: Table, owned: bool, brought: Sequence[str]) -> ColumnElement[bool]:
        """Return the condition that a row of *table* is held under one of the claims given to `_of_holds`.

        Arguments:
            owned: compare the node as well, not only ``seq`` and fence.
            brought: names of the texts that come with each claim: see `_brought`.
        """

    @abstractmethod
    def _brought(self, name: str) -> ColumnElement[str]:
        """Return, for a statement with `_held`, the text called *name* that came with the row's claim."""

    @abstractmethod
    def _of_holds(self, holds: Mapping[Hold, Mapping[str, str | None]], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters of a statement with `_held`: *holds*, each with its texts, and *values* for all."""

    @abstractmethod
    def _told(
        self,
        connection: Connection,
        statement: Any,
        values: Mapping[str, Any],
        ended: bool,
        which: list[Changed] | None,
    ) -> int:
        """Run *statement*, which changes jobs, and wake the processes that wait for them; return their number."""

    # --- publishing

    def upsert(self, connection: Connection, upsert: Upsert, values: Mapping[str, Any]) -> bool:
        return prepared.count(connection, upserting(self, upsert), values) > 0

    def upsert_many(self, connection: Connection, upsert: Upsert, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            prepared.many(connection, upserting(self, upsert), rows)

    # --- claiming and reporting

    def claim(
        self,
        connection: Connection,
        claim: Claim,
        values: Mapping[str, Any],
        waiting: tuple[list[str], int] | None = None,
    ) -> Sequence[Any]:
        return prepared.rows(connection, claiming(self, claim), values)

    def complete_and_claim(
        self,
        connection: Connection,
        change: Change,
        holds: Sequence[Hold],
        claim: Claim,
        values: Mapping[str, Any],
        waiting: tuple[list[str], int] | None = None,
    ) -> tuple[int, Sequence[Any]]:
        with self.atomic(connection):
            number = self.change_held(connection, change, holds, {})
            return number, self.claim(connection, claim, values, waiting)

    def preparations(self, change: Change, claims: Sequence[Claim]) -> Iterator[Callable[[Connection], None]]:
        yield partial(prepared.ready, statement=changing_held(self, change, True, ()))
        for claim in claims:
            yield partial(prepared.ready, statement=claiming(self, claim))

    def change_held(
        self,
        connection: Connection,
        change: Change,
        holds: Sequence[Hold],
        values: Mapping[str, Any],
        *,
        owned: bool = True,
        which: list[Changed] | None = None,
    ) -> int:
        if not holds:
            return 0
        parameters = self._of_holds({hold: {} for hold in holds}, values)
        if which is None:
            return prepared.count(connection, changing_held(self, change, owned, ()), parameters)
        return _noted(prepared.rows(connection, _which_held(self, change, owned), parameters), which)

    def end_held(
        self,
        connection: Connection,
        change: Change,
        ends: Mapping[Hold, Mapping[str, str | None]],
        *,
        which: list[Changed] | None = None,
    ) -> int:
        if not ends:
            return 0
        columns = tuple(next(iter(ends.values())))
        return self._told(connection, changing_held(self, change, True, columns), self._of_holds(ends, {}), True, which)

    def delete_held(self, connection: Connection, table: Table, holds: Sequence[Hold]) -> int:
        if not holds:
            return 0
        return prepared.count(connection, _deleting_held(self, table), self._of_holds({hold: {} for hold in holds}, {}))

    # --- changing or deleting rows that no other transaction has

    def pick_and_change(
        self,
        connection: Connection,
        change: Change,
        pick: Pick,
        columns: tuple[ColumnElement[Any], ...],
        values: Mapping[str, Any],
        *,
        which: list[Changed] | None = None,
    ) -> Taken:
        statement = _changing_picked(self, change, pick, columns, which is not None)
        return _taken(connection, statement, columns, values, which)

    def pick_and_delete(
        self,
        connection: Connection,
        pick: Pick,
        columns: tuple[ColumnElement[Any], ...],
        values: Mapping[str, Any],
        *,
        which: list[Changed] | None = None,
    ) -> Taken:
        statement = _deleting_picked(self, pick, columns, which is not None)
        return _taken(connection, statement, columns, values, which)

    def change_and_read(
        self, connection: Connection, change: Change, columns: tuple[ColumnElement[Any], ...], values: Mapping[str, Any]
    ) -> Sequence[Any] | None:
        rows: Sequence[Sequence[Any]] = prepared.rows(connection, _changing_and_reading(change, columns), values)
        return rows[0] if rows else None

    # --- results

    def change_and_tell(
        self,
        connection: Connection,
        change: Change | Upsert,
        values: Mapping[str, Any],
        ended: bool,
        *,
        which: list[Changed] | None = None,
    ) -> int:
        statement = upserting(self, change) if isinstance(change, Upsert) else _changing(change)
        return self._told(connection, statement, values, ended, which)


def which_of(table: Table) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of `Changed`."""
    return tuple(table.c[name] for name in Changed._fields)


def _noted(rows: Sequence[Any], which: list[Changed]) -> int:
    which += [Changed(*row) for row in rows]
    return len(rows)


def _taken(
    connection: Connection,
    statement: Update | Delete,
    columns: tuple[ColumnElement[Any], ...],
    values: Mapping[str, Any],
    which: list[Changed] | None,
) -> Taken:
    if not columns and which is None:
        return Taken(prepared.count(connection, statement, values), ())
    rows = prepared.rows(connection, statement, values)
    if which is None:
        return Taken(len(rows), rows)
    which += [Changed(*row[len(columns) :]) for row in rows]
    return Taken(len(rows), [row[: len(columns)] for row in rows])


# --- statements, made once


@lru_cache(maxsize=256)
def upserting(dialect: ReturningDialect, upsert: Upsert) -> Insert:
    """Return the statement of `Dialect.upsert`."""
    insert = dialect._insert(upsert.table).values(dict(upsert.values))
    if upsert.changes is None:
        return insert.on_conflict_do_nothing(index_elements=upsert.key or None)
    return insert.on_conflict_do_update(
        index_elements=upsert.key,
        set_=dict(upsert.changes(insert.excluded)),
        where=upsert.where(insert.excluded) if upsert.where is not None else None,
    )


def picked(dialect: ReturningDialect, pick: Pick) -> ColumnElement[bool]:
    """Return the condition that *pick* selects a row that no other transaction has locked."""
    parts: list[Select[Any]] = [rows.with_for_update(skip_locked=True) for rows in pick.rows]
    if len(parts) == 1:
        return dialect._is_among(pick.table, parts[0].scalar_subquery())
    # UNION ALL with LIMIT: selects after the last one that is needed read and lock nothing.
    every = union_all(*(select(part.subquery().c.seq) for part in parts)).subquery()
    first = select(every.c.seq).limit(bindparam("at_most", type_=Integer()))
    return dialect._is_among(pick.table, first.scalar_subquery())


@lru_cache(maxsize=256)
def claiming(dialect: ReturningDialect, claim: Claim) -> Any:
    """Return the statement of `Dialect.claim`."""
    rows = () if claim.pick is None else (picked(dialect, claim.pick),)
    return claim.change.of(*rows).returning(*claim.columns)


@lru_cache(maxsize=256)
def changing_held(dialect: ReturningDialect, change: Change, owned: bool, columns: tuple[str, ...]) -> Update:
    """Return the statement of `Dialect.change_held`, or, with texts for *columns*, of `Dialect.end_held`."""
    brought = {column: BROUGHT + column for column in columns}
    held = dialect._held(change.table, owned, list(brought.values()))
    return change.of(held, **{column: dialect._brought(name) for column, name in brought.items()})


@lru_cache(maxsize=64)
def _which_held(dialect: ReturningDialect, change: Change, owned: bool) -> Any:
    return changing_held(dialect, change, owned, ()).returning(*which_of(change.table))


@lru_cache(maxsize=64)
def _deleting_held(dialect: ReturningDialect, table: Table) -> Delete:
    return delete(table).where(dialect._held(table, True, ()))


@lru_cache(maxsize=256)
def _changing_picked(
    dialect: ReturningDialect, change: Change, pick: Pick, columns: tuple[ColumnElement[Any], ...], says_which: bool
) -> Any:
    return _returning(change.of(picked(dialect, pick)), pick.table, columns, says_which)


@lru_cache(maxsize=256)
def _deleting_picked(
    dialect: ReturningDialect, pick: Pick, columns: tuple[ColumnElement[Any], ...], says_which: bool
) -> Any:
    return _returning(delete(pick.table).where(picked(dialect, pick)), pick.table, columns, says_which)


def _returning(
    statement: Update | Delete, table: Table, columns: tuple[ColumnElement[Any], ...], says_which: bool
) -> Any:
    wanted = (*columns, *which_of(table)) if says_which else columns
    return statement.returning(*wanted) if wanted else statement


@lru_cache(maxsize=256)
def _changing_and_reading(change: Change, columns: tuple[ColumnElement[Any], ...]) -> Any:
    return change.of().returning(*columns)


@lru_cache(maxsize=256)
def _changing(change: Change) -> Update:
    return change.of()
