"""Limits: what runs at once and what starts in a time, for the whole fleet and for each key."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from kathikon_celery.storage.clock import Instant
from kathikon_celery.storage.column_types import Long, Name

revision = "0007"
down_revision = "0006"

OFFERED = "line IS NOT NULL AND (state = 'available' OR (state = 'blocked' AND gate <> line))"


def _index(name: str, columns: list[Any], condition: str) -> None:
    partial = sa.text(condition)
    op.create_index(name, "kathikon_jobs", columns, postgresql_where=partial, sqlite_where=partial)


def upgrade() -> None:
    """Add columns, indexes and tables. Workers of older versions know no limits: they run what has left the lines."""
    for name, kind in (("limits", Long), ("line", Name), ("gate", Name)):
        op.add_column("kathikon_jobs", sa.Column(name, kind))
    _index(
        "kathikon_jobs_blocked", ["gate", "queue", sa.text("priority DESC"), "available_at", "seq"], "state = 'blocked'"
    )
    _index("kathikon_jobs_offered", ["line", "queue", "available_at"], OFFERED)
    _index("kathikon_jobs_offered_later", ["gate", "queue", "available_at"], "gate <> line AND state = 'available'")
    _index("kathikon_jobs_expiring_blocked", ["expires_at"], "expires_at IS NOT NULL AND state = 'blocked'")
    op.create_table(
        "kathikon_limits",
        sa.Column("name", Name, primary_key=True),
        sa.Column("label", Long, nullable=False),
        sa.Column("concurrency", sa.Integer),
        sa.Column("rate", sa.Integer),
        sa.Column("per", sa.Double, nullable=False),
        sa.Column("burst", sa.Integer, nullable=False),
        sa.Column("is_set", sa.Boolean, nullable=False),
        sa.Column("set_concurrency", sa.Integer),
        sa.Column("set_rate", sa.Integer),
        sa.Column("set_per", sa.Double),
        sa.Column("set_burst", sa.Integer),
        sa.Column("operator", Long),
        sa.Column("reason", Long),
        sa.Column("changed_at", Instant),
    )
    op.create_table(
        "kathikon_limit_keys",
        sa.Column("key", Name, primary_key=True),
        sa.Column("name", Name, nullable=False),
        sa.Column("next_token", sa.Double),
        sa.Column("closed_until", sa.Double),
        sa.Column("wake_at", Instant),
    )
    op.create_index("kathikon_limit_keys_wake", "kathikon_limit_keys", ["wake_at"])
    op.create_index("kathikon_limit_keys_name", "kathikon_limit_keys", ["name"])
    op.create_table(
        "kathikon_slots",
        sa.Column("key", Name, primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("fence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("node_id", sa.BigInteger),
        sa.Column("weight", sa.Integer, nullable=False),
    )
