"""docs/tutorial.md, as written: only its long task is shorter here, and its countdown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from kathikon_celery.job import State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from tests.support.projects import Project
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

TEXT = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_tutorial(tmp_path: Path) -> None:
    (code,) = blocks("python")
    session = next(block for block in blocks("console") if ">>>" in block)
    calls = [line.removeprefix(">>> ") for line in session.splitlines() if line.startswith(">>> ")]
    expected = [line for line in session.splitlines() if line.isdigit()]
    project = Project(tmp_path)
    shop = tmp_path / "shop.py"
    shop.write_text(code.replace("time.sleep(20)", "time.sleep(5)"))
    plain = {"KATHIKON_TEST_CONF": None, "PYTHONPATH": None, **project.environment}

    def worker() -> WorkerProcess:
        return WorkerProcess(directory=tmp_path, app="shop", concurrency=2, env=plain)

    storage = Storage(f"sqlite:///{tmp_path}/kathikon.db", Settings())

    def states(task: str) -> set[State]:
        return {job.state for job in storage.all() if job.task == f"shop.{task}"}

    with worker() as first:
        shown = "import sys; sys.displayhook = lambda value: value is None or print(value, flush=True)"
        program = "\n".join([shown, *(f"exec(compile({one!r}, 'session', 'single'))" for one in calls)])
        program = program.replace("countdown=30", "countdown=3")
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=project.environment, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert done.stdout.split() == expected, done.stderr
        wait_until(lambda: states("pack") == {State.RUNNING}, what="the order is being packed")
        first.kill9()
    with worker():
        wait_until(lambda: states("pack") == {State.COMPLETED}, what="it is packed after all")
        wait_until(lambda: State.DEAD in states("price"), what="there is no price for a car")
        wait_until(lambda: State.COMPLETED in states("count_stock"), what="a tick of the schedule")
    shop.write_text(shop.read_text().replace('"pen": 2}', '"pen": 2, "car": 9000}'))
    with worker():
        said = project.call("-m", "celery", "-A", "shop", "kathikon", "retry", "--state", "dead", "--yes")
        assert said.endswith("Retried 1 job.\n")
        wait_until(lambda: states("price") == {State.COMPLETED}, what="the car has a price")
    storage.close()
