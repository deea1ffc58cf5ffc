"""Sends jobs and waits for their results, as a process of its own that measures itself.

    python -m tests.endurance.client --help

Its figures are a file of JSON: the memory that it held, in MB, after each twentieth of the jobs.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import psutil
from celery.result import ResultSet

from tests.endurance.app import journal, work
from tests.endurance.journal import Event

SAMPLES = 20


def memory() -> float:
    """Resident memory of this process, in MB."""
    gc.collect()
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def send(job: int) -> ResultSet:
    """Send one job; its result as a set of one."""
    at = time.monotonic()
    result = work.delay(job, 0.0)
    journal.write(Event.SENT, job, at=at)
    return ResultSet([result])


def send_and_forget(first: int, count: int) -> list[float]:
    """Send jobs, and keep nothing of their results."""
    samples = []
    for number in range(count):
        send(first + number)
        if (number + 1) % (count // SAMPLES) == 0:
            samples.append(memory())
    return samples


def send_and_wait(first: int, count: int, together: int) -> list[float]:
    """Send jobs and wait for their results, so many *together* each time."""
    samples = []
    for begin in range(first, first + count, together):
        results = ResultSet([])
        for job in range(begin, min(begin + together, first + count)):
            results.results += send(job).results
        results.get()
        done = begin + together - first
        del results
        while len(samples) < SAMPLES * done // count:
            samples.append(memory())
    return samples


def main() -> None:
    """Read the command line, do it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int, help="number of the first job")
    parser.add_argument("count", type=int, help="how many jobs")
    parser.add_argument("figures", type=Path, help="the file to write")
    parser.add_argument("--together", type=int, default=0, help="results waited for at once; 0: none")
    options = parser.parse_args()
    if options.together:
        samples = send_and_wait(options.first, options.count, options.together)
    else:
        samples = send_and_forget(options.first, options.count)
    partial = options.figures.with_suffix(".part")
    partial.write_text(json.dumps(samples))
    partial.rename(options.figures)


if __name__ == "__main__":
    main()
