"""Signals of what happens to jobs, after the commit, in the process that has written it.

>>> from kathikon_celery.signals import job_dead
>>> @job_dead.connect
... def tell(sender, job_id, queue, cause, **_):
...     page_somebody(f"{sender} {job_id} is dead: {cause}")

*sender* is the task's name. Keyword arguments: ``job_id``, ``queue`` and ``cause`` (a `Cause`, or `None`). A receiver
runs in the thread that has committed, often that which claims jobs: it must return soon. Its error is logged.

A worker's main process writes most of what happens to jobs, a pool process the end of a task with a result, and
whoever cancels, retries or discards writes that. Signals cost nothing in a process where nobody is connected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from celery.utils.dispatch import Signal

from kathikon_celery.job import State
from kathikon_celery.storage.events import Event, listen_everywhere

_ARGUMENTS = {"job_id", "queue", "cause"}


class JobSignal(Signal):
    """A signal of Celery's kind. With its first receiver, this process begins to collect what happens to jobs."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, providing_args=_ARGUMENTS)

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """Connect a receiver, as Celery's signals do."""
        listen_everywhere(_send)
        return super().connect(*args, **kwargs)


#: A job is dead: it raised for good, or its processes were lost too often.
job_dead = JobSignal("job_dead")
#: A job was cancelled.
job_cancelled = JobSignal("job_cancelled")
#: A job was discarded: rejected, expired, or given up by hand.
job_discarded = JobSignal("job_discarded")
#: A job has returned.
job_completed = JobSignal("job_completed")
#: The process that held a job was lost, and the job was taken from it.
job_rescued = JobSignal("job_rescued")

_OF_STATE = {
    State.DEAD: job_dead,
    State.CANCELLED: job_cancelled,
    State.DISCARDED: job_discarded,
    State.COMPLETED: job_completed,
}


def _send(events: Sequence[Event]) -> None:
    for event in events:
        sent: list[Callable[..., Any]] = [job_rescued.send] if event.is_rescue else []
        if event.state in _OF_STATE:
            sent.append(_OF_STATE[event.state].send)
        for send in sent:
            send(sender=event.task, job_id=event.id, queue=event.queue, cause=event.cause)
