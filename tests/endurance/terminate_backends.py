"""Every connection to PostgreSQL is cut, again and again, under load."""

from sqlalchemy import NullPool, create_engine, text

from tests.endurance.database_outages import under_load
from tests.endurance.harness import Figures, Run, main

TERMINATE = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
)


def terminate_backends(
    run: Run, *, times: int = 20, every: float = 3.0, rate: float = 40.0, seconds: float = 0.05
) -> Figures:
    """Terminate every backend of the database each few seconds. Needs {database} in the broker."""
    url = run.database.url

    def terminate() -> None:
        with create_engine(url, poolclass=NullPool).connect() as connection:
            connection.execute(TERMINATE)

    return under_load(run, terminate, times=times, every=every, rate=rate, seconds=seconds)


if __name__ == "__main__":
    main(terminate_backends, broker="kathikon+{database}")
