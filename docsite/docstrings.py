"""An extension of Griffe: docstrings of this project as Markdown, before the API reference is made from them.

- Lines that begin with ``>>>`` become a block of Python.
- A name of the reference in single backquotes becomes a link to it.
- Comments with ``#:`` document an attribute. The members of an enumeration are listed with the comments behind them.
- ``docs/limits.md`` becomes a link to that page.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Object

ROOT = Path(__file__).parents[1]
_ARGUMENTS = re.compile(r"^( *)(Arguments of the \w+):\n((?:\1 +.*\n?)+)", re.MULTILINE)
_DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


@cache
def public() -> tuple[str, ...]:
    """Return the names that the pages of docs/reference/ show, as a user imports them."""
    pages = sorted(ROOT.glob("docs/reference/*.md"))
    return tuple(name for page in pages for name in _DIRECTIVE.findall(page.read_text("utf-8")))


@cache
def _by_last_part() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in public():
        found.setdefault(name.rpartition(".")[2], name)
        found[name] = name
    return found


class Docstrings(Extension):
    """Changes the docstrings when Griffe has read a module."""

    def on_object(self, *, obj: Object, loader: Any, **kwargs: Any) -> None:
        """Change one docstring."""
        if obj.docstring is None and isinstance(obj, Attribute) and (text := _comment(obj)):
            obj.docstring = Docstring(text, lineno=obj.lineno, endlineno=obj.lineno, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)
            if _is_enumeration(obj):
                obj.docstring.value += _members(obj)


def as_markdown(text: str, obj: Object | None = None) -> str:
    """Return a docstring as Markdown."""
    parts = re.split(r"(^ *>>> .*(?:\n(?! *$).*)*)", text, flags=re.MULTILINE)
    return "".join(_block(part) if number % 2 else _prose(part, obj) for number, part in enumerate(parts))


def _block(text: str) -> str:
    indent = text[: len(text) - len(text.lstrip())]
    lines = dedent(text).splitlines()
    is_code = all(line.startswith((">>> ", "... ")) or line == "..." for line in lines)
    block = [line[4:] for line in lines] if is_code else lines
    fenced = ["```python" if is_code else "```pycon", *block, "```"]
    return "\n".join(indent + line for line in fenced)


def _prose(text: str, obj: Object | None) -> str:
    text = _ARGUMENTS.sub(_listed, text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"(?<![\w/`])(?:``)?docs/([\w-]+)\.md(?:``)?", r'<a href="../\1.html">\1</a>', text)
    return re.sub(r"(?<![`\[])`([\w.]+)`(?![`\]])", lambda found: _linked(found[1], obj), text)


def _listed(found: re.Match[str]) -> str:
    """Return arguments that are common to several methods as a list."""
    indent, title, entries = found.groups()
    items = re.sub(r"^( *)(\w+): ", r"\1- ``\2``: ", dedent(entries), flags=re.MULTILINE)
    items = "".join(
        f"{indent}{line if line.startswith('- ') else '    ' + line.strip()}\n" for line in items.splitlines()
    )
    return f"{indent}**{title}**\n\n{items}"


def _linked(name: str, obj: Object | None) -> str:
    here = obj
    while here is not None and not here.is_class:
        here = here.parent
    if here is not None and here.name in _by_last_part() and name in here.members and not name.startswith("_"):
        return f"[`{name}`][{_by_last_part()[here.name]}.{name}]"
    first, _, rest = name.partition(".")
    if name in _by_last_part():
        return f"[`{name}`][{_by_last_part()[name]}]"
    if rest and first in _by_last_part() and not rest.isupper():  # members of enumerations are no entries
        return f"[`{name}`][{_by_last_part()[first]}.{rest}]"
    return f"`{name}`"


def _is_enumeration(obj: Object | None) -> bool:
    return isinstance(obj, Class) and any("Enum" in str(base) for base in obj.bases)


def _members(obj: Object) -> str:
    """Return the members of an enumeration as a list, each with the comment behind it."""
    items = []
    for one in obj.members.values():
        if isinstance(one, Attribute) and one.lineno is not None:
            comment = re.search(r"  # (.+)$", _lines_of(one)[one.lineno - 1])
            items.append(f"- `{one.name}`" + (f": {comment[1]}" if comment else ""))
    return "\n\n" + "\n".join(items)


def _lines_of(obj: Object) -> list[str]:
    return obj.lines_collection[obj.filepath] if isinstance(obj.filepath, Path) else []


def _comment(obj: Attribute) -> str:
    """Return what the comments before an attribute say."""
    lines = _lines_of(obj)
    if obj.lineno is None or not lines:
        return ""
    first = obj.lineno - 1
    above: list[str] = []
    while first and lines[first - 1].strip().startswith("#:"):
        first -= 1
        above.insert(0, lines[first].strip()[2:].strip())
    return "\n".join(above)
