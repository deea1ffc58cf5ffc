"""A process with the interface of a Docker container, as far as pytest-celery and its users need it."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, NamedTuple

__all__ = ["ProcessContainer"]

#: The folder of a worker's files in a container; here it means the folder of the process.
VOLUME = "/app"

#: Seconds without waking after which a process has handled its signals. A thread of Python that has yet to do so waits
#: for the interpreter's lock, and wakes every 5 ms.
QUIET = 0.03

#: Seconds after which a process counts as having handled its signals though it is never quiet.
PATIENCE = 3.0


#: In place of a sleep, of a process that was stopped.
STOPPED = "stopped"


class ExecResult(NamedTuple):
    """docker-py's result of a command."""

    exit_code: int
    output: bytes


class ProcessContainer:
    """Runs a command in a folder, in a session of its own, which ends as a whole with the command.

    Arguments:
        command: what a container would run; ``celery`` and ``python`` mean those of this environment, ``%h`` in a
            node name means the container's id.
        directory: the folder; it is created, and stands for the container's ``/app``.
        content: files for the folder, by their paths.
        environment: added to the environment of this process.
        prompt: the text in the log that means that the command is ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: Path,
        content: Mapping[str, bytes],
        environment: Mapping[str, str],
        prompt: str,
    ) -> None:
        self.id = secrets.token_hex(32)
        self.name = f"{directory.name}-{self.short_id}"
        self._command = [word.replace("%h", self.short_id) for word in command]
        self._directory = directory
        self._prompt = prompt
        self._log = directory / "container.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = Event()
        self._signalled = False
        directory.mkdir(parents=True, exist_ok=True)
        for path, data in content.items():
            file = directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        own = {name: value.replace(VOLUME, str(directory)) for name, value in environment.items()}
        importable = [str(directory), *(path for path in sys.path if path and not path.startswith(sys.base_prefix))]
        self._environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(importable)}

    @property
    def short_id(self) -> str:
        """The host name that Docker gives to a container."""
        return self.id[:12]

    @property
    def status(self) -> str:
        """``created``, ``running`` or ``exited``."""
        if self._process is None:
            return "created"
        return "exited" if self._ended.is_set() else "running"

    @property
    def attrs(self) -> dict[str, Any]:
        """The output of ``docker inspect``: the environment, an address, no ports. A signal's exit code is 128 more."""
        pid, code = 0, 0
        if self._process is not None and self._ended.is_set():
            code = self._process.returncode
        elif self._process is not None:
            pid = self._process.pid
        return {
            "Config": {
                "Env": [f"{name}={value}" for name, value in self._environment.items()],
                "Hostname": self.short_id,
            },
            "HostConfig": {"PortBindings": {}},
            "NetworkSettings": {"Networks": {"local": {"IPAddress": "127.0.0.1"}}, "Ports": {}},
            "State": {
                "Status": self.status,
                "Running": pid != 0,
                "Pid": pid,
                "ExitCode": code if code >= 0 else 128 - code,
            },
        }

    def start(self, timeout: float = 60.0) -> None:
        """Start, and return when the log has the prompt. Raises `RuntimeError` at exit, or after *timeout* seconds."""
        seen = len(self.logs())
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments(self._command),
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._ended, self._signalled = Event(), False
        Thread(target=_end_session, args=(self._process, self._ended), daemon=True).start()
        deadline = monotonic() + timeout
        while self._prompt.encode() not in self.logs()[seen:]:
            if self.status == "exited" or monotonic() > deadline:
                said = self.logs()[seen:].decode(errors="replace")
                self.kill()
                raise RuntimeError(f"{shlex.join(self._command)} did not say {self._prompt!r} but:\n{said}")
            sleep(0.02)

    def logs(self, **_: Any) -> bytes:
        """All that was written, over all starts."""
        return self._log.read_bytes() if self._log.exists() else b""

    def reload(self) -> None:
        """Nothing to do: the status is always that of now."""

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal to the main process, which first handles the one before.

        SIGKILL, which is the default, ends the whole session at once.
        """
        if self._process is None or self._ended.is_set():
            return
        number = _number(signal or "SIGKILL")
        if number == _number("SIGKILL"):
            with suppress(ProcessLookupError, PermissionError):  # it has ended (macOS: only zombies are left)
                os.killpg(self._process.pid, number)
            self._ended.wait()
            return
        if self._signalled:
            self._wait_until_handled(self._process.pid)
        self._process.send_signal(number)
        self._signalled = True

    def stop(self, timeout: float = 10.0) -> None:
        """SIGTERM, and after *timeout* seconds SIGKILL."""
        if self._process is not None:
            self.kill("SIGTERM")
            self._ended.wait(timeout)
            self.kill()

    def restart(self, timeout: float = 10.0) -> None:
        """Stop and start again, in the same folder, with the same id."""
        self.stop(timeout)
        self.start()

    def exec_run(self, cmd: str | Sequence[str], **_: Any) -> ExecResult:
        """Run another command in the same folder and environment; ``WORKER_PID`` there is the main process.

        The exit code of a command that cannot be started is 127.
        """
        try:
            done = subprocess.run(
                self._arguments(shlex.split(cmd) if isinstance(cmd, str) else cmd),
                cwd=self._directory,
                env={**self._environment, "WORKER_PID": str(self.attrs["State"]["Pid"])},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            return ExecResult(127, f"{error}\n".encode())
        return ExecResult(done.returncode, done.stdout)

    def _wait_until_handled(self, pid: int) -> None:
        """Return when the process has handled the signal that was sent last.

        Of two equal signals that wait, a process sees one. Of different ones, Python handles the lowest number first.
        """
        deadline = monotonic() + PATIENCE
        asleep, since = "", monotonic()
        while monotonic() < deadline and not self._ended.is_set():
            now = _asleep(pid)
            if now is None or now != asleep:
                asleep, since = now or "", monotonic()
            elif now == STOPPED or monotonic() - since > QUIET:
                return
            sleep(0.002)

    def _arguments(self, command: Sequence[str]) -> list[str]:
        program, *arguments = command
        if program == "python":
            program = sys.executable
        elif program == "celery":
            program = shutil.which(program, path=str(Path(sys.executable).parent)) or program
        return [program, *arguments]


def _end_session(process: subprocess.Popen[bytes], ended: Event) -> None:
    """With the main process of a container, all others end."""
    process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    ended.set()


def _asleep(pid: int) -> str | None:
    """A name for the sleep of the main thread; None if it runs, or if a signal waits for it. `STOPPED` for SIGSTOP."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # another operating system, or the process has ended
        return "unknown"
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    state = status["State"][0]
    if state in "Tt":
        return STOPPED
    waits = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return None if waits or state not in "SI" else status["voluntary_ctxt_switches"]


def _number(name: str | int) -> int:
    return name if isinstance(name, int) else signal.Signals["SIG" + name.removeprefix("SIG")].value
