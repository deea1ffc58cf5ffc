"""The benchmarks, run small: each figure is there. No time is asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.profile import STEPS

ROOT = Path(__file__).parents[2]


def measure(url: str, *options: str, program: str = "benchmarks") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", program, *options],
        cwd=ROOT, env=os.environ | {"BENCHMARKS_POSTGRESQL": url},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def table(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return {name: figures for name, *figures in rows}


@pytest.mark.timeout(300)
def test_the_table_is_printed_and_the_plot_drawn(postgresql_url: str, tmp_path: Path) -> None:
    only = ["enqueue", "delay()"]
    chosen = [option for name in only for option in ("--scenario", name)]
    plot = tmp_path / "plot.svg"
    done = measure(postgresql_url, "--small", "--system", "kathikon", "--plot", str(plot), *chosen)
    assert done.returncode == 0, done.stderr
    figures = table(done.stdout)
    assert figures.pop("") == ["kathikon, SQLite", "kathikon, PostgreSQL"]
    assert {name.split(",")[0] for name in figures if name != "---"} == {
        "enqueue", "enqueue in bulk", "delay() + get()"
    }  # fmt: skip
    assert all(all(row) for row in figures.values()), done.stdout
    assert plot.read_text().rstrip().endswith("</svg>")


@pytest.mark.timeout(300)
def test_what_postgresql_counts_is_printed(postgresql_url: str) -> None:
    options = [
        option for name in ("transactions, 4", "lock waits, 1 w", "calls, 1 w") for option in ("--scenario", name)
    ]
    done = measure(postgresql_url, "--small", "--system", "kathikon, P", *options)
    figures = table(done.stdout)
    assert float(figures["transactions, 4 workers, a job"][0]) > 0
    assert float(figures["calls, 1 workers, per 1,000 jobs"][0]) > 0
    assert "lock waits, 1 workers, per 1,000 jobs" in figures


def test_what_cannot_be_reached_is_said() -> None:
    done = measure("postgresql+psycopg://127.0.0.1:9/none", "--small", "--system", "kathikon, P")
    assert done.returncode == 2
    assert "not reachable, left out: kathikon, PostgreSQL" in done.stdout
    assert "there is nothing to measure" in done.stderr


@pytest.mark.timeout(300)
def test_the_profile_says_what_each_part_costs(postgresql_url: str) -> None:
    done = measure(postgresql_url, "--number", "500", program="benchmarks.profile")
    assert done.returncode == 0, done.stderr
    for part in ("kathikon, SQLite", "kathikon, PostgreSQL", "main thread", "processes"):
        assert part in done.stdout
    # Which of them is seen within a tenth of a second is a matter of chance.
    assert any(f"main thread: {step}" in done.stdout for step in set(STEPS.values()) - {"waits"})
    assert "no statements: " in done.stdout  # the tests' server has no pg_stat_statements


@pytest.mark.timeout(300)
def test_limits_are_measured(postgresql_url: str) -> None:
    options = ["--scenario", "claims, 10,000 keys, 2"]
    figures = table(measure(postgresql_url, "--small", "--system", "kathikon, S", *options).stdout)
    assert float(figures["claims, 10,000 keys, 2 claimers, times as long, p50"][0]) > 0
