"""Return values that travel with the end of their tasks to the worker's main process, which writes many at once."""

from __future__ import annotations

from typing import Any

from kathikon_celery.job import Hold
from kathikon_celery.publish import outbox
from kathikon_celery.storage.settle import JobEnd, TaskEnd

#: Message property, set when jobs queue behind this one: write its result in the worker's next batch, not by itself.
CARRIED = "kathikon_carried"
#: Longest result that travels, in characters; the process that ran the task writes a longer one itself.
LONGEST = 100_000


class Carrier:
    """A context that keeps the end of the job held under *hold*, instead of its being written, if it *travels*.

    After the block its caller sends `end` or `is_written` to the main process.
    """

    def __init__(self, hold: Hold | None, travels: bool = True) -> None:
        self.hold = hold
        self.travels = travels
        self.end: JobEnd | None = None
        #: Whether the end is on the job's row.
        self.is_written = False

    def __enter__(self) -> Carrier:
        outbox.change(carrier=self)
        return self

    def __exit__(self, *error: object) -> None:
        outbox.change(carrier=None)


def carry(ending: TaskEnd) -> bool:
    """Keep *ending* in the current `Carrier`, if it travels and is a return value alone; return whether it is kept."""
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
    """Note that *ending* is written, so that the main process does not report its task."""
    carrier = outbox.scope().carrier
    if carrier is not None and ending.ends and ending.ends[0].hold == carrier.hold is not None:
        carrier.is_written = True


class Carried(str):  # noqa: SLOT000 (it has an attribute)
    """Celery's log text of a return value, with the columns still to be *written*; `None`: they are written."""

    written: dict[str, str | None] | None

    def __new__(cls, text: str, written: dict[str, str | None] | None) -> Carried:
        """Return *text* with the attribute *written*."""
        self = super().__new__(cls, text)
        self.written = written
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Carried, (str(self), self.written)
