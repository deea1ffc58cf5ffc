"""The shops of ``examples/``: their READMEs are followed word for word, and their processes are killed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.endurance.harness import Run
from tests.endurance.shop import shop
from tests.support.waiting import wait_until
from tests.support.workers import ROOT

#: What runs until it is ended.
SERVERS = ("celery", "uvicorn", "python manage.py runserver")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def commands(readme: str) -> list[tuple[str, str]]:
    """The commands of a README, each with what it prints."""
    text = "".join(re.findall(r"^```console\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL))
    return [tuple(one.partition("\n")[::2]) for one in text.removeprefix("$ ").split("\n$ ")]  # type: ignore[misc]


def prints(output: Callable[[], str], printed: str) -> bool:
    return output().strip() == printed.strip()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def follow(kind: str, folder: Path, database_url: str | None) -> None:
    shutil.copytree(ROOT / "examples" / kind, folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KATHIKON_", "DJANGO_"))}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment |= {} if database_url is None else {"DATABASE_URL": database_url}
    port, log = free_port(), folder / "log"
    with ExitStack() as stack:
        for command, printed in commands((folder / "README.md").read_text("utf-8")):
            words = shlex.split(command.replace("8000", str(port)))
            if words[0] == "pip":  # they are installed
                continue
            if command.startswith(SERVERS):
                file = stack.enter_context(log.open("ab"))
                process = subprocess.Popen(
                    words, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
                )
                stack.callback(process.wait)
                stack.callback(os.killpg, process.pid, signal.SIGKILL)
                if words[0] == "celery":
                    wait_until(lambda: " ready." in log.read_text(), what="the worker")
                else:
                    wait_until(lambda: is_listening(port), what=command)
                continue

            def output(words: list[str] = words) -> str:
                return subprocess.run(
                    words, cwd=folder, env=environment, check=True, capture_output=True, text=True, timeout=60
                ).stdout

            if not printed:
                output()
            elif words[-1].endswith("report"):
                wait_until(partial(prints, output, printed), what=printed)
            else:
                assert prints(output, printed), command


@pytest.mark.parametrize("kind", ["django_shop", "fastapi_shop"])
def test_a_stranger_follows_the_readme(kind: str, tmp_path: Path) -> None:
    follow(kind, tmp_path / kind, None)


@pytest.mark.postgresql
def test_a_stranger_follows_the_readme_on_postgresql(tmp_path: Path, postgresql_url: str) -> None:
    follow("fastapi_shop", tmp_path / "shop", postgresql_url)


def each_order_has_one_receipt_and_one_move(kind: str, pool: str, database_url: str) -> None:
    with Run(f"kathikon+{database_url}") as run:
        figures = shop(run, project=kind, pool=pool, orders=60, every=0.7)
    right = dict.fromkeys(("stock_wrong", "dead"), 0)
    for name in ("receipts", "moves"):
        right |= {name: figures["orders"], f"{name}_lost": 0, f"{name}_double": 0, f"{name}_of_nothing": 0}
    assert {name: figures[name] for name in right} == right, figures
    assert figures["is_finished"]
    assert sum(figures[f"{who}_killed"] for who in ("producers", "workers", "children")) >= 1, figures


def test_each_order_has_one_receipt_and_one_move_on_sqlite(sqlite_url: str) -> None:
    each_order_has_one_receipt_and_one_move("fastapi_shop", "prefork", sqlite_url)


@pytest.mark.postgresql
def test_each_order_has_one_receipt_and_one_move_on_postgresql(postgresql_url: str) -> None:
    each_order_has_one_receipt_and_one_move("django_shop", "threads", postgresql_url)
