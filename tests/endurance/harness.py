"""What the scenarios share: a run with its workers, producers and journal, its figures, and the command line."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import psutil
from kombu.utils.url import maybe_sanitize_url

from tests.endurance.journal import Journal
from tests.support.postgresql import PostgreSQLServer
from tests.support.workers import ROOT, WorkerProcess

if TYPE_CHECKING:
    from kathikon_celery.job import Job
    from kathikon_celery.storage import Storage

APP = "tests.endurance.app"

#: The end of a job that came so many seconds before a kill or an outage may not have reached the broker.
ACK_WINDOW = 1.0

Figures = dict[str, Any]
T = TypeVar("T")


class Disturbance(NamedTuple):
    """A time in which the scenario did harm, to one worker or (None) to all."""

    begin: float
    end: float
    worker: int | None


class Worker(WorkerProcess):
    """A worker that the scenario knows by its number."""

    index = -1

    def memory(self) -> float:
        """Resident memory of the main process, in MB."""
        return round(psutil.Process(self.pid).memory_info().rss / 1e6, 1)


class Run:
    """One run against one broker, in a scratch folder that is removed at its end.

    broker    Celery broker URL; {dir} in it stands for the scratch folder, {database} for the SQLAlchemy URL of a
              PostgreSQL server that is started for this run
    backend   Celery result backend URL
    config    module for config_from_object; a broker of ours has kathikon_celery.config by default
    conf      JSON object of further Celery settings
    patience  seconds in which nothing at all happens before the run gives up waiting

    As a context manager it begins with empty queues and leaves no process behind.
    """

    def __init__(
        self, broker: str, *, backend: str = "", config: str = "", conf: str = "{}", patience: float = 30.0
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="endurance-"))
        self._database = PostgreSQLServer() if "{database}" in broker else None
        if self._database:
            broker = broker.replace("{database}", self._database.url)
        self.broker = broker.replace("{dir}", str(self.directory))
        self.ours = broker.startswith("kathikon")
        self.patience = patience
        self.environ = {
            "ENDURANCE_BROKER": self.broker,
            "ENDURANCE_BACKEND": backend.replace("{dir}", str(self.directory)),
            "ENDURANCE_CONFIG": config or ("kathikon_celery.config" if self.ours else ""),
            "ENDURANCE_CONF": conf,
            "ENDURANCE_JOURNAL": str(self.directory / "journal"),
        }
        self.journal = Journal(self.directory / "journal")
        self.workers: list[Worker] = []
        self.disturbances: list[Disturbance] = []
        self._cleanup = ExitStack()
        self._jobs = 0

    def __enter__(self) -> Run:
        with self._cleanup as cleanup:
            cleanup.callback(shutil.rmtree, self.directory)
            cleanup.callback(self.journal.close)
            if self._database:
                cleanup.enter_context(self._database)
            self.purge()
            if not self._database:
                cleanup.callback(self.purge)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._cleanup.close()

    @property
    def database(self) -> PostgreSQLServer:
        """The server that was started for this run; ValueError if there is none."""
        if self._database is None:
            raise ValueError(f"the broker {self.broker} has no {{database}} in it, which this scenario needs")
        return self._database

    def purge(self) -> None:
        """Empty the queues."""
        process = self._spawn("purge", "tests.support.lean_celery", "-A", APP, "purge", "-f")
        if process.wait():
            raise RuntimeError(f"celery purge failed:\n{self.logs()[-3000:]}")

    def _spawn(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**os.environ, "PYTHONPATH": path, **self.environ},
                cwd=self.directory,
                stdout=log,
                stderr=log,
            )

    def start(self, *options: str, count: int = 1, concurrency: int = 2, pool: str = "prefork") -> list[Worker]:
        """Start `count` workers with these further options of ``celery worker``, without waiting for them."""
        first = len(self.workers)
        for index in range(first, first + count):
            worker = Worker(
                directory=self.directory,
                app=APP,
                name=f"worker-{index}",
                pool=pool,
                concurrency=concurrency,
                args=("--loglevel", "warning", *options),
                env=self.environ | {"ENDURANCE_WORKER": str(index)},
            )
            worker.index = index
            self._cleanup.callback(worker.kill9)
            worker.start(ready_timeout=None)
            self.workers.append(worker)
        return self.workers[first:]

    def start_ready(self, *options: str, count: int = 1, concurrency: int = 2, pool: str = "prefork") -> list[Worker]:
        """As `start`, and wait until they accept jobs."""
        workers = self.start(*options, count=count, concurrency=concurrency, pool=pool)
        self.expect("the workers are ready", lambda: self.journal.ready.issuperset(w.index for w in workers))
        return workers

    def send(self, count: int, **options: float) -> range:
        """Start a process that sends `count` jobs, with these options of `producer.send`; returns their numbers."""
        first, self._jobs = self._jobs, self._jobs + count
        flags = (f"--{name}={value}" for name, value in options.items())
        producer = self._spawn("producer", "tests.endurance.producer", str(first), str(count), *flags)
        self._cleanup.callback(producer.wait)
        self._cleanup.callback(producer.kill)
        return range(first, self._jobs)

    def client(self, count: int, figures: Path, together: int) -> range:
        """Start a process that sends `count` jobs and waits for their results (`client`); returns their numbers."""
        first, self._jobs = self._jobs, self._jobs + count
        arguments = (str(first), str(count), str(figures), f"--together={together}")
        client = self._spawn("client", "tests.endurance.client", *arguments)
        self._cleanup.callback(client.wait)
        self._cleanup.callback(client.kill)
        return range(first, self._jobs)

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until `condition` holds; False once nothing at all has happened for `patience` seconds."""
        records, deadline = -1, 0.0
        while True:
            self.journal.read()
            if condition():
                return True
            if self.journal.records != records:
                records, deadline = self.journal.records, time.monotonic() + self.patience
            elif time.monotonic() > deadline:
                return False
            time.sleep(0.02)

    def expect(self, what: str, condition: Callable[[], bool]) -> None:
        """`wait`, and raise TimeoutError with the end of the logs should it be in vain."""
        if not self.wait(condition):
            raise TimeoutError(f"waited in vain until {what}:\n{self.logs()[-3000:]}")

    def sent(self) -> None:
        """Wait until every job is sent."""
        self.expect("all jobs are sent", lambda: len(self.journal.sent) + len(self.journal.refused) == self._jobs)

    def finish(self) -> bool:
        """Wait until every job is sent and done; False if some never are."""
        self.sent()
        return self.wait(lambda: not self.journal.unfinished())

    def move(self, broker: str) -> None:
        """From now on, processes are started on this broker, and rows read there."""
        self.broker = self.environ["ENDURANCE_BROKER"] = broker

    def keep(self, resource: AbstractContextManager[T]) -> T:
        """Enter *resource*; it is left at the end of the run, after all processes have ended that began later."""
        return self._cleanup.enter_context(resource)

    def logs(self) -> str:
        """What workers and producers have logged, one after the other."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.directory.glob("*.log")))

    @contextmanager
    def disturbance(self, worker: Worker | None = None) -> Iterator[None]:
        """Remember the time spent within as one in which `worker`, or everybody, came to harm."""
        begin = time.monotonic()
        yield
        self.disturbances.append(Disturbance(begin, time.monotonic(), worker.index if worker else None))

    @contextmanager
    def nobody_writes(self) -> Iterator[None]:
        """Nobody holds the lock of a SQLite file meanwhile: a process that is stopped just then would keep it."""
        if not self.ours:
            yield
            return
        with self._storage() as storage, storage.database.write():
            yield

    def rows(self) -> dict[str, Job]:
        """The jobs in our table, by id; none with the broker of somebody else."""
        if not self.ours:
            return {}
        with self._storage() as storage:
            return {job.id: job for job in storage.all()}

    def _storage(self) -> closing[Storage]:
        from kathikon_celery.storage import Storage

        return closing(Storage(self.broker.partition("+")[2]))

    def figures(self) -> Figures:
        """What became of the jobs: counts, and the seconds from the first ``delay()`` to the last job's end.

        Of the jobs started `twice` or more, `twice_running` ran when harm was done, `twice_unacked` ended less than
        `ACK_WINDOW` before that, and for `twice_unexplained` there is no such reason.
        """
        self.journal.read()
        gaps = [self._gap(job) for job, attempts in self.journal.attempts.items() if len(attempts) > 1]
        ended = self.journal.ended
        return {
            "broker": maybe_sanitize_url(self.broker),
            "sent": len(self.journal.sent),
            "refused": len(self.journal.refused),
            "unfinished": len(self.journal.unfinished()),
            "twice": len(gaps),
            "twice_running": sum(gap == 0 for gap in gaps),
            "twice_unacked": sum(0 < gap <= ACK_WINDOW for gap in gaps),
            "twice_unexplained": sum(gap > ACK_WINDOW for gap in gaps),
            "seconds": round(max(ended.values()) - min(self.journal.sent.values()), 2) if ended else None,
        }

    def _gap(self, job: int) -> float:
        """Seconds from the end of an attempt to the harm that explains the next one; the most, should it be several."""
        return max(
            min(
                (
                    max(0.0, harm.begin - attempt.ended) if attempt.ended else 0.0
                    for harm in self.disturbances
                    if harm.worker in (None, attempt.worker) and attempt.started <= harm.end
                ),
                default=float("inf"),
            )
            for attempt in self.journal.attempts[job][:-1]
        )


def percentile(values: list[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def main(scenario: Callable[..., Figures], broker: str = "kathikon+sqlite:///{dir}/kathikon.db") -> None:
    """Run `scenario` as the command line says and print its figures: a line of JSON, then the same in words.

    The options are the keyword-only parameters of `Run` and of the scenario.
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(scenario),
        epilog=inspect.getdoc(Run),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--broker", default=broker, help="default: %(default)s")
    for function in (Run, scenario):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                kind, flag = type(parameter.default), "--" + name.replace("_", "-")
                parser.add_argument(flag, type=kind, default=parameter.default, help="default: %(default)s")
    options = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the workers end, too
    with Run(**{name: options.pop(name) for name in inspect.signature(Run).parameters}) as run:
        figures = scenario(run, **options)
    print(json.dumps(figures))
    print(f"{scenario.__name__}:", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items()))
