"""``docs/test-your-app.md``, word for word: its files are written as they stand there, and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kathikon_celery.testing import plugin

pytest_plugins = ["pytester"]

TEXT = (Path(__file__).parents[2] / "docs/test-your-app.md").read_text("utf-8")
FILES = dict(re.findall(r"^`([\w/]+\.py)`\n\n```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))


def test_every_block_is_a_file() -> None:
    assert len(FILES) == TEXT.count("```python")


def write(pytester: pytest.Pytester, *names: str) -> None:
    for name in names:
        path = pytester.path / Path(name).name
        path.write_text(FILES[name], "utf-8")


def test_the_small_project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in FILES if not name.startswith("processes/")]
    write(pytester, *names)
    monkeypatch.delenv("KATHIKON_DATABASE_URL", raising=False)
    tests = sum(text.count("def test_") for name, text in FILES.items() if name in names)
    pytester.runpytest_subprocess("-W", "error").assert_outcomes(passed=tests)
    assert list(pytester.path.glob("**/kathikon.db*")) == []


def test_the_processes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    write(pytester, "processes/conftest.py", "processes/test_crash.py")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_the_table_names_every_fixture() -> None:
    ours = {name for name, value in vars(plugin).items() if type(value).__name__ == "FixtureFunctionDefinition"}
    assert ours
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == ours
