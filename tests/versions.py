"""``make test-versions``: tests with real workers on the lowest versions that pyproject.toml allows.

Pythons are looked for on the path and among pyenv's, and each gets an environment of its own, ``.venv-lowest-3.10``.
The oldest one runs `MANY`. The newest one shows that a worker runs there, by `FEW`; with ``--all``, each between does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

ROOT = Path(__file__).parents[1]
#: As in pyproject.toml, which tests/unit/test_versions.py compares.
LOWEST = {"celery": "5.5.0", "kombu": "5.5.2", "sqlalchemy": "2.0.31", "psycopg[binary]": "3.2.2"}
#: The Pythons that are looked for.
MINORS = range(10, 15)
FEW = ["tests/unit/test_internals.py", "tests/integration/test_unknown_celery.py::test_a_worker"]
MANY = [
    "tests/unit/test_internals.py",
    "tests/integration/test_unknown_celery.py",
    "tests/property/test_fast_path.py",
    "tests/integration/test_discovery.py",
    "tests/integration/test_pools.py",
    "tests/integration/test_ahead.py",
    "tests/integration/test_embedded.py",
]
_SAY_VERSION = "import sys, json; print(json.dumps(sys.version_info[:2]))"


def pythons() -> Iterator[tuple[str, str]]:
    """Version and path of each Python that runs."""
    for minor in MINORS:
        candidates = [which(f"python3.{minor}"), *sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))]
        for candidate in filter(None, candidates):
            asked = subprocess.run([candidate, "-c", _SAY_VERSION], capture_output=True, text=True)
            if asked.returncode == 0 and json.loads(asked.stdout) == [3, minor]:
                yield f"3.{minor}", str(candidate)
                break


def environment(version: str, python: str) -> Path:
    """The Python of an environment with the lowest versions, made anew when pyproject.toml is newer."""
    folder = ROOT / f".venv-lowest-{version}"
    made, its_python = folder / "made", folder / "bin" / "python"
    if not made.exists() or made.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        lowest = [f"{package}=={number}" for package, number in LOWEST.items()]
        print(f"Building {folder.name}: {', '.join(lowest)} ...", flush=True)
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        pip = [its_python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--editable", f"{ROOT}[versions]", *lowest], check=True)
        made.touch()
    return its_python


def main() -> None:
    found = list(pythons())
    if not found:
        sys.exit(f"no Python of 3.{MINORS[0]} to 3.{MINORS[-1]} was found")
    if "--all" not in sys.argv:
        found = list(dict.fromkeys([found[0], found[-1]]))
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(environment, version, python) for version, python in found]
        for (version, _), its_python, tests in zip(found, made, [MANY, *[FEW] * len(found)], strict=False):
            print(f"Python {version}, Celery {LOWEST['celery']}", flush=True)
            command = [its_python.result(), "-m", "pytest", "-q", "-n", "3", "--dist", "loadgroup", *tests]
            if code := subprocess.run(command, cwd=ROOT).returncode:
                sys.exit(code)


if __name__ == "__main__":
    main()
