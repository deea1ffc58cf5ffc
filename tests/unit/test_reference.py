"""The reference pages name every column, state, cause, command and option, and the versions of pyproject.toml."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kathikon_celery.cli import kathikon
from kathikon_celery.job import Cause, State
from kathikon_celery.results.backend import WORDS
from kathikon_celery.storage.schema import VERSION_TABLE
from kathikon_celery.storage.tables import metadata

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TABLES, COMMANDS, VERSIONS = (
    (ROOT / f"docs/{name}.md").read_text("utf-8") for name in ("tables", "commands", "versions")
)


def section(page: str, title: str) -> str:
    """What comes below a title, up to the next title."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def named(part: str) -> list[str]:
    """The words in backquotes of the first cell of each row."""
    return re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`[^|]+) \|", part, re.MULTILINE)))


def test_every_table_has_a_section() -> None:
    sections = re.findall(r"^## (kathikon_\w+)$", TABLES, re.MULTILINE)
    assert sorted(sections) == sorted([*metadata.tables, VERSION_TABLE])


@pytest.mark.parametrize("table", metadata.tables)
def test_every_column_is_there_and_no_other(table: str) -> None:
    assert sorted(named(section(TABLES, table))) == sorted(metadata.tables[table].columns.keys())


def test_every_state_and_cause_is_there() -> None:
    assert sorted(named(section(TABLES, "States"))) == sorted(State)
    assert sorted(named(section(TABLES, "Causes"))) == sorted(Cause)


def test_celerys_word_for_each_state_is_there() -> None:
    page = (ROOT / "docs/results-and-canvas.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (`[^|]+) \| `([A-Z]+)`", page.partition("| the row |")[2].partition("\n\n")[0], re.MULTILINE
    )
    assert {state: word for states, word in rows for state in re.findall(r"`(\w+)`", states)} == WORDS


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command by its whole name."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_every_command_is_there_and_no_other() -> None:
    assert sorted(named(COMMANDS.partition("\n## Options")[0])) == sorted(name for name, _ in commands(kathikon))


@pytest.mark.parametrize(
    ("name", "command"), list(commands(kathikon)), ids=lambda value: value if type(value) is str else ""
)
def test_every_option_of_a_command_is_there(name: str, command: click.Command) -> None:
    row = next(line for line in COMMANDS.splitlines() if line.startswith(f"| `{name}` |"))
    options = [param.opts[-1] for param in command.params if isinstance(param, click.Option)]
    listed = re.findall(r"`(--[\w-]+)`", row)
    for title in re.findall(r"\(#([\w-]+)\)", row):
        listed += named(section(COMMANDS, title.replace("-", " ").capitalize()))
    assert sorted(listed) == sorted(options)


def test_the_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["postgresql"]]
    lowest = dict(re.match(r"([\w-]+)[^>]*>=([\d.]+)", one).groups() for one in requirements if ">=" in one)  # type: ignore[union-attr]
    rows = dict(re.findall(r"^\| ([\w .]+?) \| ([\d.]+) or newer", VERSIONS, re.MULTILINE))
    assert rows.pop("Python") == project["requires-python"].removeprefix(">=")
    for name in ("celery", "kombu", "sqlalchemy", "psycopg", "alembic"):
        assert {key.lower(): value for key, value in rows.items()}[name] == lowest[name], name
