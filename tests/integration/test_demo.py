"""The demo, run as `make demo` runs it: what it prints is counted anew, and Ctrl-C ends all of it."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]

#: Files of the standard library that are indexed: enough for a few folders and some dozens of classes.
FILES = 20


@contextmanager
def demo(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run the demo in a session of its own, its scratch folder and what it prints in *folder*."""
    with (folder / "printed").open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-B", str(ROOT / "examples/demo/run.py"), *options],
            env=os.environ | {"TMPDIR": str(folder), "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            for left in descendants(process):
                left.kill()
            process.kill()
            process.wait()


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def printed(folder: Path) -> str:
    return (folder / "printed").read_text("utf-8")


def library(limit: int) -> list[Path]:
    """The first files of the standard library, in the order of their paths."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path for path in sorted(folder.rglob("*.py")) if not {"site-packages", "dist-packages"} & {*path.parts}][
        :limit
    ]


def words(path: Path) -> list[tokenize.TokenInfo]:
    """The words ``class`` and ``def`` of a file, by Python's tokenizer: each begins one definition."""
    with path.open("rb") as file:
        return [token for token in tokenize.tokenize(file.readline) if token.string in ("class", "def")]


def found(text: str, title: str) -> str:
    """What a table that the demo printed has beside *title*."""
    line = re.search(rf"^{re.escape(title)}  +(.+)$", text, re.MULTILINE)
    assert line, f"no {title!r} in:\n{text}"
    return line[1]


def test_what_it_prints_is_so(tmp_path: Path) -> None:
    with demo(tmp_path, "--files", str(FILES)) as process:
        code = process.wait(100)
        text = printed(tmp_path)
    assert code == 0, text
    assert max(len(line) for line in text.splitlines() if line.startswith("─")) <= 80

    files = library(FILES)
    defined = [word for path in files for word in words(path)]
    contents = {str(path.relative_to(sysconfig.get_path("stdlib"))): path.read_bytes() for path in files}
    contents["strays/latin1.py"] = b"class Caf\xe9:\n    pass\n"
    classes = 1 + sum(word.string == "class" for word in defined)
    at_top_level = 1 + sum(word.string == "class" and word.start[1] == 0 for word in defined)
    folders = 1 + len({path.parent for path in files})
    digests = "".join(hashlib.sha256(contents[name]).hexdigest() for name in sorted(contents))

    assert found(text, "files") == f"{FILES + 1}"
    assert found(text, "lines") == f"{sum(content.count(bytes([10])) for content in contents.values()):,}"
    assert found(text, "classes") == f"{classes:,}"
    assert found(text, "functions") == f"{sum(word.string == 'def' for word in defined):,}"
    assert found(text, "with a docstring").endswith(f" of {at_top_level:,} top-level classes")
    assert found(text, "digest of all") == hashlib.sha256(digests.encode()).hexdigest()[:32]

    jobs = text.partition("by queue and state")[2]
    assert found(jobs, "queue").split() == ["completed", "dead"]
    assert found(jobs, "classes").split() == [f"{at_top_level:,}", "0"]
    assert found(jobs, "default").split() == [str(FILES + 1 + folders), "1"]
    assert found(jobs, "strays/python2.py").startswith("Missing parentheses")
    assert found(jobs, "strays/latin1.py") == "UnicodeDecodeError"
    assert re.search(rf"^{FILES + 2 + folders + at_top_level:,} jobs in \d+ seconds, none lost\.$", text, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["printed"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    def at_work() -> list[psutil.Process]:
        """Its worker with a pool of two, once there are jobs for them."""
        found = descendants(process) if "jobs done" in printed(tmp_path) else []
        return found if len(found) >= 3 else []

    with demo(tmp_path, "--files", "150") as process:
        running = wait_until(at_work, 60)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
        text = printed(tmp_path)
    assert code == 130, text
    assert text.endswith("\nInterrupted; the worker is stopped.\n")
    assert "Traceback" not in text
    _, alive = psutil.wait_procs(running, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert [path.name for path in tmp_path.iterdir()] == ["printed"]
