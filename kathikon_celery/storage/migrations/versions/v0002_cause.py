"""A column for why a job has ended, as a value."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

#: By the texts that version 0.1 wrote as the reason, the cause of jobs that have ended and are not reported yet.
_OF_REASONS = {
    "reason = 'expired'": "expired",
    "reason LIKE 'rejected%'": "rejected",
    "reason LIKE 'NotRegistered(%'": "unregistered",
    "reason LIKE 'the process that ran it was lost%'": "lost",
    "reason LIKE 'the worker was lost%'": "lost_once",
    "reason LIKE 'corrupt row%'": "unreadable",
    "state = 'cancelled'": "revoked",
}


def upgrade() -> None:
    """Add the column. Workers of version 0.1 that run neither read nor write it."""
    op.add_column("kathikon_jobs", sa.Column("cause", sa.String(20)))
    cases = " ".join(f"WHEN {condition} THEN '{cause}'" for condition, cause in _OF_REASONS.items())
    unreported = "state IN ('dead', 'cancelled', 'discarded') AND status IS NULL"
    op.execute(f"UPDATE kathikon_jobs SET cause = CASE {cases} END WHERE {unreported}")  # noqa: S608 (constants)
