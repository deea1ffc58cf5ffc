"""A real browser: that of the machine, Playwright's own, or one that the system's package manager installs.

`python -m tests.support.browsers` sees to it that there is one; `make test` calls that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import which
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def of_the_machine() -> str | None:
    """The path of an installed browser."""
    return next(filter(None, map(which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser of Playwright's."""
    from playwright.sync_api import sync_playwright

    options = [*OPTIONS, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=of_the_machine(), args=options)
        try:
            yield found
        finally:
            found.close()


def install() -> None:
    """Install a browser if there is none."""
    if of_the_machine() is not None:
        return
    of_playwright = [sys.executable, "-m", "playwright", "install", "chromium", "--only-shell"]
    if subprocess.run(of_playwright, capture_output=True, timeout=300).returncode == 0:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if which("apt-get") is not None:
        subprocess.run(["apt-get", "update", "-q"], check=False, env=environment)
        subprocess.run(["apt-get", "install", "-y", "-q", "chromium"], check=False, env=environment)
    if of_the_machine() is None:
        raise SystemExit("The tests of the dashboard need a browser, and none could be installed: install Chromium.")


if __name__ == "__main__":
    install()
