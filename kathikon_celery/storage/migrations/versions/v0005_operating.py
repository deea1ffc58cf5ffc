"""What operators do: pauses, acts, the history of jobs; columns for a rerun, a revocation and a failed chord."""

import sqlalchemy as sa
from alembic import op

from kathikon_celery.storage.clock import Instant
from kathikon_celery.storage.column_types import Long, Name, Serial

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add tables and columns that workers of older versions neither read nor write."""
    op.add_column("kathikon_jobs", sa.Column("rerun_of", Name))
    op.add_column("kathikon_jobs", sa.Column("revoked_at", Instant))
    op.add_column("kathikon_chords", sa.Column("failed", sa.Boolean))
    op.create_table(
        "kathikon_pauses",
        sa.Column("kind", sa.String(10), primary_key=True),
        sa.Column("name", Name, primary_key=True),
        sa.Column("label", Long, nullable=False),
        sa.Column("since", Instant, nullable=False),
        sa.Column("until", Instant),
        sa.Column("operator", Long, nullable=False),
        sa.Column("reason", Long),
    )
    op.create_table(
        "kathikon_acts",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("verb", sa.String(20), nullable=False),
        sa.Column("target", Long, nullable=False),
        sa.Column("operator", Long, nullable=False),
        sa.Column("reason", Long),
        sa.Column("began_at", Instant, nullable=False),
        sa.Column("ended_at", Instant),
        sa.Column("chosen", sa.Integer),
        sa.Column("changed", sa.Integer, nullable=False),
    )
    op.create_index("kathikon_acts_began", "kathikon_acts", ["began_at"])
    op.create_table(
        "kathikon_history",
        sa.Column("seq", Serial, primary_key=True),
        sa.Column("job", Name, nullable=False),
        sa.Column("at", Instant, nullable=False),
        sa.Column("event", sa.String(20), nullable=False),
        sa.Column("text", Long),
        sa.Column("traceback", Long),
        sa.Column("act", sa.BigInteger),
    )
    op.create_index("kathikon_history_job", "kathikon_history", ["job"])
