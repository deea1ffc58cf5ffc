"""Losses whose tests depend on how busy the machine is: run by ``pytest tests/endurance/lost_databases.py``.

Under load, two workers whose database was replaced did not both answer a ping within 60 seconds.
A server that is told to wait for a standby does so only when its checkpointer has read the setting.
"""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError

from kathikon_celery.storage import Storage
from kathikon_celery.storage.engine import answers
from tests.integration.conftest import client_of
from tests.integration.test_failover import POOLS, SHORT, configure, replace_by_empty_ones, server
from tests.support import apps
from tests.support.postgresql import PostgreSQLServer

__all__ = ["server"]


@pytest.mark.parametrize("pool", POOLS)
def test_a_database_that_is_replaced_by_an_empty_one(postgresql_url: str, tmp_path: Path, pool: str) -> None:
    replace_by_empty_ones(postgresql_url, tmp_path, pool)


def test_a_commit_that_waits_for_a_standby_is_told_and_has_an_end(
    server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(answers, "MOST_PERIODS", 2)
    with client_of(server.url, **SHORT) as client:
        apps.add.delay(1, 1)
        configure(server, "SET synchronous_standby_names = 'nobody'")
        try:
            with (
                caplog.at_level(logging.WARNING),
                pytest.raises(OperationalError, match="on a statement, which is ended"),
            ):
                apps.add.apply_async((1, 1), retry_policy={"max_retries": 0}, task_id="waits")
        finally:
            configure(server, "RESET synchronous_standby_names")
        assert "for a synchronous standby" in caplog.text
        apps.add.apply_async((1, 1), task_id="waits")
        with closing(Storage.for_app(client)) as storage:
            assert [job.id for job in storage.all()].count("waits") == 1
