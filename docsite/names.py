"""Checks the names that an application imports: each is in the reference, and its docstring is whole.

Run as ``python -m docsite.names``; prints what is missing. Names are those of ``__all__`` in the package and in the
modules below, and those that the code blocks of README and docs/ and the examples import. Each needs

- an entry in docs/reference/ (``::: name``),
- a docstring, and one for each public method, unless the same method of a base class has one,
- a word on each argument, or each field of a dataclass,
- an example (``>>>``), unless it is an error or a fixture.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

from docsite.docstrings import ROOT, Docstrings, public

#: Modules whose ``__all__`` is public, besides the package's own.
MODULES = (
    "limits", "unique", "storage", "metrics", "web", "testing", "testing.isolation", "testing.doubles",
    "operate.kathikon",
)  # fmt: skip
#: Classes whose methods are not called by an application, so that a sentence on each is enough.
_OF_THE_INSIDE = ("StorageBackend", "Service", "TasksBackend", "Settings", "ScratchApp")
#: Fixtures take what pytest gives, and are not called.
_PLAIN = ("kathikon_celery.testing.plugin", "kathikon_celery.testing.components", "kathikon_celery.signals.")


def imported() -> Iterator[str]:
    """Yield the names that code blocks of the documentation, and the examples, import from the package."""
    texts = [path.read_text("utf-8") for path in ROOT.glob("examples/**/*.py")]
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        blocks = re.findall(r"^ *```(?:python|pycon)\n(.*?)^ *```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        texts += blocks
    for line in "\n".join(texts).splitlines():
        statement = line.strip().removeprefix(">>> ")
        if re.match(r"(from|import) kathikon_celery\b", statement):
            yield from _names_of(statement)


def _names_of(statement: str) -> Iterator[str]:
    for node in ast.parse(statement).body:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{one.name}" for one in node.names)
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names)


def problems(folder: Path = ROOT) -> list[str]:
    """Return in words what is missing; empty: nothing."""
    extensions = griffe.load_extensions(Docstrings())
    package = griffe.load("kathikon_celery", search_paths=[folder], extensions=extensions, allow_inspection=False)
    named = {f"kathikon_celery.{name}" for name in package.exports or ()}
    for module in MODULES:
        named |= {f"kathikon_celery.{module}.{name}" for name in package[module].exports or ()}
    named |= {name.removesuffix(".*") for name in imported()}
    shown = {_found(package, name).canonical_path: name for name in public()}
    found = []
    for name in sorted(named):
        path = _found(package, name).canonical_path
        within = any(one == path or one.startswith(f"{path}.") for one in shown)
        if not within and path.rpartition(".")[0] not in shown:
            found.append(f"{name} is public: add '::: {name}' to a page of docs/reference/")
    for path, name in shown.items():
        found += [f"{name}: {problem}" for problem in _problems(_found(package, path), name)]
    return found


def _found(package: griffe.Module, name: str) -> griffe.Object:
    found = package[name.partition(".")[2]]
    return found.final_target if isinstance(found, griffe.Alias) else found


def _problems(found: griffe.Object, name: str) -> Iterator[str]:
    if found.docstring is None:
        yield "it has no docstring"
        return
    text = found.docstring.value
    is_error = found.is_class and any(re.search(r"(Error|Exception|Warning)$", one.name) for one in _mro(found))
    if not isinstance(found, griffe.Class | griffe.Function):
        return
    if "```py" not in text and not is_error and not name.startswith(_PLAIN):
        yield "its docstring has no example (>>>)"
    if name.startswith(_PLAIN):
        return
    if isinstance(found, griffe.Function):
        yield from _unnamed(found, text)
        return
    constructor = found.members.get("__init__")
    if isinstance(constructor, griffe.Function) and not is_error:
        of_init = constructor.docstring.value if constructor.docstring is not None else ""
        yield from _unnamed(constructor, text + of_init, found)
    for member in found.members.values():
        if member.name.startswith("_") or not isinstance(member, griffe.Function):
            continue
        if member.docstring is None and not any(_has_docstring(one, member.name) for one in _mro(found)):
            yield f"its method {member.name} has no docstring"
        elif member.docstring is not None and found.name not in _OF_THE_INSIDE:
            of_both = member.docstring.value + text
            yield from (f"its method {member.name}: {problem}" for problem in _unnamed(member, of_both))


def _unnamed(function: griffe.Function, text: str, owner: griffe.Object | None = None) -> Iterator[str]:
    """Yield the arguments of which a docstring says nothing."""
    for one in function.parameters:
        name = one.name.lstrip("*")
        if (name in ("self", "cls", "args", "kwargs") and one.annotation is None) or name.startswith("_"):
            continue
        field = owner.members.get(name) if owner is not None else None
        if field is not None and field.docstring is not None:
            continue
        if not re.search(rf"(^ +|[*`\[]|, ){name}\b([*`\]:,.]| \()", text, re.MULTILINE):
            yield f"its docstring says nothing of the argument {name}"


def _mro(found: griffe.Object) -> list[griffe.Object]:
    """Return the class and its bases, as far as they are known here; others by their names only."""
    assert isinstance(found, griffe.Class)
    others = [griffe.Class(str(base).rpartition(".")[2]) for base in found.bases]
    return [found, *found.mro(), *others]


def _has_docstring(owner: griffe.Object, name: str) -> bool:
    found = owner.members.get(name)
    return found is not None and found.docstring is not None


if __name__ == "__main__":
    missing = problems()
    sys.exit("\n".join(missing) or None)
