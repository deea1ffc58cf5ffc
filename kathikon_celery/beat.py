"""``celery beat`` and ``worker -B`` beside workers that send the schedules themselves: they do nothing, and say so.

The configuration names this scheduler as ``beat_scheduler``. With another one there, the workers send no schedules:
they are left to Celery's beat.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import beat

logger = logging.getLogger(__name__)

#: The value of ``beat_scheduler`` that has the workers send the schedules.
NAME = "kathikon_celery.beat:Scheduler"


class Scheduler(beat.Scheduler):
    """A scheduler of Celery's beat without entries."""

    def setup_schedule(self) -> None:
        """Take no entries: every worker has them."""
        logger.info("Kathikon: the workers send the schedules; this beat has nothing to do")

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Wait."""
        return float(self.max_interval)

    @property
    def info(self) -> str:
        """A line of the banner."""
        return "    . kathikon -> the workers send the schedules"
