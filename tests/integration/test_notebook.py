"""The example notebook, run cell by cell in a kernel of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples/notebook/notebook.ipynb"

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning:jupyter_client", "default::ResourceWarning")


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in [name for name in os.environ if name.startswith("KATHIKON_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "work"
    folder.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    assert list(folder.iterdir()) == []  # the tables are in memory
    return notebook


def said(notebook: Any, words: str) -> str:
    """What the one cell that contains *words* shows as its value."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]
    (value,) = [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
    return " ".join(str(value).split())


def test_it_shows_what_it_says(executed: Any) -> None:
    assert said(executed, "worker.is_running") == "True"
    assert said(executed, "add.delay(2, 2)") == "4"
    assert said(executed, "range(100)") == str(sum(2 * number for number in range(100)))
    assert said(executed, "def flaky") == "'worked after 2 retries'"
    assert said(executed, "countdown=0.5") == "True"
    assert said(executed, "def note") == "['high', 'middle', 'low']"
    assert "('default', 'completed'): 106" in said(executed, "storage.counts()")
    assert said(executed, "job.errors").endswith("'completed', 3)")
    assert said(executed, "def broken") == """[('broken', 'dead', "ValueError('on purpose')")]"""


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
