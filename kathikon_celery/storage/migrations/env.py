"""Tells alembic where to run: on the connection it is given, or as SQL text for the dialect of a URL."""

from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo

from kathikon_celery.storage.schema import VERSION_TABLE
from kathikon_celery.storage.tables import metadata

attributes = context.config.attributes


def add_own(ctx: MigrationContext, step: MigrationInfo, **_: Any) -> None:
    """Run what this kind of database has to do after a migration."""
    for revision in step.up_revision_ids:
        for statement in attributes["dialect"].after_migrations.get(revision, ()):
            ctx.execute(statement)


options: dict[str, Any] = {"target_metadata": metadata, "version_table": VERSION_TABLE, "on_version_apply": add_own}

if context.is_offline_mode():
    context.configure(url=attributes["url"], literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    # The caller holds the transaction: alembic opens none of its own.
    context.configure(connection=attributes["connection"], transactional_ddl=False, **options)
    context.run_migrations()
