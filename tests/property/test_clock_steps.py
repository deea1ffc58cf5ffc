"""Which nodes are taken for dead, with two clocks: the database's, which is set at will, and one that does not step.

A node that renews its lease is never taken for dead, whatever the clocks say. A node that hangs is, in time.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from hypothesis.stateful import run_state_machine_as_test as run
from sqlalchemy import Connection, select

from kathikon_celery.nodes import others
from kathikon_celery.nodes.others import Watch
from kathikon_celery.storage import Storage, Unavailable, nodes
from kathikon_celery.storage.dialects.sqlite import SQLite
from tests.support.clocks import clock_replaced

LEASE = 20.0
#: Most seconds that it takes to notice a node that hangs: a lease, and a look or two.
NOTICED = LEASE + 3.0


class Clocks:
    """Epoch seconds of the database, and monotonic seconds."""

    wall, monotonic = 1.7e9, 1000.0


class Node:
    """A process that renews its lease, while it runs. *hangs*: for how many seconds of a live observer."""

    def __init__(self, storage: Storage, lease: float) -> None:
        self.storage, self.lease = storage, lease
        self.row = nodes.register(storage.database, "node", "elsewhere", 1, 0.0, lease)
        self.id = self.row.id
        self.renewed = Clocks.monotonic
        self.hangs: float | None = None

    def live(self) -> None:
        if self.hangs is None and Clocks.monotonic >= self.renewed + self.lease / 4:
            assert nodes.renew(self.storage.database, self.row, self.lease), "taken for dead, though it lives"
            self.renewed = Clocks.monotonic


class Observer:
    """The node that watches."""

    id, lease = 0, LEASE


class TwoClocks(RuleBasedStateMachine):
    storage: Storage
    fail: list[bool]

    @initialize(leases=st.lists(st.sampled_from([LEASE, 5.0, 8.0]), min_size=1, max_size=3))
    def begin(self, leases: list[float]) -> None:
        self.storage.reset()
        self.fail[:] = []
        self.nodes = [Node(self.storage, lease) for lease in leases]
        self.watch = Watch(self.storage, Observer())
        self.noticed = NOTICED

    @rule(seconds=st.integers(1, 45))
    def time_passes(self, seconds: int) -> None:
        for _ in range(seconds):
            Clocks.wall += 1.0
            Clocks.monotonic += 1.0
            for node in self.nodes:
                node.live()
            self.look()

    @rule(seconds=st.sampled_from([-1e8, -3600.0, -30.0, -5.0, 5.0, 30.0, 3600.0, 3e7]), looks=st.booleans())
    def the_clock_is_set(self, seconds: float, looks: bool) -> None:
        Clocks.wall += seconds
        self.noticed += max(0.0, -seconds) if seconds > -3600.0 else 0.0  # a lease may seem so much longer
        if looks:
            self.look()

    @rule(seconds=st.floats(1.0, 1e6), is_counted=st.booleans(), looks=st.booleans())
    def the_machine_sleeps(self, seconds: float, is_counted: bool, looks: bool) -> None:
        """No process runs meanwhile; some systems' monotonic clocks go on. Any process may be the first to wake."""
        Clocks.wall += seconds
        Clocks.monotonic += seconds * is_counted
        if looks:
            self.look()
        for node in self.nodes:
            node.live()

    @rule(seconds=st.integers(1, 100), looks=st.booleans())
    def the_database_is_away(self, seconds: int, looks: bool) -> None:
        """No lease can be renewed meanwhile."""
        for _ in range(seconds):
            Clocks.wall += 1.0
            Clocks.monotonic += 1.0
            self.fail[:] = [True]
            with pytest.raises(Unavailable):
                self.watch.look()
            self.fail[:] = []
        for node in self.nodes:
            node.hangs = node.hangs and 0.0
        if looks:
            self.look()
        for node in self.nodes:
            node.live()

    @rule(number=st.integers(0, 2))
    def a_node_hangs(self, number: int) -> None:
        if number < len(self.nodes) and self.nodes[number].hangs is None:
            self.nodes[number].hangs = 0.0

    @rule()
    def another_observer_takes_over(self) -> None:
        self.watch = Watch(self.storage, Observer())
        for node in self.nodes:
            node.hangs = node.hangs and 0.0

    def look(self) -> None:
        """Look as a lifeline does: the idle query's answers may suffice."""
        with self.storage.database.read() as connection:
            renewals = connection.execute(select(nodes.RENEWALS)).scalar()
        if not self.watch.is_calm(False, renewals):
            self.watch.look()
        with self.storage.database.read() as connection:
            alive = {node.id for node in nodes.others(connection, 0)}
        for node in list(self.nodes):
            assert node.hangs is not None or node.id in alive, "taken for dead, though it lives"
            if node.hangs is not None:
                node.hangs += 1.0
                assert node.hangs <= self.noticed or node.id not in alive, "it hangs, and was not taken for dead"
        self.nodes = [node for node in self.nodes if node.id in alive]


def test_who_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail: list[bool] = []
    look = nodes.others

    def looking(connection: Connection, node_id: int) -> list[nodes.Node]:
        if fail:
            raise Unavailable("the database is away")
        return look(connection, node_id)

    monkeypatch.setattr(nodes, "others", looking)
    monkeypatch.setattr(others, "monotonic", lambda: Clocks.monotonic)
    monkeypatch.setattr(SQLite, "on_connect", clock_replaced(lambda: Clocks.wall))
    with closing(Storage(f"sqlite:///{tmp_path / 'kathikon.db'}")) as storage:
        storage.setup()
        TwoClocks.storage, TwoClocks.fail = storage, fail
        run(TwoClocks, settings=settings(stateful_step_count=20))
