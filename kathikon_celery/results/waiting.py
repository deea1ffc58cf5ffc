"""One caller's wait for results."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic, sleep

from kathikon_celery.job import Job
from kathikon_celery.results.desk import PAUSE, Desk, desk_of
from kathikon_celery.results.wanted import Wanted
from kathikon_celery.storage.engine.database import Database


class Wait(Wanted):
    """One caller's wait for the results of some jobs. A context manager; used by one thread at a time.

    Arguments:
        database: where the results are stored.
        ids, interval, news: see `Wanted`.
    """

    def __init__(self, database: Database, ids: Iterable[str], interval: float, news: bool = False) -> None:
        super().__init__(ids, interval, news)
        self.database = database
        self._desk: Desk | None = None

    def __enter__(self) -> Wait:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop waiting."""
        desk, self._desk = self._desk, None
        if desk is not None and desk.is_open:
            desk.leave(self)

    @property
    def is_over(self) -> bool:
        """Whether `take` has returned all results. Another thread may add the last one at any moment."""
        return not self.open and not self.arrived  # in this order: see `deliver`

    @property
    def loss(self) -> Exception | None:
        """The database's error, if no query has succeeded yet."""
        loss = None if self.is_known else desk_of(self.database).loss
        return loss and self.database.explain(loss)

    def take(self, timeout: float) -> list[Job]:
        """Return the results that have come since the last call. Waits up to *timeout* seconds for the first one.

        Raises the database's error when the database has been away for `GIVE_UP` seconds.
        """
        until = monotonic() + timeout
        while True:
            desk = self._join(until)
            if desk is None:
                return []
            if not self.is_known:
                desk.look([self])
            with desk.lock:
                arrived, self.arrived = self.arrived, []
            if arrived or not self.open or monotonic() >= until:
                return arrived
            desk.wait(self, until)

    def _join(self, until: float) -> Desk | None:
        """Join, and return, the desk of this process; `None` if the database is away until then."""
        desk = desk_of(self.database)
        while desk is not self._desk:
            try:
                desk.join(self)
            except Exception as error:
                desk.bear(error)
                if (left := until - monotonic()) <= 0:
                    return None
                sleep(min(PAUSE, left))
                continue
            self._desk = desk
            dialect = self.database.dialect
            self.begin(in_doubt=dialect.enters_waits or bool(dialect.shares_sessions))
        return desk
