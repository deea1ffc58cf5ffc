"""With ``kathikon_retry_failed`` every task that raises is retried with Kathikon's backoff."""

from __future__ import annotations

from functools import wraps
from typing import Any

from celery.exceptions import Ignore, Reject, Retry

from kathikon_celery.job import backoff


def retry_failed(task: Any, max_attempts: int) -> None:
    """Make *task* run up to *max_attempts* times, `backoff` seconds apart, before it fails for good."""
    run = task.run

    @wraps(run)
    def run_again(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (Ignore, Reject, Retry):
            raise
        except Exception as error:
            request = task.request
            attempt = (request.retries or 0) + 1
            if request.called_directly or request.is_eager or attempt >= max_attempts:
                raise
            raise task.retry(exc=error, countdown=backoff(attempt), max_retries=max_attempts - 1) from error

    task.run = run_again
