"""A column for the queues that a node consumes."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column. The rows of workers of older versions keep NULL there: their queues are not known."""
    op.add_column("kathikon_nodes", sa.Column("consumes", sa.Text()))
