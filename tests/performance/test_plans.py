"""Every statement that runs often reaches its rows by the index that was made for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Connection

from kathikon_celery.job import TERMINAL, Hold, State, UniqueKey, Use
from kathikon_celery.storage import (
    acts,
    chords,
    claim,
    figures,
    finish,
    idle_query,
    insert,
    limit_numbers,
    limits,
    messages,
    nodes,
    promote,
    prune,
    results,
    revoking,
    schedules,
    status,
)
from kathikon_celery.storage.scan_start import ScanStart
from kathikon_celery.storage.selecting import Filter
from tests.performance.conftest import Plans
from tests.storage.actors import new_job

BY_SEQ = "kathikon_jobs_pkey"
BY_ID = "kathikon_jobs_id"
MESSAGE_BY_SEQ = "kathikon_messages_pkey"
READY = "kathikon_jobs_ready"
DUE = "kathikon_jobs_due"
HELD = "kathikon_jobs_held"
ENDED = "kathikon_jobs_ended"
UNREPORTED = "kathikon_jobs_untold"
ROOT = "kathikon_jobs_root"
GROUP = "kathikon_jobs_group"
CHORDS = "kathikon_chords_inserted"
EXPIRING = "kathikon_jobs_expiring"
EXPIRING_BLOCKED = "kathikon_jobs_expiring_blocked"
BLOCKED = "kathikon_jobs_blocked"
OFFERED = "kathikon_jobs_offered"
OFFERED_LATER = "kathikon_jobs_offered_later"
LIMIT_KEYS = "kathikon_limit_keys_name"
UNIQUE = "kathikon_jobs_unique_active"
MESSAGES_HELD = "kathikon_messages_held"
SCHEDULES = "kathikon_schedules_next"
MESSAGES_READY = "kathikon_messages_ready"

IN_AN_HOUR = datetime.now(timezone.utc) + timedelta(hours=1)
LONG_AGO = datetime.now(timezone.utc) - timedelta(days=30)
A_MINUTE_AGO = datetime.now(timezone.utc) - timedelta(minutes=1)
HOT = (Use("hot", "hot", 1, 50),)
HOLDS = [Hold(seq, 1, 1) for seq in range(100, 200)]


def writing(call: Callable[[Plans, Connection], Any]) -> Callable[[Plans], Any]:
    def run(plans: Plans) -> None:
        with plans.database.write() as connection:
            call(plans, connection)

    return run


def reading(call: Callable[[Plans, Connection], Any]) -> Callable[[Plans], Any]:
    def run(plans: Plans) -> None:
        with plans.database.read() as connection:
            call(plans, connection)

    return run


def result(state: State | None) -> dict[str, Any]:
    return {"state": state, "status": "x", "result": "1", "traceback": None, "meta": None}


#: All that an idle worker may ask at once.
QUESTIONS: idle_query.Questions = {
    "next_due": {},
    "is_amiss": {"machine": "elsewhere"},
    "renewals": {},
    "next_tick": schedules.of_own(["schedule-7"]),
    "next_offer": {},
    "is_anything_old": prune.ages(dict.fromkeys(TERMINAL, 600000.0), group=1e6, chord=1e6, wait=1e6),
}


class Curious:
    """Asks them."""

    def asks(self, within: float) -> idle_query.Questions:
        return QUESTIONS

    def hear(self, answers: Mapping[str, Any]) -> None:
        assert set(answers) == set(QUESTIONS)


def narrowed(plans: Plans) -> ScanStart | None:
    """A front that knows where to look; there is none where no old rows are kept."""
    if not plans.database.dialect.keeps_old_rows:
        return None
    front = ScanStart()
    front.looked([(5, datetime.now(timezone.utc)), (0, datetime.now(timezone.utc))], True, 1000.0)
    return front


def page(plans: Plans, *states: State) -> None:
    """Read a page in the middle."""
    times = dict.fromkeys(("available_at", "ended_at"), LONG_AGO)
    last = new_job(queue="queue-1", seq=500, node_id=1, state=states[0] if states else State.DEAD, **times)
    plans.storage.page(Filter(states=states), 10, last)


#: For each function: how to call it, and for each table it reads the index and the words of what it is searched by.
STATEMENTS: dict[str, tuple[Callable[[Plans], Any], dict[str, str]]] = {
    "publish by its own task": (
        lambda plans: insert.insert(plans.database, new_job("id-9"), hold=Hold(9, 7, 1)),
        {BY_SEQ: ""},
    ),
    "fetch": (lambda plans: plans.storage.fetch("id-77"), {BY_ID: "id"}),
    "claim": (
        writing(lambda plans, conn: claim.claim(plans.database, conn, "queue-1", 10, plans.worker.id)),
        {READY: "queue", BY_SEQ: ""},
    ),
    "claim from the front on": (
        writing(
            lambda plans, conn: claim.claim(plans.database, conn, "queue-1", 10, plans.worker.id, narrowed(plans)),
        ),
        {READY: "queue", BY_SEQ: ""},
    ),
    "claim what was told": (
        writing(
            lambda plans, conn: claim.claim_told(
                plans.database, conn, "queue-1", 9, plans.worker.id, claim.Waiting(["queue-1"], 2)
            )
        ),
        {BY_SEQ: ""},
    ),
    "let out of a line": (
        lambda plans: limits.offer(plans.database, ["hot"]),
        {BLOCKED: "gate", OFFERED: "line", OFFERED_LATER: "gate", BY_SEQ: ""},
    ),
    "let out of many lines": (
        lambda plans: limits.offer(plans.database, [f"key-{number}" for number in range(1, 99, 2)]),
        {BLOCKED: "gate", OFFERED: "line", OFFERED_LATER: "gate", BY_SEQ: ""},
    ),
    "admit": (
        writing(
            lambda plans, conn: limits.admit(
                plans.database, conn, [new_job(limits=HOT, seq=1), new_job("2", limits=HOT, seq=2)]
            )
        ),
        {BY_SEQ: ""},
    ),
    "sweep": (
        lambda plans: limits.sweep(plans.database, "key-44"),
        {BLOCKED: "gate", OFFERED: "line", OFFERED_LATER: "gate", BY_SEQ: ""},
    ),
    "keys of a limit": (
        reading(lambda plans, conn: limit_numbers.keys_of(conn, "limit-7", 10)),
        {BLOCKED: "gate", BY_SEQ: "", LIMIT_KEYS: "name"},
    ),
    "key of a job": (reading(lambda plans, conn: limit_numbers.of_key(conn, HOT[0])), {BLOCKED: "gate", BY_SEQ: ""}),
    "next to let out": (reading(lambda plans, conn: limits.next_offer(conn)), {BLOCKED: ""}),
    "publish a duplicate": (
        lambda plans: insert.insert(
            plans.database, new_job("new", unique=UniqueKey("unique-9", "active", answers=True))
        ),
        {UNIQUE: "active_key"},
    ),
    "look": (
        reading(lambda plans, conn: idle_query.look(plans.database, conn, ["queue-1", "queue-2"])),
        {READY: "queue", MESSAGES_READY: "queue"},
    ),
    "look for all that an idle worker asks": (
        reading(lambda plans, conn: idle_query.look(plans.database, conn, ["queue-1"], True, [(Curious(), QUESTIONS)])),
        {
            READY: "queue",
            MESSAGES_READY: "queue",
            DUE: "",
            HELD: "",
            MESSAGES_HELD: "",
            UNREPORTED: "",
            ENDED: "state",
            EXPIRING: "",
            EXPIRING_BLOCKED: "",
            BLOCKED: "",
            CHORDS: "",
            SCHEDULES: "",
        },
    ),
    "look and renew": (
        lambda plans: idle_query.renew(plans.database, ["queue-1"], True, plans.worker.row, 20.0),
        {READY: "queue", MESSAGES_READY: "queue"},
    ),
    "started": (writing(lambda plans, conn: finish.started(plans.database, conn, HOLDS)), {BY_SEQ: ""}),
    "completed": (writing(lambda plans, conn: finish.completed(plans.database, conn, HOLDS)), {BY_SEQ: ""}),
    "given back": (writing(lambda plans, conn: finish.given_back(plans.database, conn, HOLDS)), {BY_SEQ: ""}),
    "ended": (
        writing(lambda plans, conn: finish.ended(plans.database, conn, HOLDS[0], State.DEAD, None, "x", "y")),
        {BY_SEQ: ""},
    ),
    "moved on": (writing(lambda plans, conn: finish.moved_on(conn, HOLDS)), {BY_SEQ: ""}),
    "held by": (reading(lambda plans, conn: finish.held_by(conn, plans.worker.id)), {HELD: "node_id"}),
    "result": (lambda plans: results.store(plans.database, HOLDS[1], **result(State.DEAD)), {BY_SEQ: ""}),
    "result in between": (lambda plans: results.store(plans.database, HOLDS[1], **result(None)), {BY_SEQ: ""}),
    "promote": (lambda plans: promote.promote(plans.database), {DUE: "available_at", BY_SEQ: ""}),
    "next due": (reading(lambda plans, conn: promote.next_due(conn)), {DUE: ""}),
    "expire": (
        lambda plans: promote.expire(plans.database),
        {EXPIRING: "expires_at", EXPIRING_BLOCKED: "expires_at", BY_SEQ: ""},
    ),
    "prunable": (
        reading(lambda plans, conn: prune.prunable(conn, {State.COMPLETED: 600000.0})),
        {ENDED: "ended_at"},
    ),
    "prune": (lambda plans: plans.storage.prune(), {ENDED: "ended_at", BY_SEQ: ""}),
    "prune from the front on": (
        lambda plans: prune.prune(plans.database, {State.COMPLETED: 600000.0}, 1, {State.COMPLETED: LONG_AGO}),
        {ENDED: "ended_at", BY_SEQ: ""},
    ),
    "delete": (lambda plans: prune.delete_keys(plans.database, ["id-1", "id-2", "id-3"]), {BY_ID: "id"}),
    "purge": (writing(lambda plans, conn: prune.purge(conn, "queue-0")), {READY: "queue", DUE: "", BLOCKED: ""}),
    "orphans": (reading(lambda plans, conn: nodes.orphans(conn)), {HELD: "", MESSAGES_HELD: ""}),
    "rescue": (
        lambda plans: nodes.remove(plans.database, 3),
        {HELD: "node_id", MESSAGES_HELD: "node_id", BLOCKED: "", BY_SEQ: "", OFFERED: "line", OFFERED_LATER: "gate"},
    ),
    "take messages": (
        writing(lambda plans, conn: messages.take(plans.database, conn, "queue-1", 10, plans.worker.id, True)),
        {MESSAGES_READY: "queue", MESSAGE_BY_SEQ: ""},
    ),
    "take messages for good": (
        writing(lambda plans, conn: messages.take(plans.database, conn, "queue-1", 10, plans.worker.id, False)),
        {MESSAGES_READY: "queue", MESSAGE_BY_SEQ: ""},
    ),
    "acknowledge": (
        writing(lambda plans, conn: messages.acknowledge(plans.database, conn, HOLDS[:5])),
        {MESSAGE_BY_SEQ: ""},
    ),
    "expired messages": (
        lambda plans: prune.expired_messages(plans.database),
        {"kathikon_messages_expires": "expires_at", MESSAGE_BY_SEQ: ""},
    ),
    "old chords": (lambda plans: chords.prune(plans.database, 1e6), {GROUP: "group_id", CHORDS: "inserted_at"}),
    "workflow": (
        lambda plans: plans.storage.workflow("id-77"),
        {BY_ID: "id", ROOT: "root_id", GROUP: "group_id", BY_SEQ: ""},
    ),
    "completed and claim": (
        writing(
            lambda plans, conn: claim.complete_and_claim(
                plans.database, conn, HOLDS, "queue-1", 10, plans.worker.id, None, claim.Waiting(["queue-1"], 2)
            )
        ),
        {READY: "queue", BY_SEQ: ""},
    ),
    "page": (lambda plans: page(plans), {BY_SEQ: ""}),
    "page of what is ready": (lambda plans: page(plans, State.AVAILABLE), {READY: "queue"}),
    "page of what is due later": (lambda plans: page(plans, State.SCHEDULED), {DUE: "available_at"}),
    "page of what has ended": (lambda plans: page(plans, State.COMPLETED), {ENDED: "ended_at"}),
    "page of what is held": (lambda plans: page(plans, State.RUNNING), {HELD: ""}),
    "status": (
        reading(lambda plans, conn: status.status(conn)),
        {READY: "", DUE: "", BLOCKED: "", HELD: "", ENDED: "state"},
    ),
    "what has ended since": (
        reading(lambda plans, conn: list(figures.ended_between(conn, A_MINUTE_AGO, IN_AN_HOUR, (0.1, 1.0)))),
        {ENDED: "ended_at"},
    ),
    "living": (reading(lambda plans, conn: nodes.living(conn)), {HELD: "node_id"}),
    "revoke": (lambda plans: revoking.revoke(plans.database, ["id-1", "id-2"]), {BY_ID: "id"}),
    "history": (
        reading(lambda plans, conn: acts.history_of(conn, "id-4001")),
        {"kathikon_history_job": "job", "kathikon_acts_pkey": "id"},
    ),
    "next tick": (
        reading(lambda plans, conn: schedules.next_tick(conn, ["schedule-7", "schedule-8"])),
        {SCHEDULES: ""},
    ),
    "due ticks": (
        writing(lambda plans, conn: schedules.due(conn, ["schedule-7", "schedule-8"], 10)),
        {SCHEDULES: "next_at"},
    ),
    "forget the history": (writing(lambda plans, conn: acts.forget(conn, ["id-1", "id-2"])), {}),
    "size": (reading(lambda plans, conn: messages.size(conn, "queue-1")), {READY: "queue"}),
}


#: They take the first rows in the order of the index.
IN_ORDER = {
    "look",
    "look for all that an idle worker asks",
    "look and renew",
    "claim",
    "completed and claim",
    "promote",
    "next due",
    "next tick",
    "due ticks",
    "page",
    "page of what is ready",
    "prunable",
    "prune",
    "prune from the front on",
    "take messages",
    "take messages for good",
}

#: Until PostgreSQL has its first statistics it sorts all that is due or old, or reads the table.
WANTS_STATISTICS = {
    "promote",
    "status",
    "page of what is ready",
    "history",
    "prunable",
    "prune",
    "prune from the front on",
    "workflow",
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_plan(plans: Plans, name: str) -> None:
    if name in WANTS_STATISTICS and plans.database.dialect.name == "postgresql" and not plans.is_analyzed:
        pytest.skip("PostgreSQL takes another way until it has its first statistics")
    call, expected = STATEMENTS[name]
    with plans.of() as found:
        call(plans)
    assert set(expected) <= {access.index for plan in found for access in plan.accesses}
    for plan in found:
        print(plan)
        assert not (plan.sorts and name in IN_ORDER)
        for access in plan.accesses:
            assert access.index in expected or access.table != "kathikon_jobs"
            if name == "claim from the front on" and plans.database.dialect.keeps_old_rows and access.index == READY:
                assert (
                    "priority" in access.condition
                )  # each part begins where it begins, not at the queue's first entry
            # A partial index that is read from end to end is no better than a table.
            assert expected.get(access.index or "", "") in access.condition


def test_a_claim_passes_over_what_is_before_the_front(plans: Plans) -> None:
    with plans.of() as found:
        STATEMENTS["claim from the front on"][0](plans)
    for plan in found:
        conditions = [access.condition for access in plan.accesses if access.index == READY]
        at_their_fronts = [one for one in conditions if "available_at >=" in one and "priority =" in one]
        assert (len(conditions), len(at_their_fronts)) == ((5, 2) if plans.database.dialect.keeps_old_rows else (1, 0))
