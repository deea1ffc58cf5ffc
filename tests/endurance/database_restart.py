"""PostgreSQL is restarted under load."""

from tests.endurance.database_outages import under_load
from tests.endurance.harness import Figures, Run, main


def database_restart(
    run: Run, *, restarts: int = 3, every: float = 5.0, rate: float = 40.0, seconds: float = 0.05
) -> Figures:
    """Restart the database with ``-m immediate``, which is a crash to everybody. Needs {database} in the broker."""
    return under_load(
        run, lambda: run.database.restart("immediate"), times=restarts, every=every, rate=rate, seconds=seconds
    )


if __name__ == "__main__":
    main(database_restart, broker="kathikon+{database}")
