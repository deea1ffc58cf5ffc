"""What is kept out of the log of a worker whose broker is Kathikon."""

from __future__ import annotations

import logging

from kathikon_celery.settings import SettingError
from kathikon_celery.storage import StorageError


class NoTraceback(logging.Filter):
    """Removes the traceback of an error that ends the worker, where the error's text already says what is wrong."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], SettingError | StorageError):
            record.exc_info = None
        return True


class NoRedisAdvice(logging.Filter):
    """Drops Celery's warning that ``worker_disable_prefetch`` works with Redis only: with Kathikon it works too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "worker_disable_prefetch is only supported" not in str(record.msg)


_NO_TRACEBACK, _NO_REDIS_ADVICE = NoTraceback(), NoRedisAdvice()


def add_filters() -> None:
    """Add both filters to Celery's loggers; a second call changes nothing."""
    logging.getLogger("celery.worker").addFilter(_NO_TRACEBACK)
    logging.getLogger("celery.worker.consumer.tasks").addFilter(_NO_REDIS_ADVICE)
