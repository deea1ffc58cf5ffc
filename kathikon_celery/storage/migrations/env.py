"""Tells alembic where to run: on the connection it is given, or as SQL text for the dialect of a URL."""

from typing import Any

from alembic import context

from kathikon_celery.storage.schema import VERSION_TABLE
from kathikon_celery.storage.tables import metadata

attributes = context.config.attributes
options: dict[str, Any] = {"target_metadata": metadata, "version_table": VERSION_TABLE}

if context.is_offline_mode():
    context.configure(url=attributes["url"], literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    # The caller holds the transaction: alembic opens none of its own.
    context.configure(connection=attributes["connection"], transactional_ddl=False, **options)
    context.run_migrations()
