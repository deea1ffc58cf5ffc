"""One run: a system, a fresh folder and queue, a client process and worker processes."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any
from uuid import uuid4

import psutil
from celery import Celery

from benchmarks.names import FOLDER, SYSTEM
from benchmarks.systems import System

#: Seconds after which a run is given up.
PATIENCE = 600.0


def rate(starts: list[float]) -> float:
    """Tasks a second, of the moments at which they began."""
    return (len(starts) - 1) / max(max(starts) - min(starts), 1e-9)


class Run:
    """What one measurement needs; a context manager that ends and deletes it all.

    Arguments:
        number: how many tasks it may have.
        settings: Celery's, for this run.
    """

    def __init__(self, system: System, number: int, **settings: Any) -> None:
        self._folder = TemporaryDirectory(prefix="benchmarks-")
        self.folder = Path(self._folder.name)
        self.number = number
        self.queue = f"benchmarks-{uuid4().hex[:8]}"
        (self.folder / "starts").write_bytes(bytes(8 * number))
        common = {"task_default_queue": self.queue, "worker_hijack_root_logger": False}
        self.conf = system.conf(str(self.folder), **common, **settings)
        self.workers: list[subprocess.Popen[bytes]] = []
        project = str(Path(__file__).parent.parent)
        self._environment = os.environ | {
            SYSTEM: json.dumps(self.conf),
            FOLDER: str(self.folder),
            "PYTHONPATH": os.pathsep.join([project, os.environ.get("PYTHONPATH", "")]),
        }

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        with suppress(Exception), self.app() as app, app.connection_for_write() as connection:
            connection.default_channel.queue_delete(self.queue)
        self._folder.cleanup()

    def app(self) -> Celery:
        """An app of this process on the run's broker."""
        app = Celery("benchmarks", set_as_current=False)
        if self.conf["config"]:
            app.config_from_object(self.conf["config"])
        app.conf.update(self.conf["settings"])
        return app

    def start_worker(self, pool: str = "prefork", concurrency: int = 2) -> subprocess.Popen[bytes]:
        """Start a worker."""
        arguments = ["-A", "benchmarks.tasks", "worker", "-P", pool, "-c", str(concurrency), "-l", "warning"]
        quiet = ["-n", f"{uuid4().hex[:8]}@%h", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        with open(self.folder / "worker.log", "ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "celery", *arguments, *quiet, "-Q", self.queue],
                env=self._environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.workers.append(worker)
        return worker

    def client(self, what: str, number: int, argument: str = "") -> list[tuple[float, float]]:
        """Run a client to its end; when each of its calls began and ended, in monotonic seconds."""
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.client", what, str(number), argument],
            env=self._environment, cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return [(began, ended) for began, ended in json.loads(done.stdout.splitlines()[-1])]

    def warm_up(self) -> None:
        """Wait until a worker runs tasks; the start of number 0 is forgotten."""
        self.client("send", 1, "nothing")
        self.wait(1)
        (self.folder / "starts").open("r+b").write(bytes(8))

    def starts(self) -> list[float]:
        """When each task began, in monotonic seconds; 0 for those that have not."""
        return list(struct.unpack(f"{self.number}d", (self.folder / "starts").read_bytes()))

    def wait(self, number: int) -> list[float]:
        """The starts of the first *number* tasks, as soon as all have begun."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and all(worker.poll() is None for worker in self.workers):
            starts = self.starts()[:number]
            if all(starts):
                return starts
            time.sleep(0.02)
        raise RuntimeError(
            f"of {number} tasks {sum(map(bool, self.starts()))} have begun; the worker's log ends with\n{self.log()}"
        )

    def log(self) -> str:
        """The end of the workers' log."""
        return (self.folder / "worker.log").read_text(errors="replace")[-2000:]

    def cpu(self) -> float:
        """Processor seconds of all workers so far."""
        seconds = 0.0
        for worker in self.workers:
            processes = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
            seconds += sum(sum(process.cpu_times()[:2]) for process in processes)
        return seconds
