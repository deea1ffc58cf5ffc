"""Nodes are numbered from a random number on, so that tables that are made anew give no number again.

The statements are those of the databases: see `Dialect.after_migrations`.
"""

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Change no table. Workers of older versions go on under their numbers."""
