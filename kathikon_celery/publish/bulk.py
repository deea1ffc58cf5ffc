"""Many tasks in few transactions: what is sent within a block is collected, and written in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kathikon_celery.job import Job
from kathikon_celery.publish import outbox
from kathikon_celery.storage import Storage


class Chunks:
    """What was sent within a block and is not written yet: by storage, and there by the jobs' ids."""

    def __init__(self) -> None:
        self._jobs: dict[Storage, dict[str, Job]] = {}

    def add(self, storage: Storage, job: Job) -> None:
        """Write *job* with the next chunk, which is at once if it makes that chunk full."""
        chunk = self._jobs.setdefault(storage, {})
        chunk[job.id] = job  # an error makes kombu send it again
        if len(chunk) >= storage.settings.insert_many_chunk_size:
            self._write(storage)

    def close(self) -> None:
        """Write what is left."""
        for storage in list(self._jobs):
            self._write(storage)

    def _write(self, storage: Storage) -> None:
        chunk = self._jobs[storage]
        if chunk:
            storage.insert_many(list(chunk.values()))
            self._jobs[storage] = {}


@contextmanager
def bulk() -> Iterator[None]:
    """Send the tasks of a block together: ``kathikon_insert_many_chunk_size`` of them a transaction.

    >>> with bulk():
    ...     for user in users:
    ...         welcome.delay(user)

    A task that was sent within the block is on disk when its chunk is full, and at the latest when the block is left,
    even if by an error. It may run before that. What other threads send, or goes to other brokers, is sent at once.

    Raises:
        the database's error, from the call that made a chunk full or from the end of the block: none of that chunk
        was sent. An error at the end of the block says so of all that was not.
    """
    if outbox.scope().chunks is not None:  # within another one, which writes it all
        yield
        return
    chunks = Chunks()
    try:
        with outbox.within(chunks=chunks):
            yield
    finally:
        chunks.close()
