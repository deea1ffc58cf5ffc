"""All waiting threads of a process share one listening connection, without a thread for it.

One of the waiting threads, the leader, listens and queries for all of them. When the leader has its own results,
another waiting thread becomes the leader. One query asks for all jobs that may be ready.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from contextlib import suppress
from random import getrandbits
from time import monotonic
from weakref import WeakKeyDictionary

from kathikon_celery.job import Job
from kathikon_celery.results.wanted import Wanted
from kathikon_celery.storage import result_listeners
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.engine.wakeup import ENDED, OUTCOME, Wakeup
from kathikon_celery.storage.errors import in_words, is_lost

logger = logging.getLogger(__name__)

#: Seconds between two attempts to reach a database that is away.
PAUSE = 0.2
#: Seconds without the database after which waiting raises its error.
GIVE_UP = 30.0
#: Seconds after which a waiting thread checks whether there is a leader.
CHECK = 1.0


class Desk:
    """All waits of this process for results of one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        #: The error of the last query, if the database was away then.
        self.loss: Exception | None = None
        self._lost_since = 0.0
        self._number = getrandbits(62)
        self.lock = threading.RLock()
        self._waits: dict[Wanted, None] = {}
        self._by_key: dict[str, list[Wanted]] = {}
        self._entered: set[str] = set()
        self._ended: set[str] = set()  # the statement that ended these deleted our entries and notified us
        self._leader: Wanted | None = None
        self._wakeup: Wakeup | None = None
        self._next_look = 0.0
        database.on_close.append(self.close)

    def join(self, wait: Wanted) -> None:
        """Add *wait*, and listen."""
        with self.lock:
            if self._wakeup is None:
                self._wakeup = self.database.hearing(self._number)
            if not self._waits:
                self.loss = None
            self._waits[wait] = None
            for name in wait.open:
                self._by_key.setdefault(name, []).append(wait)

    def leave(self, wait: Wanted) -> None:
        """Remove *wait*, and its entries that no other wait needs."""
        with self.lock:
            self._waits.pop(wait, None)
            for name in wait.open:
                self._forget(name, wait)
            left = [name for name in wait.keys if name in self._entered and name not in self._by_key]
            self._entered.difference_update(left)
            self._ended.difference_update(wait.keys)
        if left:
            with suppress(Exception):  # the database is away: the pruner will delete the entries
                result_listeners.leave(self.database, left, self._number)

    def _forget(self, name: str, wait: Wanted) -> None:
        waiting = self._by_key.get(name, [])
        if wait in waiting:
            waiting.remove(wait)
        if not waiting:
            self._by_key.pop(name, None)

    def wait(self, wait: Wanted, until: float) -> None:
        """Sleep until a result has come for *wait*, or until the monotonic time *until*; lead if no thread leads."""
        try:
            while not wait.arrived and (left := until - monotonic()) > 0:
                with self.lock:
                    if wait.arrived:
                        return
                    wait.event.clear()
                    leads = self._leader in (None, wait)
                    if leads:
                        self._leader = wait
                    else:
                        wait.sleeps = True
                        if wait.due < self._next_look and self._wakeup is not None:
                            self._wakeup.notify()
                if leads:
                    self._lead(wait, until)
                    return
                wait.event.wait(min(left, CHECK))
                wait.sleeps = False
        finally:
            with self.lock:
                wait.sleeps = False
                if self._leader is wait:
                    self._leader = next((one for one in self._waits if one.sleeps), None)
                    if self._leader is not None:
                        self._leader.event.set()

    def _lead(self, wait: Wanted, until: float) -> None:
        """Listen and query for all waits; end as `wait` does."""
        assert self._wakeup is not None
        while not wait.arrived:
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

    def look(self, these: list[Wanted]) -> None:
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

    @property
    def is_open(self) -> bool:
        """Whether this is the desk of this process: not closed, and not that of a parent process."""
        return _desks.get(self.database) is self

    def close(self) -> None:
        """Stop listening, unless there are waits."""
        with self.lock:
            if self._waits:
                return
            wakeup, self._wakeup = self._wakeup, None
            if self.is_open:
                del _desks[self.database]
        if self.close in self.database.on_close:
            self.database.on_close.remove(self.close)
        if wakeup is not None:
            wakeup.close()


_desks: WeakKeyDictionary[Database, Desk] = WeakKeyDictionary()
_desks_lock = threading.Lock()
#: In a forked process the parent's desks, kept so that nothing closes their connections here.
_parents: list[Desk] = []


def desk_of(database: Database) -> Desk:
    """Return the desk of this process for *database*. After a fork that is a new desk."""
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
