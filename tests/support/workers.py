"""Real Celery workers as processes that a test can start, stop, freeze and kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


class WorkerProcess:
    """A ``celery -A app worker`` in a session of its own, which is killed when the context manager is left.

    ``conf`` updates the configuration of the sample app (JSON values); ``env`` adds to the environment, and a value
    of None removes a variable. The log of all starts is the file ``<directory>/<name>.log``.
    """

    def __init__(
        self,
        database_url: str | None = None,
        *,
        directory: Path,
        app: str = "tests.support.apps",
        name: str = "worker",
        pool: str = "prefork",
        concurrency: int = 2,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        conf: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.name = name
        self.hostname = f"{name}@test"
        self.log_file = directory / f"{name}.log"
        is_project = "PYTHONPATH" in (env or {})  # it finds no module of the tests
        celery = "celery" if is_project else "tests.support.lean_celery"
        self.command = [
            sys.executable, "-m", celery, "-A", app, "worker",
            "--pool", pool, "--concurrency", str(concurrency), "--hostname", self.hostname, "--loglevel", "INFO", *args,
        ]  # fmt: skip
        overrides: dict[str, str | None] = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(directory),
            "KATHIKON_DATABASE_URL": database_url,
            "KATHIKON_TEST_CONF": json.dumps(dict(conf or {})),
            **(env or {}),
        }
        environment = {key: overrides.get(key, value) for key, value in (os.environ | overrides).items()}
        self.environment = {key: value for key, value in environment.items() if value is not None}
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The worker's main process, also after its end."""
        if self._process is None:
            raise RuntimeError(f"worker {self.name} was never started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the main process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the worker has written, since the first start."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def start(self, ready_timeout: float | None = 60.0) -> WorkerProcess:
        """Start the worker, again if it ended, and wait until it is ready; do not wait if ``ready_timeout`` is None."""
        if self.running:
            raise RuntimeError(f"worker {self.name} runs already, as process {self.pid}")
        self._log_start = len(self.log)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, cwd=self.directory, env=self.environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if ready_timeout is not None:
            self.wait_ready(ready_timeout)
        return self

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until this start's log says that the worker is ready."""
        self.wait_for_log(" ready.", timeout)

    def wait_for_log(self, text: str, timeout: float = 60.0) -> None:
        """Wait until ``text`` is in the log of this start; fail at once if the worker ends without writing it."""

        def seen_or_ended() -> bool:
            ended = not self.running
            if text in self.log[self._log_start :]:
                return True
            if ended:
                raise AssertionError(f"worker {self.name} exited with {self.process.returncode}: {self._tail()}")
            return False

        try:
            wait_until(seen_or_ended, timeout, f"{text!r} in the log of worker {self.name}", interval=0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._tail()}") from None

    def signal(self, signum: int) -> None:
        """Send a signal to the main process and all of its pool, as SIGSTOP and SIGCONT to freeze and thaw them."""
        os.killpg(self.pid, signum)

    def report(self) -> str:
        """The end of the log and, if the worker runs, what its threads do: Celery logs that on SIGUSR1."""
        report = [self._tail()]
        if self.running:
            start = len(self.log)
            self.process.send_signal(signal.SIGUSR1)
            with suppress(AssertionError):  # it may be frozen
                wait_until(lambda: "LOCAL VARIABLES" in self.log[start:], 2.0)
            report += ["what its threads do:", self.log[start:]]
        return "\n".join(report)

    def kill9(self) -> None:
        """Kill the whole worker, its pool included, with SIGKILL."""
        if self._process is None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:  # macOS, for a group in which only zombies are left
            pass
        self.process.wait(10)

    def stop(self, timeout: float = 60.0) -> int:
        """End the worker with SIGTERM, a warm shutdown, and return its exit code.

        A prefork pool that was busy may take half a minute for that, with any broker: see billiard's
        GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT.
        """
        self.process.terminate()
        return self.wait(timeout)

    def wait(self, timeout: float = 60.0) -> int:
        """Wait until the main process has ended, and return its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"worker {self.name} did not end within {timeout:g} s: {self._tail()}") from None

    def __enter__(self) -> WorkerProcess:
        if self._process is None:
            try:
                self.start()
            except BaseException:
                self.kill9()
                raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill9()

    def _tail(self, lines: int = 60) -> str:
        return "\n".join(["its log ends with", *self.log.splitlines()[-lines:]])
