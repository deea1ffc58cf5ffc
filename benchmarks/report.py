"""Figures as a table and as a plot."""

from __future__ import annotations

import platform
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from benchmarks.scenarios import Scenario

#: By scenario and system; `None` where it failed or does not apply.
Figures = dict[str, dict[str, float | None]]


def machine() -> str:
    """Where and with what it was measured."""
    packages = []
    for name in ("celery", "kombu", "kathikon-celery", "sqlalchemy", "psycopg", "redis", "amqp"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    today = datetime.now().astimezone().date()
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{today}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()},"
        f" Python {sys.version.split()[0]}, {', '.join(packages)}"
    )


def table(scenarios: list[Scenario], systems: list[str], figures: Figures) -> str:
    """Markdown: the medians, and in brackets how many times as good the first system is."""
    lines = ["| | " + " | ".join(systems) + " |", "| --- |" + " --- |" * len(systems)]
    for scenario in scenarios:
        row = figures[scenario.name]
        cells = [_cell(scenario, row.get(system), row.get(systems[0])) for system in systems]
        lines.append(f"| {scenario.name}, {scenario.unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(scenario: Scenario, figure: float | None, first: float | None) -> str:
    if figure is None:
        return ""
    shown = f"{figure:.0f}" if figure >= 100 else f"{figure:.2g}" if figure < 10 else f"{figure:.1f}"
    if not first or not figure or figure == first:
        return shown
    return f"{shown} ({(first / figure if scenario.more_is_better else figure / first):.2f}×)"


def plot(scenarios: list[Scenario], systems: list[str], figures: Figures, path: Path) -> None:
    """The rates as bars, each group relative to its best. Needs matplotlib."""
    from matplotlib.figure import Figure

    shown = [one for one in scenarios if one.more_is_better and not one.only]
    canvas = Figure(figsize=(10, 4.5), layout="constrained")
    axes = canvas.subplots()
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        heights = []
        for scenario in shown:
            row = [figure for figure in figures[scenario.name].values() if figure]
            heights.append((figures[scenario.name].get(system) or 0) / max(row, default=1.0))
        axes.bar([place + index * width for place in range(len(shown))], heights, width, label=system)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(shown))], [one.name for one in shown], rotation=15)
    axes.set_ylabel("rate, the best is 1")
    axes.legend(ncols=len(systems), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    canvas.savefig(path)
