"""A result that travels with the end of its task to the worker's main process, which writes many in one transaction."""

from __future__ import annotations

from typing import Any

from kathikon_celery.job import Hold
from kathikon_celery.publish import outbox
from kathikon_celery.storage.settle import JobEnd, TaskEnd

#: The property of a message whose result is to travel so: others wait behind it, and time is scarcer than haste.
CARRIED = "kathikon_carried"
#: Characters of a result up to which it travels; what is longer is written where it is.
LONGEST = 100_000


class Carrier:
    """Takes at most one end: that of the job that is held under *hold*, where that *travels*.

    Whoever runs a block with it as the context takes to the main process what there is of the end of the job.
    """

    def __init__(self, hold: Hold | None, travels: bool = True) -> None:
        self.hold = hold
        self.travels = travels
        self.end: JobEnd | None = None
        #: The job's row has got its end.
        self.is_written = False

    def __enter__(self) -> Carrier:
        outbox.change(carrier=self)
        return self

    def __exit__(self, *error: object) -> None:
        outbox.change(carrier=None)


def carry(ending: TaskEnd) -> bool:
    """Whether *ending* travels; not if more belongs to it than a return value, which must be written with it."""
    carrier = outbox.scope().carrier
    if carrier is None or not carrier.travels or ending.after or not ending.is_return:
        return False
    (end,) = ending.ends
    if end.hold != carrier.hold:
        return False
    if sum(len(text) for text in end.written.values() if text) > LONGEST:
        return False
    carrier.end = end
    return True


def written(ending: TaskEnd) -> None:
    """Note that *ending* is written, so that the main process need not report its task."""
    carrier = outbox.scope().carrier
    if carrier is not None and ending.ends and ending.ends[0].hold == carrier.hold is not None:
        carrier.is_written = True


class Carried(str):  # noqa: SLOT000 (it has an attribute)
    """What Celery makes of a return value for its log, with what is to be *written* of it; `None`: it is."""

    written: dict[str, str | None] | None

    def __new__(cls, text: str, written: dict[str, str | None] | None) -> Carried:
        """Make one of the *text*."""
        self = super().__new__(cls, text)
        self.written = written
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Carried, (str(self), self.written)
