"""Sends jobs, as a process of its own: ``python -m tests.endurance.producer --help``."""

import argparse
import time
import traceback
from collections.abc import Callable

from celery import chain, chord

from tests.endurance.app import app, body, journal, part, work, work_again, work_once
from tests.endurance.journal import Event

#: What some of the jobs are, if they are mixed.
MIXED: list[Callable[[int, float], object]] = [
    lambda job, seconds: work_again.delay(job, seconds),
    lambda job, seconds: work.apply_async((job, seconds), countdown=1.0),
    lambda job, seconds: chain(part.si(job, 0, seconds), work.si(job, seconds)).apply_async(),
    lambda job, seconds: chord([part.s(job, one, seconds) for one in range(3)], body.s(job, 3, seconds)).apply_async(),
]


def send(
    first: int,
    count: int,
    *,
    seconds: float = 0.0,
    rate: float = 0.0,
    countdown: float = 0.0,
    parts: int = 0,
    once: int = 0,
    mixed: int = 0,
    limited: int = 0,
) -> None:
    """Send jobs `first` to `first` + `count`, `rate` a second (0: as fast as they go), each once.

    With `parts` each is a chord of so many. With `once`, every so many is acknowledged before it starts.
    With `limited`, they have limits on so many keys, and take 20 to 50 ms.
    With `mixed`, of ten jobs one is retried, one is due a second later, one ends a chain, and one is a chord of three.

    A job whose ``delay()`` raises may or may not have reached the broker, so it is recorded as refused and not sent
    again, and its traceback printed.
    """
    begin = time.monotonic()
    for number in range(count):
        if rate:
            time.sleep(max(0.0, begin + number / rate - time.monotonic()))
        job, at = first + number, time.monotonic()
        try:
            if mixed and job % 10 < len(MIXED):
                MIXED[job % 10](job, seconds)
            elif limited:
                app.tasks["endurance.limited"].delay(job, job % limited, 0.02 + 0.03 * (job % 7) / 6)
            elif parts:
                chord([part.s(job, one, seconds) for one in range(parts)], body.s(job, parts, seconds)).apply_async()
            else:
                task = work_once if once and job % once == 0 else work
                task.apply_async((job, seconds), countdown=countdown or None)
        except Exception:
            journal.write(Event.REFUSED, job, at=at)
            traceback.print_exc()
        else:
            journal.write(Event.SENT, job, at=at)


def main() -> None:
    """Read the command line and send."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int, help="number of the first job")
    parser.add_argument("count", type=int, help="how many jobs")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long each job sleeps")
    parser.add_argument("--rate", type=float, default=0.0, help="jobs a second; 0: as fast as they go")
    parser.add_argument("--countdown", type=float, default=0.0, help="seconds until the jobs are due")
    parser.add_argument("--parts", type=int, default=0, help="how many parts each job has; 0: it is no chord")
    parser.add_argument("--once", type=int, default=0, help="every so many is acknowledged before it starts; 0: none")
    parser.add_argument("--mixed", type=int, default=0, help="1: with retries, countdowns, chains and chords")
    parser.add_argument("--limited", type=int, default=0, help="on how many keys the jobs have limits; 0: none")
    send(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
