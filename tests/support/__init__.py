"""What the tests stand on: a PostgreSQL server, real workers, a sample app."""
