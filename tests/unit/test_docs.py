"""README and docs/ against the code: settings, files, commands, links and snippets are as they say."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click import Context

from kathikon_celery import config
from kathikon_celery.cli import kathikon
from kathikon_celery.settings import SettingError, Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kathikon_celery"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
PAGES |= {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "CHANGELOG.md")}
SETTINGS = [item.name for item in fields(Settings) if item.name != "sources"]


def snippets(*languages: str) -> list[Any]:
    """Every code block of these languages, with the page that it is on."""
    found = []
    for name, text in PAGES.items():
        blocks = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
        for number, (_, language, code) in enumerate(blocks):
            if language in languages:
                found.append(pytest.param(textwrap.dedent(code), id=f"{name}-{number}"))
    return found


def sections() -> dict[str, dict[str, str]]:
    """The table of each setting in docs/settings.md."""
    found = {}
    for part in PAGES["docs/settings.md"].split("\n### `")[1:]:
        name, _, text = part.partition("`")
        found[name] = dict(re.findall(r"^\| (\w+) \| (.+) \|$", text, re.MULTILINE))
    return found


def value(text: str) -> Any:
    """What a cell begins with: something in backquotes, or a word."""
    quoted = re.match(r"`([^`]+)`", text)
    found = quoted[1] if quoted else text.split()[0].rstrip(";,")
    return json.loads(found) if found.startswith("{") else found


def test_every_setting_is_there_and_no_other() -> None:
    assert list(sections()) == SETTINGS


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_as_its_table_says(name: str) -> None:
    table = sections()[name]
    assert table["environment"] == f"`KATHIKON_{name.upper()}`"
    assert getattr(Settings(**{name: value(table["default"])}), name) == getattr(Settings(), name)
    assert getattr(Settings(**{name: value(table["example"])}), name) != getattr(Settings(), name)

    with pytest.raises(SettingError) as caught:
        Settings(**{name: object()})
    allowed = str(caught.value).partition("allowed is ")[2]
    if re.match(r"seconds|a whole number|true or false", allowed) or name in ("result", "copies") or "disk" in allowed:
        assert table["allowed"].partition(";")[0] == allowed
    if allowed.startswith("seconds"):
        assert table["unit"] == "seconds"
    elif allowed.startswith("a whole number"):
        assert table["unit"]


def test_an_error_reads_as_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KATHIKON_LEASE", "soon")
    with pytest.raises(SettingError) as caught:
        Settings.load(directory=tmp_path)
    assert f"```\n{caught.value}\n```" in PAGES["docs/settings.md"]


def test_the_table_of_celery_settings_is_that_of_the_configuration() -> None:
    part = PAGES["docs/settings.md"].partition("### What the configuration sets")[2].partition("\n## ")[0]
    rows = [re.match(r"\| (`[^|]+) \| ([^|]*) \|", line) for line in part.splitlines()]
    named = {name: row[2] for row in rows if row for name in re.findall(r"`(\w+)`", row[1])}
    assert sorted(named) == sorted(config.__all__)
    words = {True: "true", False: "false", None: "none"}
    for name in ("broker_transport_options", "task_queues", "task_routes", "timezone"):  # made when they are asked for
        del named[name]
    for name, text in named.items():
        expected = getattr(config, name)
        assert text == (f"`{expected}`" if isinstance(expected, str) else words[expected]), name


def test_every_file_of_the_package_has_its_line_in_the_architecture() -> None:
    part = PAGES["docs/architecture.md"].partition("\n## The files\n")[2].partition("\n## ")[0]
    listed, folder = [], ""
    for line in part.splitlines():
        if match := re.match(r"( *)([\w/]+/|\w+\.py)(?:\s|$)", line):
            if match[2].endswith("/"):
                folder = match[2].removeprefix("kathikon_celery/")
            else:
                listed.append(folder + match[2])
    files = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(files)


def test_files_that_the_architecture_names_exist() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|\.cfg|/))`", PAGES["docs/architecture.md"])
    named += re.findall(r"`(tests/\w+)`", PAGES["docs/architecture.md"])
    assert len(named) > 10
    assert [name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            linked = (ROOT / page).parent / path if path else ROOT / page
            assert linked.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_readme_links_every_page() -> None:
    assert {name for name in PAGES if name.startswith("docs/")} <= set(re.findall(r"\]\(([^)]+)\)", PAGES["README.md"]))


@pytest.mark.parametrize("code", snippets("python"))
def test_python_compiles(code: str) -> None:
    compile(code, "snippet", "exec")


@pytest.mark.parametrize("code", snippets("toml"))
def test_toml_is_a_configuration(code: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(code, "utf-8")
    settings = Settings.load(environ={}, directory=tmp_path)
    assert set(settings.sources) == set(tomllib.loads(code)["tool"]["kathikon"])


def test_commands_exist() -> None:
    text = "\n".join(PAGES.values())
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^\$ make (\w+)", text, re.MULTILINE)
    assert "demo" in targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
    used = re.findall(r"celery -A proj kathikon ([a-z]+)(?: (--[\w-]+))?", text)
    assert used
    for name, option in used:
        command = kathikon.get_command(Context(kathikon), name)
        assert command is not None, name
        assert not option or option in [opt for param in command.params for opt in param.opts]


def test_no_path_of_anybodys_machine() -> None:
    texts = PAGES | {
        str(path): path.read_text("utf-8")
        for folder in ("examples", "kathikon_celery")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".ipynb", ".md")
    }
    texts |= {name: (ROOT / name).read_text("utf-8") for name in ("Makefile", "pyproject.toml", "setup.cfg")}
    machine = re.compile(r"(?<![\w/.])/(?:home|root|Users|work|mnt|opt)/")
    assert [name for name, text in texts.items() if machine.search(text)] == []
