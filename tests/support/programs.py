"""Celery's other programs as real processes: ``celery status``, ``celery events``, ``celery flower``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.workers import ROOT


class CeleryProgram:
    """A ``celery -A tests.support.apps …`` that is killed, if it still runs, when the context manager is left."""

    def __init__(self, database_url: str, directory: Path, *arguments: str) -> None:
        self.log_file = directory / f"{arguments[0]}.log"
        celery = "celery" if arguments[0] == "flower" else "tests.support.lean_celery"
        self.command = [sys.executable, "-m", celery, "-A", "tests.support.apps", *arguments]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "KATHIKON_DATABASE_URL": database_url,
        }

    @property
    def log(self) -> str:
        """What the program has printed."""
        return self.log_file.read_text(errors="replace")

    def run(self, timeout: float = 60.0) -> tuple[int, str]:
        """Run the program to its end; return its exit code and what it has printed."""
        with self:
            code = self.process.wait(timeout)
        return code, self.log

    def __enter__(self) -> CeleryProgram:
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.log_file.parent, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait(10)
