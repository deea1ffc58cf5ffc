"""A user's project, on disk, with a real worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

from sqlalchemy import make_url

from tests.support.workers import WorkerProcess

#: Tasks as in any project, without Kathikon.
TASKS = """
    import os, time
    from celery import shared_task

    def note(path, line):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{line}\\n".encode())
        os.close(descriptor)

    @shared_task
    def add(x, y):
        return x + y

    @shared_task
    def timed(path, line):
        note(path, f"start {line}")
        time.sleep(0.3)
        note(path, f"end {line}")

    @shared_task
    def tick(path):
        note(path, "tick")
"""
MAIL = """
    from celery import shared_task

    @shared_task
    def send(to):
        return f"sent to {to}"

    @shared_task
    def Send(to):
        return "patterns mind upper and lower case"
"""
APP = """
    from celery import Celery
    app = Celery("proj")
    app.config_from_object("kathikon_celery.config")
    app.autodiscover_tasks(["proj", "proj.mail"])
"""


def django_database(url: str) -> dict[str, str]:
    """Django's setting for the database at *url*."""
    parts = make_url(url)
    return {
        "ENGINE": f"django.db.backends.{parts.get_backend_name().replace('sqlite', 'sqlite3')}",
        "NAME": parts.database or "",
        "USER": parts.username or "",
        "HOST": str(parts.query.get("host", parts.host or "")),
        "PORT": str(parts.port or ""),
    }


#: Text of a Django project's ``manage.py``.
MANAGE = "from django.core.management import execute_from_command_line as run; import sys; run()"


class Project:
    """A folder with a package ``proj``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("KATHIKON_", "CELERY_", "DJANGO_"))
        }
        self.environment.pop("PYTHONPATH", None)  # the package is installed, as at a user's
        self.write("proj/__init__.py", "from proj.celery import app as celery_app")
        self.write("proj/celery.py", APP)
        self.write("proj/tasks.py", TASKS)
        self.write("proj/mail/__init__.py", "")
        self.write("proj/mail/tasks.py", MAIL)

    def write(self, name: str, text: str) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))

    def run(self, code: str) -> Any:
        """Run *code* in another process, as a web server of the project would; return its variable ``answer``."""
        program = f"import json\n{dedent(code)}\nprint('answer:', json.dumps(answer))"
        done = self.call("-c", program)
        (answer,) = (line for line in done.splitlines() if line.startswith("answer: "))  # the log may follow
        return json.loads(answer.removeprefix("answer: "))

    def celery(self, *arguments: str) -> str:
        """Run ``celery -A proj …``, and return its output."""
        return self.call("-m", "celery", "-A", "proj", *arguments)

    def call(self, *arguments: str) -> str:
        """Run ``python …`` in the project, and return its output."""
        # A daemon that the command leaves behind would keep a pipe open.
        output = self.directory / "output"
        with output.open("w+") as file:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=self.directory, env=self.environment, timeout=60,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        text = output.read_text()
        assert done.returncode == 0, text
        return text

    @contextmanager
    def worker(self, *args: str, pool: str = "threads", concurrency: int = 4) -> Iterator[WorkerProcess]:
        """A worker of the project, without environment variables or arguments that are not the project's."""
        nothing = {name: None for name in os.environ if name not in self.environment}
        with WorkerProcess(
            directory=self.directory, app="proj", pool=pool, concurrency=concurrency, args=args,
            env={**nothing, "KATHIKON_TEST_CONF": None, "PYTHONPATH": None, **self.environment},
        ) as worker:  # fmt: skip
            yield worker
