"""What `make test-versions` calls the lowest versions are those that pyproject.toml allows."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.versions import FEW, LOWEST, MANY, ROOT, pythons

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["postgresql"]]
    for package, number in LOWEST.items():
        assert any(one.startswith(f"{package}>={number},") for one in required), package


def test_the_tests_are_there() -> None:
    assert all(Path(ROOT, one.partition("::")[0]).is_file() for one in [*FEW, *MANY])


def test_this_python_is_found_among_them() -> None:
    assert f"3.{sys.version_info[1]}" in dict(pythons())
