"""An index of Python source files, as any Celery project would write it.

Only two statements know of Kathikon: the one that configures the app, and the one that names its queues.
"""

from __future__ import annotations

import ast
import hashlib
import re
from itertools import islice
from pathlib import Path
from typing import Any

from celery import Celery, Task

app = Celery("indexer")
app.config_from_object("kathikon_celery.config")
app.conf.kathikon_queues = {"default": 10, "classes": {"tasks": ["indexer.measure_class"]}}

IMPORT = re.compile(r"^\s*(?:import|from)\s+([A-Za-z_]\w*)", re.MULTILINE)


@app.task(bind=True, max_retries=1, default_retry_delay=1)
def index_file(self: Task, path: str, encoding: str = "utf-8-sig") -> dict[str, Any]:
    """Count what a file holds, and send a job for each class at its top level.

    A file that is not UTF-8 is tried once more, as Latin-1. One that is not Python fails with its SyntaxError.
    """
    source = Path(path).read_bytes()
    try:
        tree = ast.parse(source.decode(encoding))
    except UnicodeDecodeError as error:
        raise self.retry(args=(path, "latin-1"), exc=error) from None

    nodes = list(ast.walk(tree))
    functions = [
        (length(node), node.name) for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in classes:
        measure_class.delay(path, encoding, node.lineno, node.end_lineno)

    return {
        "lines": source.count(b"\n"),
        "classes": sum(isinstance(node, ast.ClassDef) for node in nodes),
        "functions": len(functions),
        "longest_function": max(functions, default=None),
        "sha256": hashlib.sha256(source).hexdigest(),
        "class_jobs": len(classes),
    }


@app.task
def measure_class(path: str, encoding: str, first: int, last: int) -> dict[str, Any]:
    """Measure the class that stands between two lines of a file."""
    with open(path, encoding=encoding) as file:
        node = ast.parse("".join(islice(file, first - 1, last))).body[0]
    assert isinstance(node, ast.ClassDef)
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {
        "name": node.name,
        "lines": last - first + 1,
        "methods": len(methods),
        "doc": ast.get_docstring(node) is not None,
    }


@app.task
def survey_imports(folder: str) -> list[str]:
    """Name the modules that the files of one folder import."""
    return sorted({name for path in Path(folder).glob("*.py") for name in IMPORT.findall(path.read_text("latin-1"))})


def length(node: ast.AST) -> int:
    """Lines from the first to the last of a definition."""
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined, no-any-return]
