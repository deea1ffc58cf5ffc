"""A process that sends tasks: ``python -m benchmarks.client WHAT NUMBER ARGUMENT`` prints when."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from benchmarks.tasks import hot, keyed, nap, nothing, value
from kathikon_celery import bulk

#: Seconds from now at which countdowns begin to be due, and between one and the next.
DUE_FROM, DUE_STEP = 4.0, 0.01


def _timed(call: Callable[[int], object], numbers: range, pause: float = 0.0) -> Iterator[tuple[float, float]]:
    for number in numbers:
        began = time.monotonic()
        call(number)
        yield began, time.monotonic()
        if pause:  # to sleep for no time at all takes longer than to send to some brokers
            time.sleep(pause)


def send(number: int, argument: str) -> list[tuple[float, float]]:
    """``delay()`` by ``delay()``; *argument* names the task."""
    task = {"nothing": nothing, "value": value, "hot": hot, "keyed": keyed}[argument]
    return list(_timed(task.delay, range(number)))


def send_in_bulk(number: int, argument: str) -> list[tuple[float, float]]:
    """The same within `bulk`, where the broker is Kathikon."""
    is_ours = str(nothing.app.conf.broker_url).startswith("kathikon")
    began = time.monotonic()
    with bulk() if is_ours else nullcontext():
        for one in range(number):
            nothing.delay(one)
    return [(began, time.monotonic())]


def trickle(number: int, argument: str) -> list[tuple[float, float]]:
    """Twenty a second."""
    return list(_timed(nothing.delay, range(number), 0.05))


def round_trips(number: int, argument: str) -> list[tuple[float, float]]:
    """``delay()`` and ``get()``."""
    return list(_timed(lambda one: value.delay(one).get(timeout=60, interval=0.005), range(number)))


def countdowns(number: int, argument: str) -> list[tuple[float, float]]:
    """Tasks with a due time; *began* is that time."""
    due = []
    for one in range(number):
        countdown = DUE_FROM + one * DUE_STEP
        nothing.apply_async((one,), countdown=countdown)
        due.append(time.monotonic() + countdown)
    return [(moment, moment) for moment in due]


def naps(number: int, argument: str) -> list[tuple[float, float]]:
    """Tasks that take *argument* seconds."""
    return list(_timed(lambda one: nap.delay(one, float(argument)), range(number)))


if __name__ == "__main__":
    what, number, argument = sys.argv[1:]
    print(json.dumps(globals()[what](int(number), argument)))
