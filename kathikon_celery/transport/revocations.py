"""Writes a revocation to the table before it is sent: so it holds without a worker, and after restarts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.utils.functional import maybe_list
from kombu import serialization

from kathikon_celery.publish import callers
from kathikon_celery.publish.envelope import loads_safely
from kathikon_celery.storage import Storage


def write_first(storage: Storage, message: Mapping[str, Any]) -> None:
    """Revoke the jobs that *message*, a command of remote control for all workers, revokes. Others are passed over.

    A command for certain workers is theirs alone, as with other brokers: see the *destination* of Celery's `revoke`.
    """
    try:
        command = loads_safely(message)
        method, arguments = command["method"], command["arguments"]
        if any(command.get(name) for name in ("destination", "pattern", "matcher")):
            return
        if method in ("revoke", "terminate"):
            ids = [str(one) for one in maybe_list(arguments["task_id"]) or []]
            if ids:
                callers.write(storage, lambda there: there.backend.revoke(ids))
        elif method == "revoke_by_stamped_headers":
            headers = _stamps(arguments["headers"])
            callers.write(storage, lambda there: there.backend.revoke_stamped(headers))
    except (serialization.ContentDisallowed, serialization.DecodeError, KeyError, TypeError, AttributeError):
        return  # no command that Celery's workers know


def _stamps(headers: Any) -> dict[str, list[str]]:
    """Return stamps as Celery's worker reads them: a mapping, or a list of ``header=value``."""
    if isinstance(headers, list):
        headers = dict(one.split("=")[:2] for one in headers)
    return {name: [str(value) for value in maybe_list(values) or []] for name, values in headers.items()}
