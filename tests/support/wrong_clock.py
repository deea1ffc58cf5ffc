"""A machine whose clock is wrong, for one process."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


def clock_ahead(directory: Path, seconds: int) -> dict[str, str]:
    """The environment of a process whose clock is so many seconds ahead; takes Linux and a C compiler."""
    library = directory / "wrong_clock.so"
    if not library.exists():
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "AHEAD": str(seconds)}
