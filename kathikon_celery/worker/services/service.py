"""A thread that does one step again and again, and survives whatever a step meets."""

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
    """One background process of a worker.

    Arguments:
        storage: where it works.
        interval: seconds between two steps, if a step does not say otherwise.
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
        """Do what is to be done now; the seconds until the next step."""

    def questions(self) -> Questions:
        """What a step asks the database first."""
        return {}

    def spare(self, answers: Mapping[str, Any]) -> float:
        """Seconds for which, by the *answers* to `questions`, there is nothing to do; 0 when a step must be taken."""
        return 0.0

    def asks(self, within: float) -> Questions:
        """`questions`, when the next step is due within so many seconds and nobody has answered them."""
        is_near = monotonic() + min(within, self.interval / 2) >= self._due
        return self.questions() if is_near and self._answers is None else {}

    def hear(self, answers: Mapping[str, Any]) -> None:
        """Take the answers to `questions`: perhaps they spare the next step."""
        self._answers = monotonic(), answers

    def _spare(self) -> float:
        """Seconds for which no step must be taken, by what was heard."""
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
                self.storage.setup()  # no more than a look at a flag once the tables are there
                pause = self._spare()
                if pause <= 0:
                    pause = self.step()
                self.last_success = monotonic()
                failing = False
            except Exception as error:
                pause = self.retry
                if isinstance(error, SchemaError):
                    pass  # the worker's own connection meets it as well, and ends the worker
                elif not is_lost(error) and not isinstance(error, StorageError):
                    logger.exception("Kathikon: %s failed, trying again", type(self).__name__)
                elif not failing:
                    logger.warning("Kathikon: %s waits for the database: %s", type(self).__name__, in_words(error))
                failing = True
            self._due = monotonic() + pause
            if self._nudged.wait(pause) and not self._stopping:
                self._nudged.clear()
