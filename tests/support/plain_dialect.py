"""A dialect of SQLite that does without RETURNING, ON CONFLICT and queries within what changes rows.

It stands for a database that has none of them: whether the verbs can be written for such a one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Table, delete, insert, literal, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql.visitors import replacement_traverse

from kathikon_celery.job import Hold
from kathikon_celery.storage.dialects.parameters import Change, Changed, Claim, Pick, Taken, Upsert
from kathikon_celery.storage.dialects.sqlite import SQLite
from kathikon_celery.storage.tables import jobs


class PlainDialect(SQLite):
    """Each verb is a SELECT of the rows, locked, and then what writes them by their numbers."""

    # --- publishing

    def upsert(self, connection: Connection, upsert: Upsert, values: Mapping[str, Any]) -> bool:
        if not upsert.key:
            try:
                with connection.begin_nested():
                    _run(connection, insert(upsert.table).values(dict(upsert.values)), values)
            except IntegrityError:
                return False
            return True
        new = _New(upsert)
        key = [column == new[column.name] for column in upsert.key]
        with self.atomic(connection):
            if _run(connection, select(*upsert.key).where(*key).with_for_update(), values).first() is None:
                _run(connection, insert(upsert.table).values(dict(upsert.values)), values)
                return True
            if upsert.changes is None:
                return False
            where = [upsert.where(new)] if upsert.where is not None else []
            changed = update(upsert.table).where(*key, *where).values(dict(upsert.changes(new)))
            return bool(_run(connection, changed, values).rowcount)

    def upsert_many(self, connection: Connection, upsert: Upsert, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self.upsert(connection, upsert, row)

    def publish(
        self, connection: Connection, upsert: Upsert, values: Mapping[str, Any], later: bool, again: bool
    ) -> None:
        self.upsert(connection, upsert, values)
        self._rings = True
        self._rings_all = self._rings_all or later

    # --- claiming and reporting

    def claim(
        self,
        connection: Connection,
        claim: Claim,
        values: Mapping[str, Any],
        waiting: tuple[list[str], int] | None = None,
    ) -> Sequence[Any]:
        with self.atomic(connection):
            if claim.pick is not None:
                return self._picked(connection, claim.change, claim.pick, claim.columns, values, None)
            columns = [_then(claim.change, column) for column in claim.columns]
            found = select(*columns).where(*claim.change.where).with_for_update(skip_locked=True)
            rows: Sequence[Any] = _run(connection, found, values).all()
            _change(connection, claim.change, [row[0] for row in rows], values)
            return rows

    def preparations(self, change: Change, claims: Sequence[Claim]) -> Iterator[Callable[[Connection], None]]:
        yield from ()

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
        with self.atomic(connection):
            numbers = _held(connection, change.table, holds, owned, change, values)
            _tell(connection, change.table, numbers, which)
            _change(connection, change, numbers, values)
        return len(numbers)

    def end_held(
        self,
        connection: Connection,
        change: Change,
        ends: Mapping[Hold, Mapping[str, str | None]],
        *,
        which: list[Changed] | None = None,
    ) -> int:
        number = 0
        with self.atomic(connection):
            for hold, texts in ends.items():
                one = Change(change.table, {**change.values, **texts}, change.where)
                number += self.change_held(connection, one, [hold], {}, which=which)
        self._tells = self._tells or number > 0
        return number

    def delete_held(self, connection: Connection, table: Table, holds: Sequence[Hold]) -> int:
        with self.atomic(connection):
            numbers = _held(connection, table, holds, True, None, {})
            if numbers:
                _run(connection, delete(table).where(table.c.seq.in_(numbers)), {})
        return len(numbers)

    # --- taking rows in passing

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
        with self.atomic(connection):
            rows = self._picked(connection, change, pick, columns, values, which)
        return Taken(len(rows), rows if columns else ())

    def pick_and_delete(
        self,
        connection: Connection,
        pick: Pick,
        columns: tuple[ColumnElement[Any], ...],
        values: Mapping[str, Any],
        *,
        which: list[Changed] | None = None,
    ) -> Taken:
        with self.atomic(connection):
            rows = self._picked(connection, None, pick, columns, values, which)
        return Taken(len(rows), rows if columns else ())

    def _picked(
        self,
        connection: Connection,
        change: Change | None,
        pick: Pick,
        columns: tuple[ColumnElement[Any], ...],
        values: Mapping[str, Any],
        which: list[Changed] | None,
    ) -> list[Any]:
        wanted = [_then(change, column) if change is not None else column for column in columns]
        found: list[Any] = []
        for part in pick.rows:
            left = {**values, "at_most": values["at_most"] - len(found)} if "at_most" in values else values
            rows = part.with_only_columns(*wanted, pick.table.c.seq).with_for_update(skip_locked=True)
            found += _run(connection, rows, left).all()
        numbers = [row[-1] for row in found]
        _tell(connection, pick.table, numbers, which)
        if change is not None:
            _change(connection, change, numbers, values)
        elif numbers:
            _run(connection, delete(pick.table).where(pick.table.c.seq.in_(numbers)), {})
        return [row[:-1] for row in found]

    def change_and_read(
        self, connection: Connection, change: Change, columns: tuple[ColumnElement[Any], ...], values: Mapping[str, Any]
    ) -> Sequence[Any] | None:
        with self.atomic(connection):
            if not _run(connection, change.of(), values).rowcount:
                return None
            row: Sequence[Any] = _run(connection, select(*columns).where(*change.where), values).one()
            return row

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
        with self.atomic(connection):
            if isinstance(change, Upsert):
                rows = [column == change.values[column.name] for column in change.key]
                changed = int(self.upsert(connection, change, values))
                numbers = _run(connection, select(jobs.c.seq).where(*rows), values).scalars().all() if changed else []
            else:
                rows = list(change.where)
                numbers = _run(connection, select(jobs.c.seq).where(*rows).with_for_update(), values).scalars().all()
                _change(connection, change, numbers, values)
            _tell(connection, jobs, numbers, which)
        self._tells = self._tells or bool(numbers)
        return len(numbers)


class _New:
    """The columns of a row that was to be inserted: the very values."""

    def __init__(self, upsert: Upsert) -> None:
        self._values = upsert.values

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        return value if isinstance(value, ColumnElement) else literal(value)


def _run(connection: Connection, statement: Any, values: Mapping[str, Any]) -> Any:
    """Run *statement* with those of *values* that it names."""
    names = statement.compile(dialect=connection.dialect).params
    return connection.execute(statement, {name: value for name, value in values.items() if name in names})


def _then(change: Change, column: ColumnElement[Any]) -> ColumnElement[Any]:
    """What *column* will be by *change*, as an expression of the row before it."""

    def replaced(element: Any, **_: Any) -> Any:
        if not isinstance(element, Column) or element.name not in change.values:
            return None
        value = change.values[element.name]
        return value if isinstance(value, ColumnElement) else literal(value)

    found: ColumnElement[Any] = replacement_traverse(column, {}, replaced)
    return found


def _held(
    connection: Connection,
    table: Table,
    holds: Sequence[Hold],
    owned: bool,
    change: Change | None,
    values: Mapping[str, Any],
) -> list[int]:
    found: list[int] = []
    for hold in sorted(holds):
        where = [table.c[name] == getattr(hold, name) for name in Hold._fields if owned or name != "node_id"]
        rows = select(table.c.seq).where(*where, *(change.where if change is not None else ())).with_for_update()
        found += _run(connection, rows, values).scalars()
    return found


def _change(connection: Connection, change: Change, numbers: Sequence[int], values: Mapping[str, Any]) -> None:
    if numbers:
        written = update(change.table).where(change.table.c.seq.in_(numbers)).values(dict(change.values))
        _run(connection, written, values)


def _tell(connection: Connection, table: Table, numbers: Sequence[int], which: list[Changed] | None) -> None:
    if which is not None and numbers:
        columns = [table.c[name] for name in Changed._fields]
        which += [Changed(*row) for row in connection.execute(select(*columns).where(table.c.seq.in_(numbers)))]
