"""`celery migrate` from another broker into the table."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from celery import Celery, chain
from celery.bin.base import CLIContext
from celery.bin.migrate import migrate
from celery.contrib.testing.app import setup_default_app
from click.testing import CliRunner
from kombu.transport.memory import Channel

from kathikon_celery.job import State
from kathikon_celery.publish.envelope import unfold
from kathikon_celery.testing.draining import drain
from tests.integration.conftest import Jobs, client_of
from tests.support import apps

#: kombu's transport in the memory of this process, which writes messages as those of Redis and SQS do.
OLD = "memory://"


@pytest.fixture
def old() -> Iterator[Celery]:
    """The app before its move, and the current one."""
    app = Celery("old", broker=OLD, backend="cache+memory://", set_as_current=False)
    with setup_default_app(app):
        app.set_current()
        yield app
    app.close()
    Channel.queues.clear()


def test_jobs_of_another_broker_are_moved_into_the_table(old: Celery, database_url: str) -> None:
    soon = datetime.now(timezone.utc) + timedelta(hours=1)
    sent = {
        "plain": apps.add.delay(1, 1),
        "late": apps.add.apply_async((2, 2), eta=soon, priority=3),
        "expires": apps.echo.apply_async(("é",), expires=soon),
        "small": apps.add.apply_async((3, 3), compression="gzip"),
        "pickled": apps.add.apply_async((4, 4), serializer="pickle", queue="mail"),
        "chain": chain(apps.add.s(5, 5), apps.add.s(1)).delay(),
    }
    ids = {name: result.id for name, result in sent.items()} | {"chain": sent["chain"].parent.id}
    old.conf.accept_content = ["json", "pickle"]

    arguments = [OLD, f"kathikon+{database_url}", "--queues", "celery:default,mail", "--ack-messages", "--timeout", "1"]
    moved = CliRunner().invoke(migrate, arguments, obj=CLIContext(app=old, no_color=True, workdir=None))
    assert moved.exit_code == 0, moved.output
    assert moved.output.count("Migrating task") == len(ids)
    assert [queue.qsize() for queue in Channel.queues.values()] == [0] * len(Channel.queues)

    with client_of(database_url, accept_content=["json", "pickle"]) as app:
        rows = {name: Jobs(app).storage.fetch(job_id) for name, job_id in ids.items()}
        assert {name: (row.queue, row.state) for name, row in rows.items()} == {
            name: ("mail" if name == "pickled" else "default", State.SCHEDULED if name == "late" else State.AVAILABLE)
            for name in ids
        }
        assert (rows["late"].priority, rows["late"].scheduled_at, rows["expires"].expires_at) == (3, soon, soon)
        assert rows["plain"].body.startswith("[[1, 1], {}, ")  # the arguments can be searched
        assert "body_encoding" not in unfold(rows["plain"].envelope, rows["plain"].body, "", False)["properties"]

        drain(app, scheduled=True)
        found = {name: app.AsyncResult(result.id).get(timeout=1) for name, result in sent.items()}
    assert found == {"plain": 2, "late": 4, "expires": [["é"], {}], "small": 6, "pickled": 8, "chain": 11}


def test_a_job_that_is_moved_twice_is_one_job(old: Celery, database_url: str) -> None:
    job_id = apps.add.delay(1, 1).id
    arguments = [
        OLD,
        f"kathikon+{database_url}",
        "--queues",
        "celery:default",
        "--timeout",
        "1",
    ]  # not acknowledged: it stays
    for _ in range(2):
        CliRunner().invoke(migrate, arguments, obj=CLIContext(app=old, no_color=True, workdir=None))
    with client_of(database_url) as app:
        assert [job.id for job in Jobs(app).storage.all()] == [job_id]
