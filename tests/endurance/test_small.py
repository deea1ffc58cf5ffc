"""Every endurance scenario at small scale: what must hold at any speed, not how fast.

Most of them run on one database here; other tests show the same on each.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.endurance.child_recycling import child_recycling
from tests.endurance.client_memory import client_memory
from tests.endurance.database_restart import database_restart
from tests.endurance.failover import failover
from tests.endurance.faults import faults
from tests.endurance.harness import Figures, Run
from tests.endurance.incident import incident
from tests.endurance.kill_chords import kill_chords
from tests.endurance.kill_workers import kill_workers
from tests.endurance.long_transaction import long_transaction
from tests.endurance.many_countdowns import many_countdowns
from tests.endurance.operators import COMMANDS, operators
from tests.endurance.sqlite_contention import sqlite_contention
from tests.endurance.stopped_worker import stopped_worker
from tests.endurance.terminate_backends import terminate_backends
from tests.endurance.ticks import ticks

ONCE = {"refused": 0, "unfinished": 0, "twice": 0}
NOT_LOST = {"unfinished": 0, "twice_unexplained": 0}


@pytest.fixture
def run(database_url: str) -> Iterator[Run]:
    """A run on each database in turn."""
    with Run(f"kathikon+{database_url}") as run:
        yield run


@pytest.fixture
def cluster_run() -> Iterator[Run]:
    """A run on a PostgreSQL server of its own."""
    with Run("kathikon+{database}") as run:
        yield run


def assert_figures(figures: Figures, **expected: object) -> None:
    assert {name: figures[name] for name in expected} == expected, figures


def test_a_killed_workers_jobs_are_run_again(run: Run) -> None:
    figures = kill_workers(run, jobs=100, seconds=0.2, kills=2, every=1.0)
    assert_figures(figures, sent=100, refused=0, **NOT_LOST)  # whose end was on its way at a kill may run again
    assert 1 <= figures["twice_running"] <= 4


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_killed_workers_chords_end(run: Run) -> None:
    figures = kill_chords(run, chords=16, parts=10, seconds=0.1, kills=2, every=1.0)
    assert_figures(figures, **NOT_LOST, sent=16, refused=0, wrong=0, left_over=0)
    assert figures["workers_killed"] >= 1  # the second one, unless all was done by then


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_operators_commands_beside_two_tables(run: Run) -> None:
    figures = operators(run, small=20, large=60, times=1)
    assert set(figures) == {f"{command}, {size} rows" for command in COMMANDS for size in (20, 60)}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_worker_that_was_stopped_changes_nothing(run: Run) -> None:
    figures = stopped_worker(run, jobs=4, seconds=2.0)
    assert_figures(figures, **NOT_LOST, twice=2, taken_over=2, started_late=0, recorded=4, changed=0)
    assert figures["said"]


@pytest.mark.postgresql
def test_nothing_is_lost_when_the_database_restarts(cluster_run: Run) -> None:
    figures = database_restart(cluster_run, restarts=2, every=1.5, rate=20.0)
    assert_figures(figures, **NOT_LOST, workers_lost=0)


@pytest.mark.postgresql
def test_nothing_is_lost_when_connections_are_cut(cluster_run: Run) -> None:
    figures = terminate_backends(cluster_run, times=4, every=1.0, rate=20.0)
    assert_figures(figures, **NOT_LOST, workers_lost=0)


@pytest.mark.postgresql
@pytest.mark.parametrize("how", ["crash", "silence", "demote"])
def test_a_synchronous_standby_takes_the_place_of_its_primary(cluster_run: Run, how: str) -> None:
    figures = failover(cluster_run, how=how, rate=20.0, before=1.0, away=0.5, after=4.0)
    assert_figures(figures, **NOT_LOST, lost=0, workers_lost=0, consumed_after=2)


def test_many_processes_share_a_sqlite_file(sqlite_url: str) -> None:
    with Run(f"kathikon+{sqlite_url}") as run:
        figures = sqlite_contention(run, minutes=0.05, workers=3, producers=3)
    assert_figures(figures, **ONCE, locked=0, sent=450)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_jobs_that_wait_are_in_nobodys_way(run: Run) -> None:
    figures = many_countdowns(run, waiting=300, jobs=50, probes=10)
    assert_figures(figures, **ONCE, early=0, scheduled=300)


@pytest.mark.postgresql
def test_a_long_transaction_is_in_nobodys_way(postgresql_url: str) -> None:
    with Run(f"kathikon+{postgresql_url}") as run:
        figures = long_transaction(run, seconds=4.0, rate=100.0, probes=15)
    assert_figures(figures, **ONCE, early=False, claimed=416)
    usual = max(figures["pickup_p99_before"], figures["pickup_p99_open"])
    assert figures["pickup_p50_open"] <= 3 * figures["pickup_p99_before"], figures
    assert figures["late"] <= 20 * usual, figures


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_children_are_replaced_and_no_job_with_them(run: Run) -> None:
    figures = child_recycling(run, jobs=200, per_child=20)
    assert_figures(figures, **ONCE)
    assert figures["children"] >= 10


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_client_gets_every_result_and_keeps_none(run: Run) -> None:
    figures = client_memory(run, jobs=200, waits=100, together=10)
    assert_figures(figures, **ONCE, sent=500, stored=500)


@pytest.mark.parametrize(
    ("fault", "pool", "database_url"),
    [
        ("warm", "threads", "sqlite"),
        ("warm", "gevent", "postgresql"),
        ("cold", "threads", "postgresql"),
        ("cold", "solo", "sqlite"),
        ("kill", "prefork", "sqlite"),
        ("kill", "prefork", "postgresql"),
    ],
    indirect=["database_url"],
)
def test_nothing_is_lost_on_any_pool(run: Run, fault: str, pool: str) -> None:
    figures = faults(run, fault=fault, pool=pool, jobs=60, times=1, every=1.0)
    assert_figures(figures, sent=60, refused=0, lost=0, false_ends=0, once_twice=0, consuming=2, alive=2)
    if fault != "kill":
        assert_figures(figures, dead_unbegun=0, crashes=0)
    if fault == "warm":
        assert_figures(figures, begun_twice=0, dead=0, exits=[0])


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_incident(run: Run) -> None:
    run.patience = 60.0  # nothing happens while a command starts
    figures = incident(run, jobs=60, waiting=10, workflows=3, rate=40.0)
    assert_figures(
        figures,
        dead=60, held_while_paused=10, started_while_paused=0, explained="paused", completed=70, cancelled=3, others=0,
        history=["published", "failed", "dead", "retry", "claimed", "completed"],
        acts=[["retry", 60], ["resume", 0], ["cancel", 1], ["cancel", 1], ["cancel", 1], ["pause", 0]],
    )  # fmt: skip
    assert figures["retried_a_second"] <= 40.0 * 1.5


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_ticks_of_workers_that_are_killed(run: Run) -> None:
    figures = ticks(run, minutes=0.25, workers=2, every=5.0)
    assert_figures(figures, sent=figures["expected"], skipped=0, twice=0, problems=[])
    assert figures["expected"] >= 20
