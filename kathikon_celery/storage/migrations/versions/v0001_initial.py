"""The first schema."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from kathikon_celery.storage.clock import Instant
from kathikon_celery.storage.column_types import Long, Name, Serial

revision = "0001"
down_revision = None


def partial(condition: str) -> dict[str, Any]:
    """Options of an index over the rows for which *condition* holds."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "kathikon_jobs",
        sa.Column("seq", Serial, primary_key=True),
        sa.Column("id", Name, nullable=False),
        sa.Column("queue", Name),
        sa.Column("task", Long, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("priority", sa.BigInteger, nullable=False),
        sa.Column("publication", sa.BigInteger, nullable=False),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("crashes", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("acked", sa.Boolean, nullable=False),
        sa.Column("node_id", sa.BigInteger),
        sa.Column("root_id", Name),
        sa.Column("parent_id", Name),
        sa.Column("group_id", Name),
        sa.Column("inserted_at", Instant, nullable=False),
        sa.Column("scheduled_at", Instant),
        sa.Column("available_at", Instant, nullable=False),
        sa.Column("expires_at", Instant),
        sa.Column("claimed_at", Instant),
        sa.Column("started_at", Instant),
        sa.Column("ended_at", Instant),
        sa.Column("envelope", Long, nullable=False),
        sa.Column("body", Long, nullable=False),
        sa.Column("status", Long),
        sa.Column("result", Long),
        sa.Column("traceback", Long),
        sa.Column("meta", Long),
        sa.Column("reason", Long),
        sa.Column("errors", Long),
        sa.UniqueConstraint("id", name="kathikon_jobs_id"),
    )
    ready: list[Any] = ["queue", sa.text("priority DESC"), "available_at", "seq"]
    op.create_index("kathikon_jobs_ready", "kathikon_jobs", ready, **partial("state = 'available'"))
    due = partial("state IN ('scheduled', 'retryable')")
    op.create_index("kathikon_jobs_due", "kathikon_jobs", ["available_at"], **due)
    held = partial("node_id IS NOT NULL")
    op.create_index("kathikon_jobs_held", "kathikon_jobs", ["node_id"], **held)
    op.create_index("kathikon_jobs_ended", "kathikon_jobs", ["state", "ended_at"], **partial("ended_at IS NOT NULL"))
    untold = partial("state IN ('dead', 'cancelled', 'discarded') AND status IS NULL")
    op.create_index("kathikon_jobs_untold", "kathikon_jobs", ["ended_at"], **untold)
    op.create_index("kathikon_jobs_root", "kathikon_jobs", ["root_id"], **partial("root_id IS NOT NULL"))
    op.create_index("kathikon_jobs_group", "kathikon_jobs", ["group_id"], **partial("group_id IS NOT NULL"))
    expiring = partial("expires_at IS NOT NULL AND state IN ('scheduled', 'retryable', 'available')")
    op.create_index("kathikon_jobs_expiring", "kathikon_jobs", ["expires_at"], **expiring)

    op.create_table(
        "kathikon_messages",
        sa.Column("seq", Serial, primary_key=True),
        sa.Column("queue", Name, nullable=False),
        sa.Column("priority", sa.BigInteger, nullable=False),
        sa.Column("available_at", Instant, nullable=False),
        sa.Column("expires_at", Instant),
        sa.Column("node_id", sa.BigInteger),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("envelope", Long, nullable=False),
        sa.Column("body", Long, nullable=False),
        sqlite_autoincrement=True,
    )
    free = partial("node_id IS NULL")
    order: list[Any] = ["queue", sa.text("priority DESC"), "seq"]
    op.create_index("kathikon_messages_ready", "kathikon_messages", order, **free)
    op.create_index("kathikon_messages_held", "kathikon_messages", ["node_id"], **held)
    op.create_index("kathikon_messages_expires", "kathikon_messages", ["expires_at"])

    op.create_table(
        "kathikon_queues",
        sa.Column("name", Name, primary_key=True),
        sa.Column("label", Long, nullable=False),
        sa.Column("durable", sa.Boolean, nullable=False),
        sa.Column("auto_delete", sa.Boolean, nullable=False),
        sa.Column("expires", sa.Double),
        sa.Column("message_ttl", sa.Double),
        sa.Column("node_id", sa.BigInteger),
        sa.Column("used_at", Instant, nullable=False),
    )
    op.create_table(
        "kathikon_exchanges",
        sa.Column("name", Name, primary_key=True),
        sa.Column("label", Long, nullable=False),
        sa.Column("type", sa.String(20), nullable=False),
    )
    op.create_table(
        "kathikon_bindings",
        sa.Column("exchange", Name, primary_key=True),
        sa.Column("queue", Name, primary_key=True),
        sa.Column("routing_key", Name, primary_key=True),
        sa.Column("label", Long, nullable=False),
    )
    op.create_index("kathikon_bindings_queue", "kathikon_bindings", ["queue"])
    op.create_table(
        "kathikon_nodes",
        sa.Column("id", Serial, primary_key=True),
        sa.Column("name", Long, nullable=False),
        sa.Column("machine", Long, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("pid_started", sa.Double, nullable=False),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("lease_until", Instant, nullable=False),
        sa.Column("waiting", sa.Text().with_variant(postgresql.ARRAY(postgresql.TEXT(collation="C")), "postgresql")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "kathikon_waits",
        sa.Column("seq", Serial, primary_key=True),
        sa.Column("job", Name, nullable=False),
        sa.Column("listener", sa.BigInteger, nullable=False),
        sa.Column("entered_at", Instant, nullable=False),
    )
    op.create_index("kathikon_waits_job", "kathikon_waits", ["job"])
    op.create_table(
        "kathikon_groups",
        sa.Column("id", Name, primary_key=True),
        sa.Column("result", Long, nullable=False),
        sa.Column("inserted_at", Instant, nullable=False),
    )
    op.create_index("kathikon_groups_inserted", "kathikon_groups", ["inserted_at"])
    op.create_table(
        "kathikon_chords",
        sa.Column("id", Name, primary_key=True),
        sa.Column("size", sa.Integer),
        sa.Column("added", sa.Integer, nullable=False),
        sa.Column("ended", sa.Integer, nullable=False),
        sa.Column("structure", Long),
        sa.Column("inserted_at", Instant, nullable=False),
    )
    op.create_index("kathikon_chords_inserted", "kathikon_chords", ["inserted_at"])
    op.create_table(
        "kathikon_chord_parts",
        sa.Column("chord", Name, primary_key=True),
        sa.Column("task_id", Name, primary_key=True),
        sa.Column("label", Long, nullable=False),
        sa.Column("position", sa.Integer),
        sa.Column("ended", sa.Boolean, nullable=False),
        sa.Column("succeeded", sa.Boolean),
        sa.Column("result", Long),
    )
    if op.get_context().dialect.name == "postgresql":
        # Room on each page for the next versions of its rows; and a vacuum after a fixed number of dead rows, not after
        # a fraction of a table that may hold millions of finished ones.
        for table, options in {
            "kathikon_jobs": "fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000",
            "kathikon_messages": "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000",
            "kathikon_nodes": "fillfactor = 50",
            "kathikon_waits": "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000",
        }.items():
            op.execute(f"ALTER TABLE {table} SET ({options})")
        # Who waits outlives no crash of the server, and enters what he waits for anew.
        op.execute("ALTER TABLE kathikon_waits SET UNLOGGED")
