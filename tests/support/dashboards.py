"""A real ``celery kathikon web`` as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.waiting import wait_until
from tests.support.workers import ROOT


class Dashboard:
    """``celery -A app kathikon web`` with these options, on a free port of this machine; ends with the context."""

    def __init__(
        self,
        database_url: str,
        *options: str,
        directory: Path,
        app: str = "tests.support.apps",
        env: Mapping[str, str] | None = None,
    ) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._log = directory / "dashboard.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", app, "kathikon", "web", "--port", "0", *options],
                cwd=directory,
                env={**os.environ, "PYTHONPATH": path, "KATHIKON_DATABASE_URL": database_url, **(env or {})},
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Dashboard:
        try:
            wait_until(lambda: self._address() or self._process.poll() is not None, what="the address")
            assert self._address(), self._log.read_text()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=30)

    def _address(self) -> str:
        lines = self._log.read_text().splitlines()
        return next((line for line in lines if line.startswith("http://")), "")

    @property
    def address(self) -> str:
        """As the command has printed it, with the token, if there is one."""
        return self._address()

    @property
    def root(self) -> str:
        """Without the token, and without the slash at the end."""
        return self._address().partition("?")[0].rstrip("/")
