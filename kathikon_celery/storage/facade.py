"""The facade: Kathikon's storage verbs, over the backend that the settings choose."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kathikon_celery.job import Job, State
from kathikon_celery.settings import SettingError, Settings, shown
from kathikon_celery.settings.brokers import broker_of, databases_of
from kathikon_celery.storage.backend import StorageBackend
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.promote import CHUNK as PROMOTED_AT_ONCE
from kathikon_celery.storage.prune import CHUNK as PRUNED_AT_ONCE
from kathikon_celery.storage.selecting import Filter

if TYPE_CHECKING:
    from celery import Celery

_storages: dict[tuple[object, ...], Storage] = {}
#: The databases of those storages. Apps with different settings share the connections to one database.
_databases: dict[tuple[object, ...], Database] = {}


class Storage:
    """All jobs of one database.

    >>> storage = Storage("sqlite:///jobs.db")
    >>> storage.setup()
    >>> storage.insert(Job(id="1", task="proj.add", priority=5))
    >>> [job.id for job in storage.claim("default", limit=10)]
    ['1']

    Arguments:
        url: SQLAlchemy URL of the database (default: the setting ``kathikon_database_url``).
        settings: default: those of the environment and pyproject.toml.
        backend: used instead of the one that ``kathikon_storage_backend`` names.
        database: used instead of one at *url*.

    Raises `SettingError` for a wrong setting. Each method raises `Unavailable` if the database cannot be reached.

    Arguments of the methods:
        job: a job, new or as it was read.
        jobs: the same, many.
        job_id: the id of a job.
        ids: one id, or several.
        queue: the name of a queue.
        state: one of the states; `None`: any.
        node_id: the number of the process that claims; `None`: the caller, which is no worker.
    """

    def __init__(
        self,
        url: str | None = None,
        settings: Settings | None = None,
        backend: StorageBackend | None = None,
        database: Database | None = None,
    ) -> None:
        self.settings = settings or Settings.load()
        self.database = database or _database_of([url] if url else (), self.settings)
        if backend is None:
            backend = _backend_class(self.settings.storage_backend)(self.database)
        self.backend: StorageBackend = backend
        self._is_set_up = False
        #: Whether nothing names a database, so that the jobs are in a file of the working directory.
        self.is_on_default_file = False
        self.database.on_replaced.append(self._replaced)

    def _replaced(self) -> None:
        self._is_set_up = False

    def __repr__(self) -> str:
        return f"<Storage {shown(self.database.url)}>"

    @classmethod
    def shared(cls, urls: Sequence[str], settings: Settings, connect_timeout: float | None = None) -> Storage:
        """Return this process's storage for *settings*, on the database of *urls* (if empty: of *settings*).

        Of several *urls*, the first server that can be written to is used. *connect_timeout* (seconds) counts only in
        the first call for a database.
        """
        if settings.in_tests:
            urls = [_ram_url()]
        name = (*urls, settings, *sorted(settings.sources))
        storage = _storages.get(name)
        if storage is None:
            place = (*(urls or [settings.database_url]), settings.in_ram and not urls)
            place += tuple(_options_of(settings).values())
            database = _databases.get(place)
            if database is None:
                database = _databases.setdefault(place, _database_of(urls, settings))
                database.connect_timeout = connect_timeout or database.connect_timeout
            storage = _storages.setdefault(name, cls(settings=settings, database=database))
            storage.is_on_default_file = not (urls or settings.in_ram or "database_url" in settings.sources)
        return storage

    @classmethod
    def for_app(cls, app: Celery, setup: bool = True) -> Storage:
        """Return the storage of the producers and workers of *app*. *setup*: create or upgrade its tables.

        >>> Storage.for_app(app).counts()
        {('default', 'available'): 3, ('default', 'dead'): 1}
        """
        settings = Settings.load(app.conf)
        urls = databases_of(broker_of(app.conf))
        storage = cls.shared(urls, settings, app.conf.broker_connection_timeout)
        if setup:
            storage.setup()
        return storage

    def on(self, database: Database) -> Storage:
        """Return this storage on *database*, which is a transaction on the same tables."""
        storage = Storage(settings=self.settings, database=database, backend=type(self.backend)(database))
        storage._is_set_up = True
        return storage

    def setup(self) -> None:
        """Create or upgrade the tables; cheap if that was done before. Raises `SchemaError` for newer tables."""
        if not self._is_set_up:
            self.backend.setup()
            self._is_set_up = True

    def insert(self, job: Job) -> None:
        """Publish *job*. It is committed, and on disk if the settings say so, when this returns.

        If the id is known, its row waits again and keeps its errors. The same object again is a repetition, as after a
        lost connection, and changes nothing; a job that was read by `fetch` is another publication.
        """
        self.backend.insert(job)

    def insert_many(self, jobs: Sequence[Job]) -> None:
        """Publish many jobs, ``kathikon_insert_many_chunk_size`` of them in each transaction.

        >>> storage.insert_many([Job(id=str(uuid4()), task="proj.add", body=body) for body in bodies])
        """
        size = self.settings.insert_many_chunk_size
        for start in range(0, len(jobs), size):
            self.backend.insert_many(jobs[start : start + size])

    def update(self, job: Job) -> None:
        """Write *job* back, and update *job*: with a new state, times and fence change.

        Raises `TransitionError` if the stored state may not change to the job's, `MovedOn` if the job was claimed,
        given back or published since it was read, `NotFound`.

        >>> job = storage.fetch(job_id)
        >>> job.priority = 9
        >>> storage.update(job)
        """
        self.backend.update(job)

    def fetch(self, job_id: str) -> Job | None:
        """Return the job with that id, or `None`."""
        return self.backend.fetch(job_id)

    def claim(self, queue: str, limit: int = 1, node_id: int | None = None) -> list[Job]:
        """Claim up to *limit* ready jobs, higher priority first; no other caller gets them."""
        return self.backend.claim(queue, limit, node_id)

    def promote_scheduled(self, limit: int = PROMOTED_AT_ONCE) -> int:
        """Make up to *limit* due jobs ready, in one transaction; return their number."""
        return self.backend.promote_scheduled(limit)

    def next_due(self) -> float | None:
        """Return the seconds until the next job is due (negative: overdue), or `None` if no job has a due time."""
        return self.backend.next_due()

    def next_offer(self) -> float | None:
        """Return the seconds until jobs may leave the lines of limits (negative: overdue); `None`: no job waits there.

        While any waits, that is at most a second: for a `sweep`.
        """
        return self.backend.next_offer()

    def offer_due(self) -> int:
        """Let jobs out of the lines of limits whose rate has a token again; return their number."""
        return self.backend.offer_due()

    def sweep(self, after: str = "") -> str:
        """Let jobs out of the next lines behind the one called *after*; return the last line, empty at the end.

        This finds room that a lost process has left unnoticed.
        """
        return self.backend.sweep(after)

    def discard_expired(self) -> int:
        """Discard jobs that expired while they waited; return their number."""
        return self.backend.discard_expired()

    def prunable_jobs(
        self, limit: int = PRUNED_AT_ONCE, retention: Mapping[State, float | None] | None = None
    ) -> list[str]:
        """Return ids of up to *limit* jobs that ended longer ago than their state's retention.

        *retention*: state -> seconds, or `None` for ever; default: that of the settings.
        """
        return self.backend.prunable_jobs(self._retention() if retention is None else retention, limit)

    def prune(self, limit: int = PRUNED_AT_ONCE) -> int:
        """Delete up to *limit* jobs that ended longer ago than their state's retention; return their number.

        Unlike `delete` of `prunable_jobs`, this keeps a job that is published again in between.
        """
        return self.backend.prune(self._retention(), limit)

    def prune_limits(self) -> bool:
        """Delete what nothing needs of limits: slots of runs that are over, idle keys; return whether keys are left."""
        return self.backend.prune_limits()

    def _retention(self) -> dict[State, float | None]:
        return {State(state): age for state, age in self.settings.retention_period.items()}

    def delete(self, ids: str | Sequence[str]) -> int:
        """Delete jobs by id; return their number."""
        return self.backend.delete([ids] if isinstance(ids, str) else ids)

    def all(self, queue: str | None = None, state: State | None = None) -> list[Job]:
        """Return all jobs, oldest first, or those of one queue or state.

        >>> [job.task for job in storage.all(state=State.DEAD)]
        ['proj.mail.send']
        """
        return self.backend.all(queue, state)

    def page(self, chosen: Filter, limit: int = 50, after: Job | None = None) -> list[Job]:
        """Return up to *limit* jobs that fit *chosen*, from the one behind *after* on, without bodies and results.

        The jobs come state by state, those of a state in the order of an index: see `selecting.page`.
        """
        return self.backend.page(chosen, limit, after)

    def count(self, chosen: Filter, at_most: int | None = None) -> int:
        """Return the number of jobs that fit *chosen*. The database reads them all, or stops at *at_most*."""
        return self.backend.count(chosen, at_most)

    def workflow(self, job_id: str) -> list[Job]:
        """Return all jobs of one workflow, oldest first. *job_id*: the id of one of them, or of their group or chord.

        The jobs of a workflow have one root: the job that was sent from outside of any task. In a group that was sent
        from outside, each member is a root: give the id of the group, ``result.id``, or ``result.parent.id`` of a
        chord's result.
        """
        return self.backend.workflow(job_id)

    def counts(self) -> dict[tuple[str, str], int]:
        """Return the number of jobs by queue and state."""
        return self.backend.counts()

    def clear_jobs(self) -> None:
        """Delete all jobs. For tests, not for production."""
        self.backend.clear_jobs()

    def reset(self) -> None:
        """Delete everything but the schema. For tests, not for production."""
        self.backend.reset()

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self.backend.close()


def _database_of(urls: Sequence[str], settings: Settings) -> Database:
    """Return the database of *urls* (if empty: of *settings*)."""
    first, *alternates = urls or [_ram_url() if settings.in_ram else settings.database_url]
    return Database(
        first,
        silence=settings.lease / 2,
        alternates=alternates,
        **_options_of(settings),
    )


def _options_of(settings: Settings) -> dict[str, Any]:
    """Return the settings that are arguments of a `Database`."""
    names = ("publish_durability", "worker_durability", "schema", "wake", "pool_size")
    return {name: getattr(settings, name) for name in names}


def _backend_class(path: str) -> type[StorageBackend]:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingError(f"kathikon_storage_backend = {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, StorageBackend)):
        raise SettingError(
            f"kathikon_storage_backend = {path!r} is no class but {found!r}"
            if not isinstance(found, type)
            else f"kathikon_storage_backend = {path!r} is no subclass of kathikon_celery.storage.sql:SQLBackend"
        )
    if missing := getattr(found, "__abstractmethods__", ()):
        raise SettingError(f"kathikon_storage_backend = {path!r} has no {', '.join(sorted(missing))}")
    return found


@cache
def _ram_url() -> str:
    """Return the URL of a database file, in /dev/shm if possible. This process deletes the file when it ends."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    folder, maker = tempfile.mkdtemp(prefix="kathikon-", dir=memory if usable else None), os.getpid()

    def remove() -> None:
        if os.getpid() == maker:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return f"sqlite:///{folder}/kathikon.db"
