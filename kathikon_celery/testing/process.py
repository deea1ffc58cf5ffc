"""A process with the interface of a Docker container, as far as pytest-celery and its users need it."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

__all__ = ["ProcessContainer"]

#: The folder of a worker's files in a container; here it means the folder of the process.
VOLUME = "/app"

#: The command ``celery``, after which kombu knows the transport ``kathikon``, whatever the app imports.
CELERY = "import kathikon_celery, sys; from celery.__main__ import main; sys.exit(main())"


class ExecResult(NamedTuple):
    """docker-py's result of a command."""

    exit_code: int
    output: bytes


class ProcessContainer:
    """Runs a command in a folder, in a session of its own, which `kill` ends as a whole.

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
        return "running" if self._process.poll() is None else "exited"

    @property
    def attrs(self) -> dict[str, Any]:
        """The output of ``docker inspect``: the environment, an address, no ports."""
        return {
            "Config": {"Env": [f"{name}={value}" for name, value in self._environment.items()]},
            "HostConfig": {"PortBindings": {}},
            "NetworkSettings": {"Networks": {"local": {"IPAddress": "127.0.0.1"}}, "Ports": {}},
            "State": {"Status": self.status, "Pid": self._process.pid if self._process else 0},
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
        """Send a signal to the main process. SIGKILL, which is the default, ends the whole session at once."""
        if self._process is None:
            return
        number = _number(signal or "SIGKILL")
        if number != _number("SIGKILL"):
            self._process.send_signal(number)
            return
        with suppress(ProcessLookupError, PermissionError):  # it has ended (macOS: only zombies are left)
            os.killpg(self._process.pid, number)
        self._process.wait()

    def stop(self, timeout: float = 10.0) -> None:
        """SIGTERM, and after *timeout* seconds SIGKILL."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
            self.kill()

    def restart(self, timeout: float = 10.0) -> None:
        """Stop and start again, in the same folder, with the same id."""
        self.stop(timeout)
        self.start()

    def exec_run(self, cmd: str | Sequence[str], **_: Any) -> ExecResult:
        """Run another command in the same folder and environment; ``WORKER_PID`` there is the main process."""
        done = subprocess.run(
            self._arguments(shlex.split(cmd) if isinstance(cmd, str) else cmd),
            cwd=self._directory,
            env={**self._environment, "WORKER_PID": str(self.attrs["State"]["Pid"])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return ExecResult(done.returncode, done.stdout)

    def _arguments(self, command: Sequence[str]) -> list[str]:
        program, *arguments = command
        programs = {"python": [sys.executable], "celery": [sys.executable, "-c", CELERY]}
        return [*programs.get(program, [program]), *arguments]


def _number(name: str | int) -> int:
    return name if isinstance(name, int) else signal.Signals["SIG" + name.removeprefix("SIG")].value
