"""``celery -A proj kathikon …``: what Kathikon adds to Celery's command line."""

from kathikon_celery.cli.group import kathikon

__all__ = ["kathikon"]
