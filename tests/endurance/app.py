"""The Celery app that every scenario runs, configured by the environment that `harness.Run` sets.

``ENDURANCE_CONFIG``, ``ENDURANCE_BROKER``, ``ENDURANCE_BACKEND`` and ``ENDURANCE_CONF`` (a JSON object of further
settings) are applied in that order; ``ENDURANCE_JOURNAL`` is the file to write to and ``ENDURANCE_WORKER`` the number
of this worker. Without a config module the app asks of its broker what ours does unasked: late acks.
"""

import json
import os
import time

from celery import Celery, Task
from celery.signals import worker_ready

from tests.endurance.journal import Event, Writer

LATE_ACKS = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_default_queue": "endurance",
    "broker_connection_retry_on_startup": True,
}
WORKER = int(os.environ.get("ENDURANCE_WORKER", "-1"))

journal = Writer(os.environ["ENDURANCE_JOURNAL"])
app = Celery("endurance")
if config := os.environ.get("ENDURANCE_CONFIG"):
    app.config_from_object(config)
else:
    app.conf.update(LATE_ACKS)
for setting, variable in {"broker_url": "ENDURANCE_BROKER", "result_backend": "ENDURANCE_BACKEND"}.items():
    if value := os.environ.get(variable):
        app.conf[setting] = value
app.conf.update(json.loads(os.environ.get("ENDURANCE_CONF", "{}")))


@app.task(name="endurance.work")
def work(job: int, seconds: float) -> int:
    """Sleep for `seconds` and return the number of the worker that ran the job."""
    journal.write(Event.STARTED, job, WORKER)
    if seconds:
        time.sleep(seconds)
    journal.write(Event.ENDED, job, WORKER)
    return WORKER


@app.task(name="endurance.work_once", acks_late=False)
def work_once(job: int, seconds: float) -> int:
    """As `work`, but acknowledged before it starts."""
    return work.run(job, seconds)  # type: ignore[no-any-return]


@app.task(name="endurance.fragile")
def fragile(job: int, path: str) -> int:
    """Fail unless the file `path` is there."""
    journal.write(Event.STARTED, job, WORKER)
    if not os.path.exists(path):
        raise RuntimeError("a bad deploy")
    journal.write(Event.ENDED, job, WORKER)
    return job


@app.task(name="endurance.work_again", bind=True, max_retries=1)
def work_again(self: Task, job: int, seconds: float) -> int:
    """As `work`, but fails at first, and is retried a second later."""
    if not self.request.retries:
        raise self.retry(countdown=1.0)
    return work.run(job, seconds)  # type: ignore[no-any-return]


@app.task(name="endurance.part")
def part(job: int, number: int, seconds: float) -> list[int]:
    """Sleep for `seconds`, as one part of the chord that a job is, and return what the body checks."""
    time.sleep(seconds)
    return [job, number]


@app.task(name="endurance.body")
def body(values: list[list[int]], job: int, parts: int, seconds: float) -> int:
    """Sleep for `seconds` and end the job, if these are the values of all its parts in their order."""
    journal.write(Event.STARTED, job, WORKER)
    time.sleep(seconds)
    is_right = values == [[job, number] for number in range(parts)]
    journal.write(Event.ENDED if is_right else Event.WRONG, job, WORKER)
    return WORKER


if "ENDURANCE_LIMITED" in os.environ:  # takes a broker of ours
    from kathikon_celery import Limit

    @app.task(name="endurance.limited", limits=[Limit("key:{key}", concurrency=1), Limit("all", concurrency=10)])
    def limited(job: int, key: int, seconds: float) -> int:
        """As `work`, one at a time of each key, and ten in all."""
        return work.run(job, seconds)  # type: ignore[no-any-return]


@worker_ready.connect
def _ready(**kwargs: object) -> None:
    journal.write(Event.READY, worker=WORKER)
