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
from typing import TYPE_CHECKING

from kathikon_celery.job import Job, State
from kathikon_celery.settings import SettingError, Settings, shown
from kathikon_celery.settings.brokers import broker_of, databases_of
from kathikon_celery.storage.backend import StorageBackend
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.storage.promote import CHUNK as PROMOTED_AT_ONCE
from kathikon_celery.storage.prune import CHUNK as PRUNED_AT_ONCE

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
        settings: default: what environment and pyproject.toml say.
        backend: used instead of the one that ``kathikon_storage_backend`` names.
        database: used instead of one at *url*.
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
        self.database.on_replaced.append(self._replaced)

    def _replaced(self) -> None:
        self._is_set_up = False

    def __repr__(self) -> str:
        return f"<Storage {shown(self.database.url)}>"

    @classmethod
    def shared(cls, urls: Sequence[str], settings: Settings, connect_timeout: float | None = None) -> Storage:
        """The storage of this process for these settings, and for the database that *urls*, or else they, name.

        Of several *urls*, the first server that can be written to is used. The first call for a database decides
        about the *connect_timeout* (seconds).
        """
        name = (*urls, settings, *sorted(settings.sources))
        storage = _storages.get(name)
        if storage is None:
            place = (*(urls or [settings.database_url]), settings.in_ram and not urls)
            place += (settings.publish_durability, settings.worker_durability)
            database = _databases.get(place)
            if database is None:
                database = _databases.setdefault(place, _database_of(urls, settings))
                database.connect_timeout = connect_timeout or database.connect_timeout
            storage = _storages.setdefault(name, cls(settings=settings, database=database))
        return storage

    @classmethod
    def for_app(cls, app: Celery, setup: bool = True) -> Storage:
        """The storage that an app's producers and workers use; its tables made, if *setup*."""
        settings = Settings.load(app.conf)
        urls = databases_of(broker_of(app.conf))
        storage = cls.shared(urls, settings, app.conf.broker_connection_timeout)
        if setup:
            storage.setup()
        return storage

    def setup(self) -> None:
        """Make or upgrade the tables; cheap when that was done before. Raises `SchemaError` for newer tables."""
        if not self._is_set_up:
            self.backend.setup()
            self._is_set_up = True

    def insert(self, job: Job) -> None:
        """Publish *job*; committed, and on disk if the settings say so, when this returns.

        An id that is known waits again with its errors kept; one that still waits stays one row.
        """
        self.backend.insert(job)

    def insert_many(self, jobs: Sequence[Job]) -> None:
        """Publish many jobs, ``kathikon_insert_many_chunk_size`` of them a transaction."""
        size = self.settings.insert_many_chunk_size
        for start in range(0, len(jobs), size):
            self.backend.insert_many(jobs[start : start + size])

    def update(self, job: Job) -> None:
        """Write *job* back, and to it what its new state brings with it: times, and the fence.

        Raises `TransitionError` when its state may not follow the stored one, `MovedOn` when somebody claimed it, gave
        it back or published it since it was read, `NotFound`.
        """
        self.backend.update(job)

    def fetch(self, job_id: str) -> Job | None:
        """The job of that id, or `None`."""
        return self.backend.fetch(job_id)

    def claim(self, queue: str, limit: int = 1, node_id: int | None = None) -> list[Job]:
        """Take up to *limit* ready jobs, higher priority first; nobody else gets them."""
        return self.backend.claim(queue, limit, node_id)

    def promote_scheduled(self, limit: int = PROMOTED_AT_ONCE) -> int:
        """Make up to *limit* due jobs available, all together; the number of them."""
        return self.backend.promote_scheduled(limit)

    def next_due(self) -> float | None:
        """Seconds until the next job is due (negative: overdue), or `None` when none waits for a time."""
        return self.backend.next_due()

    def discard_expired(self) -> int:
        """Discard jobs that expired while they waited; the number of them."""
        return self.backend.discard_expired()

    def prunable_jobs(
        self, limit: int = PRUNED_AT_ONCE, retention: Mapping[State, float | None] | None = None
    ) -> list[str]:
        """Ids of up to *limit* jobs that ended longer ago than their state's retention."""
        return self.backend.prunable_jobs(self._retention() if retention is None else retention, limit)

    def prune(self, limit: int = PRUNED_AT_ONCE) -> int:
        """Delete up to *limit* jobs that ended longer ago than their state's retention; the number of them.

        Unlike `delete` of `prunable_jobs`, it leaves a job alone that is published again in between.
        """
        return self.backend.prune(self._retention(), limit)

    def _retention(self) -> dict[State, float | None]:
        return {State(state): age for state, age in self.settings.retention_period.items()}

    def delete(self, ids: str | Sequence[str]) -> int:
        """Delete jobs by id; the number of them."""
        return self.backend.delete([ids] if isinstance(ids, str) else ids)

    def all(self, queue: str | None = None, state: State | None = None) -> list[Job]:
        """All jobs, oldest first, or those of one queue or state."""
        return self.backend.all(queue, state)

    def workflow(self, job_id: str) -> list[Job]:
        """All jobs of one workflow, oldest first: *job_id* is that of any of them, or of a group or chord of them.

        A workflow is what has the same root, the job that was sent from outside. The members of a group that was sent
        from outside have a root each: give the group's own id for them, ``result.id``, or ``result.parent.id`` for the
        result of a chord.
        """
        return self.backend.workflow(job_id)

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of jobs by queue and state."""
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
    """The database that *urls*, or else the settings, name."""
    first, *alternates = urls or [_ram_url() if settings.in_ram else settings.database_url]
    return Database(
        first,
        publish_durability=settings.publish_durability,
        worker_durability=settings.worker_durability,
        alternates=alternates,
    )


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
    """A database that lives in memory, as long as this process."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    folder, maker = tempfile.mkdtemp(prefix="kathikon-", dir=memory if usable else None), os.getpid()

    def remove() -> None:
        if os.getpid() == maker:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return f"sqlite:///{folder}/kathikon.db"
