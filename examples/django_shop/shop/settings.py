import os
from pathlib import Path

from sqlalchemy import make_url

from kathikon_celery.django import *

BASE_DIR = Path(__file__).parents[1]
DATABASE_URL = os.environ.get("DATABASE_URL", f"sqlite:///{BASE_DIR / 'shop.db'}")

# The jobs are in the database of the orders.
CELERY_KATHIKON_DATABASE_URL = DATABASE_URL

url = make_url(DATABASE_URL)
if url.get_backend_name() == "sqlite":
    # A transaction that begins as a writer waits its turn. One that first reads may find that it cannot write.
    options = {"transaction_mode": "IMMEDIATE", "timeout": 30}
    DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": url.database, "OPTIONS": options}}
else:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.database,
            "USER": url.username or "",
            "PASSWORD": url.password or "",
            "HOST": url.host or "",
            "PORT": url.port or "",
        }
    }

DEBUG = True
SECRET_KEY = "only for this example"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
INSTALLED_APPS = ["shop"]
ROOT_URLCONF = "shop.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
