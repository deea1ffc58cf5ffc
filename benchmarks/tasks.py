"""The app that is measured; which broker it runs on is in the environment."""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from functools import cache

from celery import Celery

from benchmarks.names import FOLDER, SYSTEM
from kathikon_celery import Limit

app = Celery("benchmarks")
_system = json.loads(os.environ[SYSTEM])
if _system["config"]:
    app.config_from_object(_system["config"])
app.conf.update(_system["settings"])


@cache
def _starts(pid: int) -> mmap.mmap:
    with open(os.path.join(os.environ[FOLDER], "starts"), "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _note_start(number: int) -> None:
    struct.pack_into("d", _starts(os.getpid()), 8 * number, time.monotonic())


@app.task(ignore_result=True)
def nothing(number: int) -> None:
    """No work."""
    _note_start(number)


@app.task(ignore_result=True, limits=[Limit("hot", concurrency=50)])
def hot(number: int) -> None:
    """No work, and one limit for all."""
    _note_start(number)


@app.task(ignore_result=True, limits=[Limit("key", key=lambda number: number % 1000, concurrency=1)])
def keyed(number: int) -> None:
    """No work, and a limit for each of 1,000 keys."""
    _note_start(number)


@app.task
def value(number: int) -> int:
    """No work, with a result."""
    _note_start(number)
    return number


@app.task(ignore_result=True)
def nap(number: int, seconds: float) -> None:
    """Long work."""
    _note_start(number)
    time.sleep(seconds)
