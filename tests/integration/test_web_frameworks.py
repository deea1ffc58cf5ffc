"""docs/web-frameworks.md, as written: its files with a real worker, called by the frameworks' own clients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.conftest import on_one_database
from tests.support.projects import Project
from tests.support.workers import WorkerProcess

TEXT = (Path(__file__).parents[2] / "docs/web-frameworks.md").read_text("utf-8")
FILES: list[tuple[str, str]] = re.findall(r"^`(\w+\.py)`\n\n```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
CLIENTS = {
    "fastapi": "from api import api; from fastapi.testclient import TestClient; client = TestClient(api)",
    "flask": "from web import app; client = app.test_client()",
}
CALLS = """
import json, time
def said(answer):
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text)
placed = said(client.post("/orders/book"))
until = time.monotonic() + 30
while (job := said(client.get(f"/jobs/{placed['job']}")))["state"] != "SUCCESS" and time.monotonic() < until:
    time.sleep(0.05)
from models import Order, Session
with Session() as session:
    answer = [placed["order"], job, session.get(Order, placed["order"]).state]
"""


def test_every_block_is_of_a_file() -> None:
    assert len(FILES) == TEXT.count("```python") == 4


@on_one_database
@pytest.mark.parametrize("framework", CLIENTS)
def test_a_task_is_sent_with_its_order(framework: str, database_url: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    for name, text in FILES:
        (tmp_path / name).write_text(text, "utf-8")
    environment = {**Project(tmp_path).environment, "DATABASE_URL": database_url}
    again = "answer.append(said(client.post(f\"/pack/{placed['order']}\")))" if framework == "fastapi" else ""
    plain = {"KATHIKON_TEST_CONF": None, "PYTHONPATH": None, **environment}
    project = Project(tmp_path)
    project.environment["DATABASE_URL"] = database_url
    with WorkerProcess(directory=tmp_path, app="tasks", concurrency=1, env=plain):
        number, job, state, *packed = project.run("\n".join([CLIENTS[framework], CALLS, again]))
    assert (job, state) == ({"state": "SUCCESS", "result": f"order {number}: book"}, "packed")
    assert packed == ([{"result": f"order {number}: book"}] if again else [])
