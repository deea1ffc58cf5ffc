"""A storage backend of an application's own sees all that happens to its jobs, in every process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import chain, chord

from kathikon_celery import bulk
from kathikon_celery.job import TERMINAL
from kathikon_celery.settings import SettingError, Settings
from kathikon_celery.storage import Storage
from tests.integration.conftest import client_of
from tests.support import apps, audited
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

BACKEND = "tests.support.audited:AuditedBackend"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_it_sees_every_step(
    database_url: str, start_worker: Callable[..., WorkerProcess], tmp_path: Path, pool: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    audit = tmp_path / "audit"
    monkeypatch.setenv(audited.FILE, str(audit))
    monkeypatch.setenv("KATHIKON_STORAGE_BACKEND", BACKEND)
    start_worker(pool=pool, env={audited.FILE: str(audit), "KATHIKON_STORAGE_BACKEND": BACKEND})
    with client_of(database_url) as app:
        sent = [apps.add.delay(1, n) for n in range(20)]  # Celery's way, then the short one
        sent.append(apps.add.apply_async((1, 1), countdown=0.2))
        sent.append(app.send_task(apps.add.name, (2, 2)))
        sent.append(apps.quiet.delay(1))
        with bulk():
            sent += [apps.add.delay(2, n) for n in range(5)]
        sent.append(apps.fail.delay("seen"))
        sent.append(apps.reject.delay())
        sent.append(apps.after_retries.delay(1, 5))
        sent.append(chain(apps.add.s(1, 1), apps.add.s(2)).delay())
        sent.append(chord([apps.add.s(n, n) for n in range(3)], apps.total.s()).delay())
        sent.append(apps.append_early.delay(str(tmp_path / "early"), "x"))
        storage = Storage.for_app(app)
        assert type(storage.backend).__name__ == "AuditedBackend"
        wait_until(lambda: all((job := storage.fetch(one.id)) and job.state in TERMINAL for one in sent), 60)
        jobs = storage.all()
        seen = [line.split() for line in apps.read_lines(audit)]
    ids = {job.id for job in jobs}
    assert {line[1] for line in seen if line[0] == "published"} == ids
    numbers = {line[1]: line[2] for line in seen if line[0] == "claimed"}
    assert numbers.keys() == ids
    ended = {line[1] for line in seen if line[0] == "ended"}
    retried = {job.id for job in jobs if job.task == apps.after_retries.name}
    assert {job.id for job in jobs if numbers[job.id] not in ended} <= retried


def test_what_is_no_storage_backend_is_named() -> None:
    for path, said in {
        "tests.integration.test_storage_backend:Path": "no subclass of kathikon_celery.storage.sql:SQLBackend",
        "tests.integration.test_storage_backend:BACKEND": "is no class",
        "tests.integration.test_storage_backend:Nothing": "cannot be imported",
        "kathikon_celery.storage.backend:StorageBackend": "has no all, ",
    }.items():
        with pytest.raises(SettingError, match=said) as raised:
            Storage(settings=Settings(storage_backend=path))
        assert path in str(raised.value)
