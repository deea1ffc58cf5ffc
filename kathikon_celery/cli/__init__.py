"""``celery -A proj kathikon …``: what Kathikon adds to Celery's command line."""

import kathikon_celery.cli.acting
import kathikon_celery.cli.jobs
import kathikon_celery.cli.limits
import kathikon_celery.cli.queues
import kathikon_celery.cli.schedules
import kathikon_celery.cli.tables
import kathikon_celery.cli.web  # noqa: F401 (each adds its commands)
from kathikon_celery.cli.group import kathikon

__all__ = ["kathikon"]
