"""Many tasks in few transactions: the tasks that are sent within a block are collected, and written in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kathikon_celery.job import Job
from kathikon_celery.publish import callers, outbox
from kathikon_celery.storage import Storage


class Chunks:
    """The jobs that were sent within a block and are not written yet."""

    def __init__(self) -> None:
        caller = callers.current()
        #: Where the block began: what is sent in a transaction that was opened within it is not collected.
        self.place = caller and caller.place
        self._jobs: dict[Storage, dict[str, Job]] = {}

    def add(self, storage: Storage, job: Job) -> None:
        """Add *job* to the chunk; write the chunk when it is full. Raises the database's error."""
        chunk = self._jobs.setdefault(storage, {})
        chunk[job.id] = job  # by id, since kombu sends it again after an error
        if len(chunk) >= storage.settings.insert_many_chunk_size:
            self._write(storage)

    def close(self) -> None:
        """Write the chunks that are left. Raises the database's error."""
        for storage in list(self._jobs):
            self._write(storage)

    def _write(self, storage: Storage) -> None:
        chunk = self._jobs[storage]
        if chunk:
            callers.write(storage, lambda there: there.insert_many(list(chunk.values())), chunk)
            self._jobs[storage] = {}


@contextmanager
def bulk() -> Iterator[None]:
    """Send the tasks of a block together, ``kathikon_insert_many_chunk_size`` of them in a transaction.

    >>> with bulk():
    ...     for user in users:
    ...         welcome.delay(user)

    A task is on disk when its chunk is full, and at the latest when the block is left, even by an error. It may run
    before the block is left. Tasks of other threads, and tasks for other brokers, are sent at once.

    Raises the database's error, from the call that made a chunk full or from the end of the block: no task of that
    chunk was sent. After an error at the end of the block, no task that was still collected was sent.
    """
    if outbox.scope().chunks is not None:  # within another block, which writes all tasks
        yield
        return
    chunks = Chunks()
    try:
        with outbox.within(chunks=chunks):
            yield
    finally:
        chunks.close()
