"""The kombu transport: messages are rows."""

from __future__ import annotations

from kathikon_celery.transport.channel import Channel
from kathikon_celery.transport.transport import Transport

__all__ = ["Channel", "Transport"]
