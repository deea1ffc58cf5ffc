"""A primary is lost under load, and its standby takes its place."""

import time

from sqlalchemy import NullPool, create_engine, make_url

from tests.endurance.harness import Figures, Run, main
from tests.support.postgresql import PostgreSQLServer
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

IS_FOLLOWED = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = %(state)s AND state = 'streaming'"
CAUGHT_UP = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn()"


def query(server: PostgreSQLServer, text: str, **values: object) -> object:
    """Run a statement, and return the first value."""
    engine = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        result = connection.exec_driver_sql(text, values)
        return result.scalar() if result.returns_rows else None


def follow(primary: PostgreSQLServer, standby: PostgreSQLServer, synchronous: bool) -> None:
    """Have the primary's commits wait for the standby, if *synchronous*, and wait until it follows."""
    if synchronous:
        query(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'")
        query(primary, "SELECT pg_reload_conf()")
    state = "sync" if synchronous else "async"
    wait_until(lambda: query(primary, IS_FOLLOWED, state=state), what="a standby that follows")


def lose(how: str, primary: PostgreSQLServer, proxies: list[Proxy]) -> None:
    """Lose the primary."""
    if how == "crash":
        primary.stop("immediate")
    elif how == "silence":  # a machine that is gone, behind a proxy that acknowledges all
        for proxy in proxies:
            proxy.silence()
        primary.stop("immediate")
    elif how == "demote":  # its connections stay open, and what it has is on the standby before that is promoted
        query(primary, "ALTER SYSTEM SET default_transaction_read_only = on")
        query(primary, "SELECT pg_reload_conf()")
        wait_until(lambda: query(primary, CAUGHT_UP), what="a standby that has caught up")
    else:
        raise ValueError(f"how = {how!r}: allowed are crash, silence, demote")


def failover(
    run: Run,
    *,
    how: str = "crash",
    pool: str = "prefork",
    synchronous: int = 1,
    rate: float = 40.0,
    seconds: float = 0.05,
    before: float = 5.0,
    away: float = 2.0,
    after: float = 20.0,
) -> Figures:
    """Replace the database by a standby. Needs {database} in the broker, which must be one PostgreSQL.

    Each of two workers and two producers reaches the database by a proxy of its own. Of each two, one is switched to
    the standby before that is promoted, and the other one after it. Figures: `lost` are acknowledged jobs that never
    ran to their end; `consumed_after` is the number of workers that ran jobs that were sent after the promotion.

    Options: *how*: crash, silence, demote; *before*, *away*, *after*: seconds of load before the loss, between loss and
    promotion, and after it.
    """
    primary = run.database
    standby = run.keep(primary.standby())
    follow(primary, standby, bool(synchronous))
    url = run.broker
    proxies = [run.keep(Proxy(url.partition("+")[2])) for _ in range(4)]
    workers = []
    for proxy in proxies[:2]:
        run.move(f"kathikon+{proxy.url}")
        workers += run.start_ready(pool=pool)
    jobs: list[int] = []
    for proxy in proxies[2:]:
        run.move(f"kathikon+{proxy.url}")
        jobs += run.send(int(rate * (before + away + after) / 2), rate=rate / 2, seconds=seconds)
    run.expect("the first job runs", lambda: bool(run.journal.attempts))
    time.sleep(before)
    promoted = make_url(standby.url).render_as_string(hide_password=False)
    with run.disturbance():
        lose(how, primary, proxies)
        for proxy in proxies[::2]:
            proxy.switch(promoted)
        time.sleep(away)
        standby.promote()
        for proxy in proxies[1::2]:
            proxy.switch(promoted)
    run.move(f"kathikon+{promoted}")
    run.sent()
    late = run.send(40, seconds=0.2)
    run.finish()
    figures = run.figures()
    last = max(one.end for one in run.disturbances)
    starts = sorted(attempt.started for job in jobs for attempt in run.journal.attempts.get(job, ()))
    return {
        **figures,
        "lost": figures["unfinished"],
        "workers_lost": sum(not worker.running for worker in workers),
        "consumed_after": len({one.worker for job in late for one in run.journal.attempts[job]}),
        "silence": round(next((start for start in starts if start > last), float("inf")) - last, 2),
        "left_over": sum(job.state.value != "completed" for job in run.rows().values()),
    }


if __name__ == "__main__":
    main(failover, broker="kathikon+{database}")
