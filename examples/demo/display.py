"""What the demo shows: a progress bar and tables, in plain text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence


class ProgressBar:
    """A bar on a terminal; elsewhere a line for every tenth of the way."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._tenth = -1

    def draw(self, share: float, text: str) -> None:
        """Show the share that is done, from 0 to 1, with a text beside it."""
        if self._terminal:
            width = max(0, min(32, shutil.get_terminal_size().columns - len(text) - 8))
            filled = round(share * width)
            print(f"\r{'█' * filled}{'░' * (width - filled)} {share:4.0%}  {text}", end="\033[K", flush=True)
        elif int(share * 10) > self._tenth:
            self._tenth = int(share * 10)
            print(f"{share:4.0%}  {text}", flush=True)

    def end(self) -> None:
        """Leave the bar as it is, and go on below it."""
        if self._terminal:
            print()


def print_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows under a title: the first column to the left, the others to the right if there is a header."""
    lines = [header, *rows] if header else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widest = max(len(title), sum(widths) + 2 * (len(widths) - 1))
    rule = "─" * min(widest, shutil.get_terminal_size().columns)
    print(f"\n{title}\n{rule}")
    for number, (first, *others) in enumerate(lines):
        cells = [text.rjust(width) if header else text for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        if header and number == 0:
            print(rule)
