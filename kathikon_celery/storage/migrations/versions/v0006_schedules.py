"""Schedules: when each next tick is, and what each tick sends."""

import sqlalchemy as sa
from alembic import op

from kathikon_celery.storage.clock import Instant
from kathikon_celery.storage.column_types import Long, Name

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the table. Workers of older versions send no ticks."""
    op.create_table(
        "kathikon_schedules",
        sa.Column("name", Name, primary_key=True),
        sa.Column("label", Long, nullable=False),
        sa.Column("source", sa.String(10), nullable=False),
        sa.Column("task", Long, nullable=False),
        sa.Column("args", Long, nullable=False),
        sa.Column("kwargs", Long, nullable=False),
        sa.Column("options", Long, nullable=False),
        sa.Column("timing", Long, nullable=False),
        sa.Column("zone", Long, nullable=False),
        sa.Column("missed", sa.String(10), nullable=False),
        sa.Column("grace", sa.Double, nullable=False),
        sa.Column("overlap", sa.String(10), nullable=False),
        sa.Column("jitter", sa.Double, nullable=False),
        sa.Column("starts_at", Instant),
        sa.Column("ends_at", Instant),
        sa.Column("max_runs", sa.Integer),
        sa.Column("runs", sa.Integer, nullable=False),
        sa.Column("paused", sa.Boolean, nullable=False),
        sa.Column("next_at", Instant),
        sa.Column("tick_at", Instant),
        sa.Column("last_tick", Instant),
        sa.Column("last_sent", Instant),
        sa.Column("last_job", Name),
        sa.Column("skipped", sa.Integer, nullable=False),
        sa.Column("problem", Long),
        sa.Column("digest", sa.String(40)),
        sa.Column("past", Long, nullable=False),
        sa.Column("is_changed", sa.Boolean, nullable=False),
        sa.Column("followed", sa.String(40)),
    )
    op.create_index("kathikon_schedules_next", "kathikon_schedules", ["next_at"])
