"""The sample app; each signal of a job adds a line to the file ``SIGNALS``."""

from __future__ import annotations

import os
from typing import Any

from kathikon_celery import signals
from tests.support.apps import app, append_line

__all__ = ["app"]


def _hear(signal: Any, job_id: str, cause: Any, **_: Any) -> None:
    append_line(os.environ["SIGNALS"], f"{signal.name} {job_id} {cause}")


for _signal in (signals.job_dead, signals.job_discarded, signals.job_cancelled, signals.job_rescued):
    _signal.connect(_hear, weak=False)
