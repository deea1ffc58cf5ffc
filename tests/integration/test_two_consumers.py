"""Several consumers in one process: one node, and each keeps what it has claimed."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Consumer, Queue

from kathikon_celery.job import State
from tests.integration.conftest import Jobs
from tests.support import apps


def test_a_second_consumer_leaves_the_jobs_of_the_first_alone(client: Celery, jobs: Jobs) -> None:
    result = apps.add.delay(1, 2)
    got: list[Any] = []
    with (
        client.connection_for_read() as first,
        client.connection_for_read() as second,
        Consumer(first, [Queue("default")], callbacks=[lambda _, message: got.append(message)]),
    ):
        first.drain_events(timeout=60)
        claimed = jobs.of(result)
        assert claimed.state is State.CLAIMED

        with Consumer(second, [Queue("other")], callbacks=[lambda _, message: message.ack()]):
            apps.add.apply_async((3, 4), queue="other")
            second.drain_events(timeout=60)  # so it has made sure of what it holds itself
            assert jobs.of(result) == claimed
        got[0].ack()
        job = jobs.wait(result, State.COMPLETED)
    assert (job.attempts, job.fence) == (1, claimed.fence)
