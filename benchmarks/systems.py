"""The brokers that are compared, and which of them can be reached."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from kombu import Connection

#: Kathikon's settings as shipped, with late acks; the others have Celery's defaults.
OURS = "kathikon_celery.config"
LOCAL = {
    "POSTGRESQL": "postgresql+psycopg://localhost/test",
    "RABBITMQ": "amqp://guest:guest@127.0.0.1:5672//",
    "REDIS": "redis://127.0.0.1:6379",
}


@dataclass(frozen=True)
class System:
    """A broker, a result backend, and the settings that belong to them. ``{folder}`` is a fresh one each time."""

    name: str
    broker: str
    backend: str
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def conf(self, folder: str, **settings: Any) -> dict[str, Any]:
        """What a process of the run needs to know."""
        urls = {"broker_url": self.broker.format(folder=folder), "result_backend": self.backend.format(folder=folder)}
        return {"config": self.config, "settings": urls | self.settings | settings}


def url_of(name: str) -> str:
    """The URL of a server: ``BENCHMARKS_POSTGRESQL`` and so on, or the usual one on this machine."""
    return os.environ.get(f"BENCHMARKS_{name}", LOCAL[name])


def every() -> list[System]:
    """All that is known."""
    rabbitmq, redis = url_of("RABBITMQ"), url_of("REDIS")
    return [
        System("kathikon, SQLite", "kathikon+sqlite:///{folder}/kathikon.db", "kathikon", OURS),
        System("kathikon, PostgreSQL", f"kathikon+{url_of('POSTGRESQL')}", "kathikon", OURS),
        System("RabbitMQ", rabbitmq, f"{redis}/2"),
        System(
            "RabbitMQ, confirms",
            rabbitmq,
            f"{redis}/2",
            settings={"broker_transport_options": {"confirm_publish": True}},
        ),
        System("Redis", f"{redis}/1", f"{redis}/2"),
    ]


def reachable(only: list[str] | None = None) -> list[System]:
    """Those that answer, or those of them whose names begin so."""
    found = []
    for system in every():
        if only and not system.name.startswith(tuple(only)):
            continue
        if "{folder}" not in system.broker and not _answers(system):
            print(f"not reachable, left out: {system.name}")
            continue
        found.append(system)
    return found


def _answers(system: System) -> bool:
    import kathikon_celery  # noqa: F401  (its transport)

    try:
        with Connection(system.broker, connect_timeout=2) as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
    except Exception:
        return False
    return True
