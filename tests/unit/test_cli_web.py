"""``celery kathikon web``: what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.test_cli import invoke, make_app

pytest.importorskip("starlette")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "0.0.0.0", "--auth", "none"), "'0.0.0.0' can be reached by others"),
        (("--auth", "file:nowhere"), "No such file"),
        (("--auth", "nowhere:nothing"), "No module named 'nowhere'"),
        (("--auth", "os:sep"), "that is no callable"),
        (("--port", "70000"), "70000 is not in the range"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    done = invoke(make_app(f"sqlite:///{tmp_path}/k.db"), "web", *options)
    assert (done.exit_code, said in done.output) == (2, True), done.output


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_file_of_passwords_that_others_may_read(tmp_path: Path) -> None:
    path = tmp_path / "users"
    for mode, text, said in (
        (0o644, "ada:secret", "chmod 600"),
        (0o600, "ada", "line 1 of"),
        (0o600, "", "are needed"),
    ):
        path.write_text(text)
        path.chmod(mode)
        done = invoke(make_app(f"sqlite:///{tmp_path}/k.db"), "web", "--auth", f"file:{path}")
        assert (done.exit_code, said in done.output) == (2, True), done.output
