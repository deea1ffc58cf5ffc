"""``docs/test-your-app.md``, word for word: its files are written as they stand there, and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kathikon_celery.testing import plugin

pytest_plugins = ["pytester"]

COMPONENTS = 'pytest_plugins = ["kathikon_celery.testing.components"]\n'
TEXT = (Path(__file__).parents[2] / "docs/test-your-app.md").read_text("utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(
    r"^`([\w/]+\.py)`(?: \(at its end\))?\n\n```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL
)


def test_every_block_is_of_a_file() -> None:
    assert len(BLOCKS) == TEXT.count("```python")


def write(pytester: pytest.Pytester, blocks: list[tuple[str, str]]) -> int:
    """Write the files; the number of tests in them."""
    for name, text in blocks:
        with (pytester.path / name).open("a", encoding="utf-8") as file:
            file.write(text)
    return sum(text.count("def test_") for _, text in blocks)


def test_without_pytest_celery(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = write(pytester, BLOCKS[: [text for _, text in BLOCKS].index(COMPONENTS)])
    monkeypatch.delenv("KATHIKON_DATABASE_URL", raising=False)
    pytester.runpytest_subprocess("-W", "error").assert_outcomes(passed=tests)
    assert list(pytester.path.glob("**/kathikon.db*")) == []


def test_all_of_it(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = write(pytester, BLOCKS)
    monkeypatch.delenv("KATHIKON_DATABASE_URL", raising=False)
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    pytester.runpytest_subprocess().assert_outcomes(passed=tests)


def test_the_table_names_every_fixture() -> None:
    ours = {name for name, value in vars(plugin).items() if type(value).__name__ == "FixtureFunctionDefinition"}
    assert ours
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == ours
