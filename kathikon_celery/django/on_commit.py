"""`delay_on_commit` and `apply_async_on_commit`: on Kathikon they return a result, whose id is known at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from celery.contrib.django.task import DjangoTask

from kathikon_celery.settings.brokers import broker_of, is_kathikon


def install() -> None:
    """Replace both methods for tasks of apps on Kathikon. May be called twice."""
    for name, send in (("delay_on_commit", "delay"), ("apply_async_on_commit", "apply_async")):
        original = getattr(DjangoTask, name)
        if not hasattr(original, "__wrapped__"):
            setattr(DjangoTask, name, _joined(original, send))


def _joined(original: Callable[..., None], send: str) -> Callable[..., Any]:
    @wraps(original)
    def on_commit(self: Any, *args: Any, **kwargs: Any) -> Any:
        conf = self.app.conf
        if conf.task_always_eager or not is_kathikon(broker_of(conf)):
            return original(self, *args, **kwargs)
        return getattr(self, send)(*args, **kwargs)  # in the open transaction

    return on_commit
