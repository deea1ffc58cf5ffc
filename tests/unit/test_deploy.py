"""The units and manifests of examples/deploy, by their own tools where the machine has them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
FOLDER = Path(__file__).parents[2] / "examples" / "deploy"


@pytest.mark.parametrize("name", ["kathikon-worker@.service", "kathikon-web.service"])
def test_units(name: str, tmp_path: Path) -> None:
    text = (FOLDER / name).read_text()
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert lines["ExecStart"].startswith("/srv/proj/venv/bin/celery -A proj ")
    if name.startswith("kathikon-worker"):
        assert (lines["KillMode"], lines["KillSignal"]) == ("mixed", "SIGTERM")
    if which("systemd-analyze") is None:
        return
    runnable = tmp_path / name
    runnable.write_text(text.replace("/srv/proj/venv/bin/celery", which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(runnable)], capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if name.replace("@", "@i") in line or name in line] == []


def test_compose_and_kubernetes() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    worker = compose["services"]["worker"]
    assert set(compose["services"]) == {"database", "worker", "dashboard"}
    assert worker["depends_on"] == {"database": {"condition": "service_healthy"}}
    (deployment,) = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert spec["terminationGracePeriodSeconds"] == 300
    for command in (worker["healthcheck"]["test"][1:], compose["services"]["dashboard"]["command"]):
        assert command[:3] == ["celery", "-A", "proj"]
