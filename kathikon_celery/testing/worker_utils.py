"""Copied into the folder of a worker, as ``utils``: the processes of this worker, not those of the whole machine."""

from __future__ import annotations

import json
import os

import psutil

COLUMNS = ["pid", "name", "username", "cmdline", "cpu_percent", "memory_percent", "create_time"]


def get_running_processes_info(columns: list[str] | None = None) -> str:
    """Return *columns* of the worker's main process and of its children, as JSON."""
    main = psutil.Process(int(os.environ["WORKER_PID"]))
    return json.dumps([process.as_dict(columns or COLUMNS) for process in (main, *main.children(recursive=True))])
