"""Settings of ``examples/django_shop`` with another broker, asked for late acks and for lost tasks to come again."""

import os

from shop.settings import *  # noqa: F403 (settings)

for _name in [name for name in globals() if name.startswith("CELERY_")]:
    del globals()[_name]
CELERY_BROKER_URL = os.environ["SHOP_BROKER"]
CELERY_BROKER_TRANSPORT_OPTIONS = {"visibility_timeout": 15}
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_TASK_DEFAULT_QUEUE = "endurance"
CELERY_TASK_IGNORE_RESULT = True
