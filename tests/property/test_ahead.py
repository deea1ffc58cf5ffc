"""Any sequence of what the pool, its processes and the intake do with the second job in a pipe."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from threading import Semaphore

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kathikon_celery.worker.prefork.ahead import Ahead

processes = st.integers(0, 1)


@dataclass(eq=False)
class Job:
    _write_to: Process | None = None
    started: int = 0
    is_ours: bool = False


@dataclass
class Process:
    """What `Worker` does, step by step: `pipe` is what was written to it, `said` what the pool has not read."""

    inqW_fd: int  # noqa: N815 - billiard's name
    permits: Semaphore = field(default_factory=lambda: Semaphore(0))
    pipe: deque[Job] = field(default_factory=deque)
    said: deque[str] = field(default_factory=deque)
    runs: Job | None = None

    def step(self) -> None:
        if self.runs is not None:
            self.runs = None
            self.said.append("ended")
        elif self.pipe:
            job = self.pipe.popleft()
            if self.permits.acquire(blocking=False):
                job.started += 1
                self.runs = job
            else:
                self.said.append("skipped")


class Pool(RuleBasedStateMachine):
    """`busy` is what the pool believes, which hears of everything later."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: deque[Job] = deque()
        self.ahead = Ahead(self.waiting)
        self.processes = [Process(3), Process(4)]
        self.busy: set[int] = set()
        self.places = 4
        self.jobs: list[Job] = []

    def write(self, process: Process, behind: bool) -> None:
        job = self.waiting[0]

        def write(pipe: int) -> None:
            assert pipe == process.inqW_fd
            assert self.waiting.popleft() is job
            process.pipe.append(job)
            job._write_to = process
            self.busy.add(pipe)

        self.ahead.send(process, job, behind, write)
        assert job._write_to is process

    @rule()
    def give(self) -> None:
        if self.places:
            self.places -= 1
            self.jobs.append(Job())
            self.waiting.append(self.jobs[-1])

    @rule(number=processes)
    def send(self, number: int) -> None:
        if not self.waiting:
            return
        process = self.processes[number]
        pipe = process.inqW_fd
        if pipe not in self.busy:
            if not self.ahead.has_rest(pipe):
                self.write(process, behind=False)
        elif not self.ahead.is_full(pipe):
            self.write(process, behind=True)

    @rule(number=processes)
    def process_goes_on(self, number: int) -> None:
        self.processes[number].step()

    @rule(number=processes)
    def pool_hears(self, number: int) -> None:
        process = self.processes[number]
        self.places += self.ahead.places()
        if not process.said:
            return
        if process.said.popleft() == "skipped":
            self.ahead.skipped(process.inqW_fd)
            self.busy.discard(process.inqW_fd)
        else:
            self.places += 1
            if self.ahead.ended(process.inqW_fd):
                self.busy.discard(process.inqW_fd)

    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        if self.jobs:
            job = data.draw(st.sampled_from(self.jobs[-4:]))
            job.is_ours |= self.ahead.take_back(job)

    @invariant()
    def each_job_is_somebodys(self) -> None:
        for job in self.jobs:
            assert job.started + job.is_ours <= 1
        for process in self.processes:
            waits = [job for job in process.pipe if not job.is_ours]
            assert process.permits._value == len(waits)  # type: ignore[attr-defined]
            assert len(process.pipe) + (process.runs is not None) <= 2

    def teardown(self) -> None:
        """Nothing is stuck: when all have gone on, each job was begun or taken back, and both processes are free."""
        for number in [0, 1] * 12:
            self.send(number)
            self.process_goes_on(number)
            self.pool_hears(number)
        assert all(job.started + job.is_ours == 1 for job in self.jobs)
        assert (self.busy, bool(self.ahead), self.places) == (set(), False, 4)
        assert not any(self.ahead.has_rest(process.inqW_fd) for process in self.processes)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=max(settings.default.max_examples, 300))
