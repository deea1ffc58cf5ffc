"""Hooks for MkDocs: pages that are made from files outside of docs/, the links to those files, and the version.

README.md, CHANGELOG.md and LICENSE are pages of the site. A link to any other file of the repository, such as an
example, leads to a page that shows this file: the site works without the repository, and without a network.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: File of the repository -> page of the site.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "LICENSE": "licence.md"}
#: End of a file's name -> language of its text.
LANGUAGES = {
    ".cfg": "ini", ".html": "html", ".json": "json", ".py": "python", ".service": "ini", ".sql": "sql",
    ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", "Dockerfile": "docker", "Makefile": "make",
}  # fmt: skip
#: What a folder has besides its files.
RUBBISH = {"__pycache__", ".ipynb_checkpoints"}

_FENCE = re.compile(r"( *)(```+|~~~+)")
_CODE = re.compile(r"(`+).+?\1")
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")  # the text may begin on the line before
_MENTION = re.compile(r"(?<![\w/(\[`.])docs/([\w-]+)\.md(?![\w#)\]`])")
_ITEM = re.compile(r"(?:[-*]|\d+\.) +")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the version to the name, which each page shows."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    config.site_name = f"{config.site_name} {found[1]}"
    config.copyright = f"{config.site_name} · MIT licence"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of files that are outside of docs/, and of those that they link in turn."""
    made: set[str] = set()
    wanted = set(PAGES)
    for file in files.documentation_pages():
        wanted |= set(_linked(file.content_string, f"docs/{file.src_uri}"))
    while wanted:
        path = wanted.pop()
        made.add(path)
        text = _page_of(path)
        added = File.generated(config, page_of(path), content=text)
        files.append(added)
        wanted |= set(_linked(text, _source_of(added))) - made
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the links of a page for its place in the site, and its lists as Python-Markdown reads them.

    The search shows what explains before what lists, and no files: they would hide both.
    """
    if page.file.src_uri.startswith("files/"):
        page.meta["search"] = {"exclude": True}
    elif not page.file.src_uri.startswith(("reference/", "changelog", "architecture", "internals")):
        page.meta["search"] = {"boost": 4}
    return _indented(_rewritten(markdown, _source_of(page.file)))


def on_post_build(config: MkDocsConfig) -> None:
    """Delete what the theme brings for other languages and its developers, and a map of the site without an address."""
    scripts = Path(config.site_dir, "assets", "javascripts")
    shutil.rmtree(scripts / "lunr", ignore_errors=True)
    for one in Path(config.site_dir, "assets").rglob("*.map"):
        one.unlink()
    for one in Path(config.site_dir).glob("sitemap.xml*"):
        one.unlink()


def page_of(path: str) -> str:
    """Return the page of the site that shows the file or folder *path* of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"files/{path}/index.md"
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"


def _source_of(file: File) -> str:
    """Return the file of the repository, or a name at its place, whose links a page has."""
    of_pages = {page: path for path, page in PAGES.items()}
    if file.src_uri in of_pages:
        return of_pages[file.src_uri]
    if file.src_uri.startswith("files/"):
        return file.src_uri.removeprefix("files/")
    return f"docs/{file.src_uri}"


def _target(link: str, source: str) -> str | None:
    """Return the file of the repository to which a link of the file *source* leads; `None`: no file of it."""
    path = unquote(link.partition("#")[0])
    if not path or re.match(r"[\w+.-]+:|/", path):
        return None
    found = normpath(join(dirname(source), path))
    return found if not found.startswith("..") and (ROOT / found).exists() else None


def _linked(text: str, source: str) -> Iterator[str]:
    """Yield the linked files for which a page is to be made."""
    for line in _prose(text, lambda line: line):
        for _, link, _ in _LINK.findall(line):
            found = _target(link, source)
            if found is not None and not found.startswith("docs/"):
                yield found


def _prose(text: str, change: Callable[[str], str]) -> Iterator[str]:
    """Yield the lines of *text*, those outside of code blocks changed."""
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if mark is not None and (not fence or (mark[2].startswith(fence) and line.strip() == mark[2])):
            fence = "" if fence else mark[2]
            yield line
        else:
            yield line if fence else change(line)


def _rewritten(text: str, source: str) -> str:
    here = dirname(page_of(source))

    def address(link: str) -> str:
        path = _target(link, source)
        if path is None:
            return link
        _, mark, anchor = link.partition("#")
        return relpath(page_of(path), here or ".") + mark + anchor

    def change(line: str) -> str:
        codes: list[str] = []

        def keep(found: re.Match[str]) -> str:
            codes.append(found[0])
            return f"\0{len(codes) - 1}\0"

        line = _CODE.sub(keep, line)
        line = _LINK.sub(lambda found: found[1] + address(found[2]) + found[3], line)
        mentioned = rf"[docs/\1.md]({relpath('.', here or '.')}/\1.md)"
        line = _MENTION.sub(mentioned, line)
        return re.sub(r"\0(\d+)\0", lambda found: codes[int(found[1])], line)

    return "\n".join(_prose(text, change)) + "\n"


def _indented(text: str) -> str:
    """Return Markdown with its lists as Python-Markdown reads them.

    What belongs to an item is indented by 4 spaces, where fewer are enough for other readers. An item is parted from a
    line of text before it, and from an item of several paragraphs.
    """
    lines: list[str] = []
    width, fence, is_long = 0, "", False
    for line in text.splitlines():
        is_after_text = bool(lines and lines[-1].strip())
        if mark := _FENCE.match(line):
            if not fence:
                width, fence = width if mark[1] else 0, mark[2]
            elif line.strip().startswith(fence):
                fence = ""
            is_long = width > 0
        elif not fence:
            if item := _ITEM.match(line):
                if is_after_text and (is_long if width else re.match(r"[-*] |1\. ", line)):
                    lines.append("")
                width, is_long = item.end(), False
            elif line.strip() and not is_after_text:
                width = width if line.startswith(" ") else 0
                is_long = width > 0
        if 0 < width < 4 and line.startswith(" " * width):
            line = " " * (4 - width) + line
        lines.append(line)
    return "\n".join(lines) + "\n"


# --- pages of files


def _page_of(path: str) -> str:
    place = ROOT / path
    if place.is_dir():
        return f"# {path}\n\n{_listing(place, path)}"
    if place.suffix == ".md":
        text = place.read_text("utf-8")
        return text if path in PAGES else f"{text}\n## Files\n\n{_listing(place.parent, dirname(path))}"
    if place.suffix == ".ipynb":
        return _notebook(place)
    if path == "LICENSE":
        return "# Licence\n\n" + place.read_text("utf-8")
    language = LANGUAGES.get(place.suffix or place.name, "text")
    return f"# {place.name}\n\n`{path}`\n\n{_fenced(place.read_text('utf-8'), language)}"


def _listing(folder: Path, path: str) -> str:
    found = []
    for one in sorted(folder.rglob("*")):
        name = one.relative_to(folder).as_posix()
        if one.is_file() and one.stat().st_size and not RUBBISH & set(one.parts) and one.name != "README.md":
            found.append(f"- [{name}]({name})")
    return "\n".join(found) + "\n"


def _notebook(place: Path) -> str:
    parts = []
    for cell in json.loads(place.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else _fenced(text, "python"))
        for output in cell.get("outputs", []):
            said = output.get("text") or output.get("data", {}).get("text/plain") or []
            parts.append(_fenced("".join(said), "text"))
    return "\n\n".join(parts) + "\n"


def _fenced(text: str, language: str) -> str:
    mark = "`" * max([3, *(len(found) + 1 for found in re.findall(r"`{3,}", text))])
    return f"{mark}{language}\n{text.rstrip()}\n{mark}\n"
