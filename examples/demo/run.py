"""Index the standard library of the Python that runs this, with a real Celery worker and a SQL table.

    python examples/demo/run.py [--files N]

The tasks are in indexer.py, plain Celery. This script starts ``celery -A indexer worker`` in a scratch folder, where
the jobs live in a SQLite file; sends a job for each file and each folder; watches the table while they run; and reads
back from it what was found and how every job ended. It exits with 1 if a job was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from celery import Task
from display import ProgressBar, print_table
from indexer import app, index_file, measure_class, survey_imports

from kathikon_celery.job import TERMINAL, Job, State
from kathikon_celery.storage import Storage

STDLIB = Path(sysconfig.get_path("stdlib"))

#: Files that fail or need a second try are in CPython's test suite; not every Python has it installed, so bring two.
STRAYS = {"python2.py": b'print "Hello"\n', "latin1.py": b"class Caf\xe9:\n    pass\n"}

#: Seconds in which no job ends, after which something must be wrong.
PATIENCE = 60.0


class Trouble(Exception):
    """The jobs did not all end as they should."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Index Python's standard library with Celery on a SQL table.")
    parser.add_argument("--files", type=int, metavar="N", help="index only the first N files of the library")
    limit = parser.parse_args().files
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)  # all of them end it as Ctrl-C does
    with scratch_folder() as folder, closing(Storage.for_app(app)) as storage:
        log = folder / "worker.log"
        print(f"The jobs are in {folder / 'kathikon.db'}, the worker's log is beside it.")
        try:
            with celery_worker(log) as worker:
                started = time.monotonic()
                sent = send_jobs(source_files(folder, limit))
                watch(storage, worker)
                seconds = time.monotonic() - started
            jobs = storage.all()
            results = {job.id: app.AsyncResult(job.id).result for job in jobs}
            check(jobs, results, sent)
        except Trouble as trouble:
            print(f"\n{trouble}\n\nThe worker's log ends with:", *log.read_text().splitlines()[-40:], sep="\n")
            return 1
        show_findings(jobs, results, sent)
        show_jobs(storage, jobs, results, sent)
        print(f"\n{len(jobs):,} jobs in {seconds:.0f} seconds, none lost.")
        return 0


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Work in an empty folder with Kathikon's defaults, which keep the jobs in a SQLite file right there."""
    for name in [name for name in os.environ if name.startswith("KATHIKON_")]:
        del os.environ[name]
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="kathikon-demo-", ignore_cleanup_errors=True) as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(home)


@contextmanager
def celery_worker(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Celery worker as one would in a shell. Afterwards it and its pool are gone, whatever happened."""
    processes = max(2, min(os.cpu_count() or 2, 8))
    command = f"-m celery -A indexer worker --concurrency {processes} --loglevel INFO".split()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield worker
    finally:
        worker.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def source_files(folder: Path, limit: int | None = None) -> list[Path]:
    """Every source file of the standard library, or the first *limit*, after two strays that are made here."""
    strays = folder / "strays"
    strays.mkdir()
    for name, source in STRAYS.items():
        (strays / name).write_bytes(source)
    installed_later = {"site-packages", "dist-packages"}
    library = [path for path in sorted(STDLIB.rglob("*.py")) if not installed_later & set(path.parts)]
    return [*sorted(strays.iterdir()), *library[:limit]]


def send_jobs(files: list[Path]) -> dict[str, Path]:
    """Send a job for each file, and one for each folder that starts some seconds later; return what each is about."""
    sent, bar = {}, ProgressBar()
    for number, path in enumerate(files, start=1):
        sent[index_file.delay(str(path)).id] = path
        bar.draw(number / len(files), f"{number:,} files sent")
    bar.end()
    for number, folder in enumerate(sorted({path.parent for path in files})):
        sent[survey_imports.apply_async((str(folder),), countdown=2 + number % 5).id] = folder
    return sent


def watch(storage: Storage, worker: subprocess.Popen[bytes]) -> None:
    """Show the progress until every job has ended. Raises Trouble if they do not."""
    bar, last, deadline = ProgressBar(), -1, 0.0
    try:
        while True:
            todo: Counter[str] = Counter()
            done: Counter[str] = Counter()
            for (queue, state), number in storage.counts().items():
                (done if state in TERMINAL else todo)[queue] += number
            # A file that is still to be read will send some classes: as many, it is assumed, as the others did.
            to_come = todo["default"] * (done["classes"] + todo["classes"]) / (done["default"] or 1)
            bar.draw(
                done.total() / (done.total() + todo.total() + to_come),
                f"{done.total():,} jobs done, {todo['default']:,} files and {todo['classes']:,} classes to do",
            )
            if not todo:
                return
            if worker.poll() is not None:
                raise Trouble(f"The worker ended by itself, with exit code {worker.returncode}.")
            if done.total() > last:
                last, deadline = done.total(), time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                raise Trouble(f"No job has ended for {PATIENCE:g} seconds; {todo.total():,} have not.")
            time.sleep(0.1)
    finally:
        bar.end()


def check(jobs: list[Job], results: dict[str, Any], sent: dict[str, Path]) -> None:
    """Compare what was sent with what became of it. Raises Trouble if a job is missing, or failed without a cause."""
    rows = {job.id for job in jobs}
    announced = sum(results[job.id]["class_jobs"] for job in completed(jobs, index_file))
    problems = [
        f"{short(path)} was sent and is not in the table" for job_id, path in sent.items() if job_id not in rows
    ]
    if (measured := len(completed(jobs, measure_class))) != announced:
        problems.append(f"{announced:,} classes were sent, {measured:,} measured")
    problems += [
        f"{job.task} {job.id} is {job.state}: {results[job.id]!r}"
        for job in jobs
        if job.state is not State.COMPLETED and not isinstance(results[job.id], SyntaxError)
    ]
    if problems:
        raise Trouble("\n".join(problems))


def show_findings(jobs: list[Job], results: dict[str, Any], sent: dict[str, Path]) -> None:
    """Print what the index found."""
    files = {short(sent[job.id]): results[job.id] for job in completed(jobs, index_file)}
    classes = [results[job.id] for job in completed(jobs, measure_class)]
    importers = Counter(module for job in completed(jobs, survey_imports) for module in results[job.id])
    lines, function, where = max((*(found["longest_function"] or (0, "")), name) for name, found in files.items())
    biggest = max(classes, key=lambda found: found["methods"])
    digest = hashlib.sha256("".join(found["sha256"] for _, found in sorted(files.items())).encode())
    print_table(
        f"Found in the standard library of Python {platform.python_version()}",
        [
            ("files", f"{len(files):,}"),
            *((key, f"{sum(found[key] for found in files.values()):,}") for key in ("lines", "classes", "functions")),
            ("longest function", f"{function}, {lines:,} lines, in {where}"),
            ("most methods", f"class {biggest['name']}, {biggest['methods']:,}"),
            ("with a docstring", f"{sum(found['doc'] for found in classes):,} of {len(classes):,} top-level classes"),
            ("most imported", ", ".join(f"{name} ({n} folders)" for name, n in importers.most_common(4))),
            ("digest of all", digest.hexdigest()[:32]),
        ],
    )


def show_jobs(storage: Storage, jobs: list[Job], results: dict[str, Any], sent: dict[str, Path]) -> None:
    """Print how the jobs ended, as the table has it, and which of them had trouble with their file."""
    counts = storage.counts()
    states = sorted({state for _, state in counts})
    rows = [
        (queue, *(f"{counts.get((queue, state), 0):,}" for state in states))
        for queue in sorted({queue for queue, _ in counts})
    ]
    print_table("Jobs in the table kathikon_jobs, by queue and state", rows, ("queue", *states))
    failed = [(short(sent[job.id]), results[job.id].msg) for job in jobs if job.state is State.DEAD]
    print_table("Dead: not Python 3", sorted(failed))
    again = [
        (short(sent[job.id]), job.errors[0]["reason"].partition("(")[0])
        for job in completed(jobs, index_file)
        if job.errors
    ]
    print_table("Completed at the second try, as Latin-1", sorted(again))


def completed(jobs: list[Job], task: Task) -> list[Job]:
    """Those of the jobs that ran this task and returned."""
    return [job for job in jobs if job.task == task.name and job.state is State.COMPLETED]


def short(path: Path) -> str:
    """A file's name as seen from the standard library or the scratch folder."""
    return str(path.relative_to(STDLIB if path.is_relative_to(STDLIB) else path.parents[1]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted; the worker is stopped.")
        sys.exit(130)
