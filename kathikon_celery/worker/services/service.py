"""A thread that takes one step again and again, and goes on after an error."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from kathikon_celery.storage.errors import SchemaError, StorageError, in_words, is_lost

if TYPE_CHECKING:
    from kathikon_celery.storage import Storage
    from kathikon_celery.storage.idle_query import Questions

logger = logging.getLogger(__name__)


class Service(ABC):
    """One background process of a worker: a thread that takes one step again and again.

    >>> promoter = Promoter(storage=storage, interval=1.0)
    >>> promoter.step()     # or start(), and stop() at the end

    Arguments:
        storage: the database.
        interval: seconds between two steps, unless a step returns another number of seconds.

    Raises `ValueError` for an interval that is not above 0.
    """

    #: Seconds after which a step that failed is tried again.
    retry = 0.5
    #: Whether the next step is taken at once when another process calls all nodes: perhaps a job is due soon.
    heeds_calls = False

    def __init__(self, *, storage: Storage, interval: float) -> None:
        if not interval > 0:
            raise ValueError(f"the interval of {type(self).__name__} is {interval!r}; it must be above 0 seconds")
        self.storage = storage
        self.interval = interval
        #: Monotonic time of the last step that went well: its age is the service's health.
        self.last_success: float | None = None
        self._due = 0.0
        self._answers: tuple[float, Mapping[str, Any]] | None = None
        self._nudged = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @abstractmethod
    def step(self) -> float:
        """Do what is to be done now; return the seconds until the next step."""

    def questions(self) -> Questions:
        """What a step asks the database first, for the idle query to ask it instead."""
        return {}

    def spare(self, answers: Mapping[str, Any]) -> float:
        """Seconds for which there is nothing to do, given the *answers* to `questions`; 0 when a step must be taken."""
        return 0.0

    def asks(self, within: float) -> Questions:
        """`questions`, if the next step is due in *within* seconds and there is no answer yet; otherwise nothing."""
        is_near = monotonic() + min(within, self.interval / 2) >= self._due
        return self.questions() if is_near and self._answers is None else {}

    def hear(self, answers: Mapping[str, Any]) -> None:
        """Take the *answers* to `questions`. They may make the next step unnecessary."""
        self._answers = monotonic(), answers

    def _spare(self) -> float:
        """Seconds for which no step must be taken, given the answers that were heard."""
        answers, self._answers = self._answers, None
        return self.spare(answers[1]) - (monotonic() - answers[0]) if answers is not None else 0.0

    def nudge(self) -> None:
        """Take the next step now."""
        self._answers = None
        self._nudged.set()

    def start(self) -> None:
        """Start the thread."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"kathikon-{type(self).__name__.lower()}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._stopping = True
        self._nudged.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None

    def _run(self) -> None:
        failing = False
        while not self._stopping:
            try:
                self.storage.setup()  # once the tables exist, this only reads a flag
                pause = self._spare()
                if pause <= 0:
                    pause = self.step()
                self.last_success = monotonic()
                failing = False
            except Exception as error:
                pause = self.retry
                if isinstance(error, SchemaError):
                    pass  # the worker's own connection has this error too, and ends the worker
                elif not is_lost(error) and not isinstance(error, StorageError):
                    logger.exception("Kathikon: %s failed, trying again", type(self).__name__)
                elif not failing:
                    logger.warning("Kathikon: %s waits for the database: %s", type(self).__name__, in_words(error))
                failing = True
            self._due = monotonic() + pause
            if self._nudged.wait(pause) and not self._stopping:
                self._nudged.clear()
