"""The database's clock is set while workers run: no job is taken from a worker that lives."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from kathikon_celery.job import State
from kathikon_celery.nodes.machine import is_running, start_of
from kathikon_celery.storage import Storage
from kathikon_celery.storage.tables import nodes
from tests.integration.conftest import client_of
from tests.support import apps
from tests.support.clocks import SteppedClock
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

LEASE = 4.0


def test_no_job_is_taken_from_a_worker_that_lives(
    database_url: str, tmp_path: Path, start_worker: Callable[..., WorkerProcess]
) -> None:
    clock, gate, journal = SteppedClock(database_url, tmp_path), tmp_path / "go on", tmp_path / "journal"

    def begin(name: str) -> WorkerProcess:
        return start_worker(
            name=name, app="tests.support.stepped_apps", pool="threads", concurrency=2,
            env=clock.environment, conf={"kathikon_lease": LEASE, "worker_prefetch_multiplier": 1},
        )  # fmt: skip

    with closing(Storage(database_url)) as storage:

        def leases() -> list[datetime]:
            with storage.database.read() as connection:
                return list(connection.execute(select(nodes.c.lease_until).order_by(nodes.c.id)).scalars())

        def are_renewed(ahead: float) -> bool:
            true = datetime.now(timezone.utc)
            return all(abs((lease - true).total_seconds() - ahead) < 600 for lease in leases())

        workers = [begin("first"), begin("second")]
        with client_of(database_url):
            sent = [apps.wait_for_file.delay(str(gate), str(journal), f"late-{number}") for number in range(2)]
            sent += [apps.wait_for_file_early.delay(str(gate), str(journal)) for _ in range(2)]
            wait_until(lambda: len(apps.read_lines(journal)) == 4, what="both workers run their jobs")
            for ahead in (3600.0, 3e7, 7200.0, -7200.0, 3600.0):
                clock.set_ahead(ahead)
                wait_until(lambda ahead=ahead: are_renewed(ahead), what="the clock was set, and the leases renewed")
            workers.append(begin("third"))
            gate.touch()
            for result in sent:
                assert result.get(timeout=60)
            assert len(apps.read_lines(journal)) == 4
            assert {job.state for job in storage.all()} == {State.COMPLETED}
            assert not any("is dead" in worker.log for worker in workers)

            last = tmp_path / "the last"
            sent = [apps.wait_for_file.delay(str(last), str(journal), f"again-{number}") for number in range(6)]
            wait_until(lambda: len(apps.read_lines(journal)) == 10, what="all workers run their jobs")
            workers[0].signal(signal.SIGSTOP)  # it hangs, and this is noticed as ever
            wait_until(lambda: any("its lease has run out; it held 2 jobs" in worker.log for worker in workers))
            last.touch()
            for result in sent:
                assert result.get(timeout=60)
            assert len(apps.read_lines(journal)) == 12


@pytest.mark.skipif(sys.platform != "linux", reason="there, the system notes when a process began")
def test_a_process_began_when_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch seconds would move with the clock: the system computes them from the time since the boot."""
    pid = os.getpid()
    began = start_of(pid)
    assert began is not None
    boot = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 3600.0)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600.0)
    assert is_running(pid, began)
    assert not is_running(pid, began + 2)
    for nonsense in (0, -1, 2**22 + 1, 2**40, 2**70):
        assert not is_running(nonsense, began)
