"""What happened to every job, written by the processes that saw it and read by the scenario.

A record is one appended write of 24 bytes: it needs no lock, costs a microsecond or two, and outlives a ``kill -9``.
Times are seconds of the system-wide monotonic clock, so they compare across processes.
"""

import os
import struct
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

RECORD = struct.Struct("<diiii")


class Event(IntEnum):
    """What a record says of a job, or of a worker."""

    SENT = 0  #: ``delay()`` returned; the time is that of the call
    REFUSED = 1  #: ``delay()`` raised
    STARTED = 2
    ENDED = 3
    READY = 4  #: a worker accepts jobs
    WRONG = 5  #: the body of a chord was given something else than its parts have returned


@dataclass
class Attempt:
    """One start of a job, and its end unless something cut it short."""

    worker: int
    pid: int
    started: float
    ended: float | None = None


class Writer:
    """Appends records to the journal file; safe to share with forked children."""

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: Event, job: int = -1, worker: int = -1, at: float | None = None) -> None:
        """Record that `event` happened to `job` in `worker`, now or `at` the time given."""
        os.write(self._file, RECORD.pack(time.monotonic() if at is None else at, event, job, worker, os.getpid()))


class Journal:
    """The records read so far, by job; `read` adds what was written since."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("rb")
        self._rest = b""
        self.records = 0
        self.sent: dict[int, float] = {}
        self.refused: set[int] = set()
        self.attempts: defaultdict[int, list[Attempt]] = defaultdict(list)
        self.ended: dict[int, float] = {}
        self.ready: set[int] = set()
        self.wrong: set[int] = set()

    def read(self) -> None:
        """Take in the records appended since the last call; one that is only half visible waits for the next."""
        data = self._rest + self._file.read()
        whole = len(data) - len(data) % RECORD.size
        self._rest = data[whole:]
        for at, event, job, worker, pid in RECORD.iter_unpack(data[:whole]):
            self.records += 1
            if event == Event.SENT:
                self.sent[job] = at
            elif event == Event.REFUSED:
                self.refused.add(job)
            elif event == Event.STARTED:
                self.attempts[job].append(Attempt(worker, pid, at))
            elif event == Event.ENDED:
                running = next(a for a in reversed(self.attempts[job]) if a.pid == pid and a.ended is None)
                running.ended = self.ended[job] = at
            elif event == Event.WRONG:
                self.wrong.add(job)
            else:
                self.ready.add(worker)

    def started(self, jobs: Iterable[int]) -> list[int]:
        """Those of the jobs that have been started."""
        return [job for job in jobs if job in self.attempts]

    def unfinished(self) -> set[int]:
        """Jobs whose ``delay()`` returned and that never ran to their end."""
        return self.sent.keys() - self.ended.keys()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
