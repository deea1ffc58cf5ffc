"""This machine and its processes: what tells two machines apart, and whether a process still runs.

No value here depends on the wall clock of a Linux system, which may be set while processes run.
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil


@cache
def machine() -> str:
    """Return a name of what process ids are unique in: on Linux the boot and the namespace of process ids."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return f"{platform.node()}/{psutil.boot_time():.0f}"


def start_of(pid: int) -> float | None:
    """Return when the process *pid* of this machine began, or `None` if it has ended.

    On Linux in seconds since the boot. Elsewhere in epoch seconds: those systems note the time when a process begins.
    """
    if pid <= 0:
        return None
    try:
        if sys.platform != "linux":
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
        # The name of the program, in parentheses, may contain anything. The state and the start follow it.
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if state in b"ZX" else int(fields[18]) / os.sysconf("SC_CLK_TCK")
    except (OSError, psutil.NoSuchProcess):
        return None


def is_running(pid: int, started: float) -> bool:
    """Whether the process *pid* of this machine, which began at *started* (see `start_of`), still runs."""
    try:
        start = start_of(pid)
    except psutil.AccessDenied:
        return True
    if start is None and pid > 0 and sys.platform == "linux":
        with suppress(ProcessLookupError, OverflowError):
            try:
                os.kill(pid, 0)
            except PermissionError:  # a process of another user, which /proc may hide
                return True
    return start is not None and isinstance(started, float) and abs(start - started) < 1.0  # else nonsense
