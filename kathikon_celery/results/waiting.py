"""Waiting for results: all waiting threads of a process share one listening connection, without a thread for it.

One of the waiting threads, the leader, listens and queries for all of them. When the leader has its own results,
another waiting thread becomes the leader. One query asks for all jobs that may be ready.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from math import inf
from random import getrandbits
from time import monotonic, sleep
from typing import Any
from weakref import WeakKeyDictionary

from kathikon_celery.job import Job
from kathikon_celery.storage import result_listeners
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.engine.wakeup import ENDED, OUTCOME, Wakeup
from kathikon_celery.storage.errors import in_words, is_lost
from kathikon_celery.storage.names import key
from kathikon_celery.storage.scan_start import cooldown

logger = logging.getLogger(__name__)

#: Delays (s) of re-checks after entering a wait: an end committed concurrently did not see the wait and sent no NOTIFY.
DOUBTS = (0.002, 0.02, 0.2, 1.0)
#: Batching delay per pending result, and its maximum, in seconds: answer several NOTIFYs with one query.
LINGER, LONGEST_LINGER = 0.0005, 0.1
#: Up to so many pending results there is no batching delay.
FEW = 4
#: Upper bound (seconds) of the delay before re-querying after NOTIFYs that turned out to be for other waiters.
VAIN = 0.008
#: Seconds between two attempts to reach a database that is away.
PAUSE = 0.2
#: Seconds without the database after which waiting raises its error.
GIVE_UP = 30.0
#: Seconds after which a waiting thread checks whether there is a leader.
CHECK = 1.0


class Wait:
    """One caller's wait for the results of some jobs. A context manager; used by one thread at a time.

    Arguments:
        database: where the results are stored.
        ids: the jobs' ids.
        interval: seconds between two queries without a wake-up, at the least.
        news: also take unfinished jobs, each time that they have changed.
    """

    def __init__(self, database: Database, ids: Iterable[str], interval: float, news: bool = False) -> None:
        self.database = database
        self.interval = interval
        self.news = news
        #: Key -> id of each job that is not ready.
        self.open = {key(job_id): job_id for job_id in ids}
        self._keys = list(self.open)
        self._desk: Desk | None = None
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._arrived: list[Job] = []
        self._event = threading.Event()
        self._sleeps = False
        self._is_known = False  # whether the jobs were queried since `_join`
        self._doubts: list[float] = []
        self._looked = 0.0
        self._vain = 0
        self._all_due = 0.0
        self._named: set[str] = set()
        self._named_due = inf

    def __enter__(self) -> Wait:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop waiting."""
        desk, self._desk = self._desk, None
        if desk is not None and desk is _desks.get(self.database):
            desk.leave(self)

    @property
    def is_over(self) -> bool:
        """Whether `take` has returned all results. Another thread may add the last one at any moment."""
        return not self.open and not self._arrived  # in this order: see `deliver`

    def take(self, timeout: float) -> list[Job]:
        """Return the results that have come since the last call. Waits up to *timeout* seconds for the first one.

        Raises the database's error when no query has succeeded by then, or when it has been away for `GIVE_UP` seconds.
        """
        until = monotonic() + timeout
        desk = self._join(until)
        if not self._is_known:
            desk.look([self])
        while True:
            with desk.lock:
                arrived, self._arrived = self._arrived, []
            if arrived or not self.open:
                return arrived
            if monotonic() >= until:
                if desk.loss and not self._is_known:
                    raise self.database.explain(desk.loss)
                return []
            desk.wait(self, until)
            desk = self._join(until)

    def _join(self, until: float) -> Desk:
        """Join, and return, the desk of this process. After a fork that is a new desk."""
        desk = _desk_of(self.database)
        while desk is not self._desk:
            try:
                desk.join(self)
            except Exception as error:
                desk.bear(error)
                if (left := until - monotonic()) <= 0:
                    raise self.database.explain(error) from error
                sleep(min(PAUSE, left))
                continue
            self._desk, self._is_known, self._all_due = desk, False, 0.0
            self._doubts = list(DOUBTS) if self.database.dialect.enters_waits else []
        return desk

    @property
    def due(self) -> float:
        """Monotonic time of the next query."""
        return min(self._all_due, self._named_due)

    def called(self, name: str | None = None) -> None:
        """Note that the job with the key *name* may be ready, or with `None` any job."""
        now = monotonic()
        patience = min(LINGER * len(self.open), LONGEST_LINGER) if len(self.open) > FEW else 0.0
        if self._vain:
            patience = max(patience, min(FEW * LINGER / 8 * 2**self._vain, VAIN))
        if name is None:
            self._all_due = min(self._all_due, max(now, self._looked + patience))
            return
        self._named.add(name)
        if len(self._named) >= len(self.open):
            patience = 0.0
        self._named_due = min(self._named_due, max(now, self._looked + patience))

    def lost(self) -> None:
        """Note that a query has failed: all jobs are due again."""
        self._all_due = 0.0

    def wanted(self, now: float) -> list[str]:
        """Return the keys to query for at the monotonic time *now*."""
        return list(self.open) if self._all_due <= now else [name for name in self._named if name in self.open]

    def looked(self, now: float, took: float) -> None:
        """Note that the query for the `wanted` keys began at *now* and *took* so many seconds."""
        self._vain = 0 if self._arrived or not self._is_known else self._vain + 1
        if self._all_due <= now:
            self._all_due = now + max(self.interval, cooldown(took))
            if self._doubts:
                self._all_due = min(self._all_due, now + took + self._doubts.pop(0))
        self._named, self._named_due = set(), inf
        self._looked, self._is_known = now, True

    def deliver(self, name: str, job: Job) -> bool:
        """Take *job*, as found for the key *name*; return whether its result is ready."""
        job = replace(job, id=self.open[name])
        is_ready = result_listeners.is_ready(job)
        if not is_ready and self.news:
            seen = (job.state, job.status, job.result, job.meta)
            if self._seen.get(name) == seen:
                return False
            self._seen[name] = seen
        self._arrived.append(job)
        if is_ready:  # after the append: a thread that sees no open job must see the arrived one (`is_over`)
            del self.open[name]
            self._seen.pop(name, None)
        self._event.set()
        return is_ready


class Desk:
    """All `Wait`s of this process for results of one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        #: The error of the last query, if the database was away then.
        self.loss: Exception | None = None
        self._lost_since = 0.0
        self._number = getrandbits(62)
        self.lock = threading.RLock()
        self._waits: dict[Wait, None] = {}
        self._by_key: dict[str, list[Wait]] = {}
        self._entered: set[str] = set()
        self._ended: set[str] = set()  # the statement that ended these deleted our entries and notified us
        self._leader: Wait | None = None
        self._wakeup: Wakeup | None = None
        self._next_look = 0.0
        database.on_close.append(self.close)

    def join(self, wait: Wait) -> None:
        """Add *wait*, and listen."""
        with self.lock:
            if self._wakeup is None:
                self._wakeup = self.database.hearing(self._number)
            if not self._waits:
                self.loss = None
            self._waits[wait] = None
            for name in wait.open:
                self._by_key.setdefault(name, []).append(wait)

    def leave(self, wait: Wait) -> None:
        """Remove *wait*, and its entries that no other wait needs."""
        with self.lock:
            self._waits.pop(wait, None)
            for name in wait.open:
                self._forget(name, wait)
            left = [name for name in wait._keys if name in self._entered and name not in self._by_key]
            self._entered.difference_update(left)
            self._ended.difference_update(wait._keys)
        if left:
            with suppress(Exception):  # the database is away: the pruner will delete the entries
                result_listeners.leave(self.database, left, self._number)

    def _forget(self, name: str, wait: Wait) -> None:
        waiting = self._by_key.get(name, [])
        if wait in waiting:
            waiting.remove(wait)
        if not waiting:
            self._by_key.pop(name, None)

    def wait(self, wait: Wait, until: float) -> None:
        """Sleep until a result has come for *wait*, or until the monotonic time *until*; lead if no thread leads."""
        try:
            while not wait._arrived and (left := until - monotonic()) > 0:
                with self.lock:
                    if wait._arrived:
                        return
                    wait._event.clear()
                    leads = self._leader in (None, wait)
                    if leads:
                        self._leader = wait
                    else:
                        wait._sleeps = True
                        if wait.due < self._next_look and self._wakeup is not None:
                            self._wakeup.notify()
                if leads:
                    self._lead(wait, until)
                    return
                wait._event.wait(min(left, CHECK))
                wait._sleeps = False
        finally:
            with self.lock:
                wait._sleeps = False
                if self._leader is wait:
                    self._leader = next((one for one in self._waits if one._sleeps), None)
                    if self._leader is not None:
                        self._leader._event.set()

    def _lead(self, wait: Wait, until: float) -> None:
        """Listen and query for all waits; end as `wait` does."""
        assert self._wakeup is not None
        while not wait._arrived:
            now = monotonic()
            with self.lock:
                due = [one for one in self._waits if one.due <= now]
                self._next_look = min((one.due for one in self._waits), default=until)
            if due and not self.loss:
                self.look(due)
                continue
            if now >= until:
                return
            pause = PAUSE if self.loss else self._next_look - now
            if self._wakeup.wait(min(pause, until - now)):
                self._hear(self._wakeup)
            if self.loss:
                self.look(list(self._waits))

    def _hear(self, wakeup: Wakeup) -> None:
        named, wakeup.named = wakeup.named, []
        with self.lock:
            if wakeup.called_all:  # also after a reconnect: our entries may have been deleted meanwhile
                self._entered.clear()
                for wait in self._waits:
                    wait.called()
            for call in named:
                if call[0] == OUTCOME:
                    job = result_listeners.told(call[1:])
                    self._entered.discard(job.id)
                    if result_listeners.is_ready(job):
                        self._hand_over(job)
                        continue
                    call = ENDED + job.id
                name, is_end = call[1:], call[0] == ENDED
                if is_end:
                    self._entered.discard(name)
                    if name in self._by_key:
                        self._ended.add(name)
                for wait in self._by_key.get(name, ()):
                    if is_end or wait.news:
                        wait.called(name)

    def look(self, these: list[Wait]) -> None:
        """Query for the jobs of *these* waits. A lost database is an error only after `GIVE_UP` seconds."""
        now = monotonic()
        with self.lock:
            wanted = {name: None for wait in these for name in wait.wanted(now)}
            unknown = [name for name in wanted if name not in self._entered and name not in self._ended]
            known = [name for name in wanted if name in self._entered or name in self._ended]
            news = [name for name in wanted if any(wait.news for wait in self._by_key.get(name, ()))]
            self._entered.update(unknown)
            self._ended.difference_update(known)

        def query(again: bool) -> tuple[list[Job], list[str]]:
            found = result_listeners.enter(self.database, unknown, self._number) if unknown else []
            there = [job.id for job in found]  # nothing was entered for them
            found += result_listeners.look(self.database, known) if known else []
            found += result_listeners.look(self.database, news, ready=False) if news else []
            return found, there

        try:
            found, there = self.database.patiently(query, patient=False)  # a pool keeps connections that were lost
        except BaseException as error:
            with self.lock:
                self._entered.difference_update(unknown)
                for wait in these:
                    wait.lost()
            if not isinstance(error, Exception):
                raise
            self.bear(error)
            return
        if self.loss:
            logger.warning("Kathikon: the database %r is back", self.database)
            self.loss = None
        with self.lock:
            self._entered.difference_update(there)
            for job in found:
                self._hand_over(job)
            for wait in these:
                wait.looked(now, monotonic() - now)

    def _hand_over(self, job: Job) -> None:
        """Give *job*, whose id is its key, to all waits for it."""
        for wait in list(self._by_key.get(job.id, ())):
            if job.id in wait.open and wait.deliver(job.id, job):
                self._forget(job.id, wait)

    def bear(self, error: Exception) -> None:
        """Note that the database is away; raise *error* if it is of another kind, or after `GIVE_UP` seconds."""
        if not is_lost(error):
            raise self.database.dialect.explain(error) from error
        now = monotonic()
        if self.loss is None:
            self._lost_since = now
            logger.warning("Kathikon: the database is away, results are waited for: %s", in_words(error))
        self.loss = error
        if now - self._lost_since > GIVE_UP:
            raise self.database.explain(error) from error

    def close(self) -> None:
        """Stop listening, unless there are waits."""
        with self.lock:
            if self._waits:
                return
            wakeup, self._wakeup = self._wakeup, None
            if _desks.get(self.database) is self:
                del _desks[self.database]
        if self.close in self.database.on_close:
            self.database.on_close.remove(self.close)
        if wakeup is not None:
            wakeup.close()


_desks: WeakKeyDictionary[Database, Desk] = WeakKeyDictionary()
_desks_lock = threading.Lock()
#: In a forked process the parent's desks, kept so that nothing closes their connections here.
_parents: list[Desk] = []


def _desk_of(database: Database) -> Desk:
    desk = _desks.get(database)
    if desk is None:
        with _desks_lock:
            desk = _desks.get(database)
            if desk is None:
                desk = _desks[database] = Desk(database)
    return desk


def _after_fork_in_child() -> None:
    global _desks, _desks_lock
    _parents.extend(_desks.values())
    for desk in _parents:
        desk.database.on_close = [one for one in desk.database.on_close if one != desk.close]
    _desks, _desks_lock = WeakKeyDictionary(), threading.Lock()


def close_all() -> None:
    """Close all desks at the end of this process."""
    for desk in list(_desks.values()):
        desk._waits.clear()
        desk.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(close_all)
