"""Tools of the tests: a PostgreSQL server, real workers, a sample app."""
