"""The site of the documentation: it works as files, and what is wrong in the documentation fails its build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.browsers import browser

pytest.importorskip("mkdocs")
pytest.importorskip("playwright")

pytestmark = pytest.mark.xdist_group("site")

ROOT = Path(__file__).parents[2]
#: What the site is made from.
SOURCES = ("docs", "docsite", "examples", "kathikon_celery", "mkdocs.yml", "pyproject.toml")
SOURCES += ("CHANGELOG.md", "LICENSE", "README.md")


def build(folder: Path) -> str:
    """Build the site in *folder*, and return what is wrong."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110).stderr


def check_names(folder: Path) -> str:
    """Check the public names, and return what is wrong."""
    command = [sys.executable, "-m", "docsite.names"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110).stderr


def copied(folder: Path) -> Path:
    """Copy what the site is made from."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(tmp_path_factory.mktemp("site"))
    errors = build(folder)
    assert (folder / "site" / "index.html").exists(), errors
    return folder / "site"


@cache
def anchors(page: Path) -> set[str]:
    return {unescape(name) for name in re.findall(r'\b(?:id|name)="([^"]+)"', page.read_text("utf-8"))}


def targets(page: Path) -> Iterator[str]:
    """Yield the links of a page, and what it loads."""
    text = re.sub(r"<pre.*?</pre>", "", page.read_text("utf-8"), flags=re.DOTALL)
    yield from (unescape(found) for found in re.findall(r'<[^>]*\b(?:href|src)="([^"]*)"', text))


def test_every_link_leads_to_a_file_of_the_site(site: Path) -> None:
    pages, wrong = sorted(site.rglob("*.html")), []
    for page in pages:
        for target in targets(page):
            path, _, anchor = target.partition("#")
            if page.name == "404.html" or re.match(r"(https?|mailto):", path):
                continue
            linked = (page.parent / unquote(path)).resolve() if path else page
            if not linked.is_file() or (anchor and linked.suffix == ".html" and unquote(anchor) not in anchors(linked)):
                wrong.append((page.relative_to(site).as_posix(), target))
    assert len(pages) > 30
    assert wrong == []


def test_the_search_works_from_files_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    with browser() as found:
        page = found.new_page()
        loaded: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: loaded.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto((site / "reference" / "limits.html").as_uri())
        page.click("input[name=query]")
        page.keyboard.type("RateLimited")
        page.locator(".md-search-result__link").first.click()
        page.wait_for_url(re.compile(r"\.html\?h="))
        assert "RateLimited" in page.inner_text("article")
        assert errors == []
        assert [url for url in loaded if not re.match(r"file:|data:|about:|blob:", url)] == []


def test_version_changelog_and_readme_are_in_it(site: Path) -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version is not None
    start = (site / "index.html").read_text("utf-8")
    assert f"kathikon-celery {version[1]}" in start
    assert "How it compares" in start
    assert 'id="unreleased"' in (site / "changelog.html").read_text("utf-8")


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_all_items_of_lists_are_items(site: Path, page: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    name = {"README": "index", "CHANGELOG": "changelog"}.get(page.stem, page.stem)
    shown = (site / f"{name}.html").read_text("utf-8").partition("<article")[2].partition("</article")[0]
    assert len(re.findall(r"^ *(?:[-*]|\d+\.) ", text, re.MULTILINE)) == shown.count("<li")


def test_what_is_wrong_in_the_documentation_fails(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "docs" / "lost.md").write_text("# Lost\n", "utf-8")
    for name, link in (
        ("README.md", "docs/no-such-page.md"),
        ("CHANGELOG.md", "docs/limits.md#no-such-anchor"),
        ("docs/limits.md", "../examples/no-such-file.py"),
        ("docs/unique.md", "reference/limits.md#kathikon_celery.NoSuchName"),
    ):
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(f"\n[a link]({link})\n")
    errors = build(folder)
    assert "lost.md" in errors
    assert "docs/no-such-page.md" in errors
    assert "#no-such-anchor" in errors
    assert "examples/no-such-file.py" in errors
    assert "#kathikon_celery.NoSuchName" in errors


def test_a_public_name_without_a_docstring_fails(tmp_path: Path) -> None:
    assert check_names(ROOT) == ""

    folder = copied(tmp_path)
    limits = folder / "kathikon_celery" / "limits.py"
    text = limits.read_text("utf-8")
    text = text.replace('__all__ = ["Limit",', '__all__ = ["Hidden", "Limit",')
    text = re.sub(r'(class LimitReached\(TimeoutError\):\n) +""".*?"""', r"\1    pass", text)
    text = text.replace("        timeout: seconds to wait", "        patience: seconds to wait")
    text = re.sub(r"^    >>> with limits\.take.*\n.*\n", "", text, flags=re.MULTILINE)
    limits.write_text(f'{text}\n\nclass Hidden:\n    """A class of which the reference says nothing."""\n', "utf-8")
    assert sorted(check_names(folder).splitlines()) == [
        "kathikon_celery.limits.Hidden is public: add '::: kathikon_celery.limits.Hidden' to a page of docs/reference/",
        "kathikon_celery.limits.LimitReached: it has no docstring",
        "kathikon_celery.limits.take: its docstring has no example (>>>)",
        "kathikon_celery.limits.take: its docstring says nothing of the argument timeout",
    ]
