"""``python -m benchmarks``: measure what can be reached, print the table, draw the plot."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

from benchmarks import report
from benchmarks.scenarios import ALL
from benchmarks.systems import reachable


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="the medians of so many (default: 3)")
    parser.add_argument("--small", action="store_true", help="one round with few tasks, to see that it runs")
    parser.add_argument("--system", action="append", help="only systems whose names begin so; may be repeated")
    parser.add_argument("--scenario", action="append", help="only scenarios whose names begin so; may be repeated")
    parser.add_argument("--plot", type=Path, help="where to draw the plot, such as benchmarks.svg")
    options = parser.parse_args()
    systems = reachable(options.system)
    scenarios = [one for one in ALL if not options.scenario or one.name.startswith(tuple(options.scenario))]
    if not systems or not scenarios:
        parser.error("there is nothing to measure: no system, or no scenario, has such a name and can be reached")
    figures: report.Figures = {}
    for scenario in scenarios:
        number = scenario.small if options.small else scenario.number
        measured: dict[str, list[float]] = {}
        for _ in range(1 if options.small else options.rounds):
            for system in systems:  # in turn, so that what disturbs the machine disturbs them all
                if not system.name.startswith(scenario.only):
                    continue
                try:
                    measured.setdefault(system.name, []).append(scenario.measure(system, number))
                except Exception as error:
                    print(f"{system.name}, {scenario.name}: {error}")
        figures[scenario.name] = {name: median(values) if values else None for name, values in measured.items()}
        print(scenario.name, {name: round(value, 2) for name, value in figures[scenario.name].items() if value})
    names = [system.name for system in systems]
    print(f"\nMedians; in brackets, how many times as good {names[0]} is. {report.machine()}.\n")
    print(report.table(scenarios, names, figures))
    if options.plot:
        report.plot(scenarios, names, figures, options.plot)
        print(f"\nThe plot is in {options.plot}.")


if __name__ == "__main__":
    main()
