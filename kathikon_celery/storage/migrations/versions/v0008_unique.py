"""Unique jobs: no two of them have the same key at the same time."""

import sqlalchemy as sa
from alembic import op

from kathikon_celery.storage.column_types import Name

revision = "0008"
down_revision = "0007"

CONDITIONS = {
    "waiting": "waiting_key IS NOT NULL AND state IN ('scheduled', 'retryable', 'available', 'blocked')",
    "active": "active_key IS NOT NULL AND ended_at IS NULL",
    "kept": "kept_key IS NOT NULL",
}


def upgrade() -> None:
    """Add the columns, and an index for each. A worker of an older version does not clear the key of what it claims."""
    for name, condition in CONDITIONS.items():
        op.add_column("kathikon_jobs", sa.Column(f"{name}_key", Name))
        where = sa.text(condition)
        index = f"kathikon_jobs_unique_{name}"
        op.create_index(
            index, "kathikon_jobs", [f"{name}_key"], unique=True, postgresql_where=where, sqlite_where=where
        )
