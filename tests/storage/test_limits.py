"""Limits: which jobs start, which wait in lines, and who lets them out, whatever happens in between."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import select, update

from kathikon_celery.job import Job, State, Use
from kathikon_celery.storage import Storage, claim, limits
from kathikon_celery.storage.limits import RUBBISH, SWEEP_INTERVAL
from kathikon_celery.storage.names import key as key_of
from kathikon_celery.storage.tables import jobs, limit_keys, slots
from tests.storage.actors import Worker, new_job, the_job

HOUR = timedelta(hours=1)
ONE = Use("k", "k", concurrency=1)
#: Seconds that a test which is right never needs.
PATIENCE = 20.0


def of(key: str, concurrency: int | None = None, **fields: Any) -> Use:
    return Use(key, key.partition(":")[0], concurrency=concurrency, **fields)


def publish(storage: Storage, ids: Iterable[object], *uses: Use, **fields: Any) -> list[Job]:
    """Jobs with these limits, one after the other."""
    batch = [new_job(str(job_id), limits=uses, **fields) for job_id in ids]
    for job in batch:
        storage.insert(job)
    return batch


def ids_of(found: Iterable[Job]) -> list[str]:
    return [job.id for job in found]


def offer(storage: Storage, *found: Job) -> None:
    """What a worker does after it has written how these jobs ended."""
    limits.offer(storage.database, limits.keys_of(found))


def end(worker: Worker, *found: Job, storage: Storage) -> None:
    assert worker.complete(*found) == len(found)
    offer(storage, *found)


def states(storage: Storage) -> dict[str, str]:
    return {job.id: job.state.value for job in storage.all()}


def run_all(storage: Storage, worker: Worker, queue: str = "default", together: int = 10) -> list[str]:
    """Claim and complete, until nothing is ready; the ids in the order of their starts."""
    found: list[str] = []
    while taken := worker.claim(together, queue):
        found += ids_of(taken)
        end(worker, *taken, storage=storage)
    return found


# --- concurrency


def test_no_more_than_the_concurrency_of_a_key_are_held(storage: Storage, worker: Worker, other: Worker) -> None:
    publish(storage, range(5), of("k", 2))
    publish(storage, ["free"])
    first = worker.claim(10)
    assert ids_of(first) == ["0", "1", "free"]
    assert other.claim(10) == []
    end(worker, first[0], storage=storage)
    assert ids_of(other.claim(10)) == ["2"]


def test_each_key_has_room_of_its_own(storage: Storage, worker: Worker) -> None:
    for number in range(6):
        publish(storage, [number], of(f"account:{number % 3}", 1))
    assert ids_of(worker.claim(10)) == ["0", "1", "2"]


def test_all_jobs_of_a_key_run_one_after_the_other(storage: Storage, worker: Worker) -> None:
    publish(storage, range(12), ONE)
    assert run_all(storage, worker) == [str(number) for number in range(12)]


def test_a_job_needs_room_in_all_its_limits(storage: Storage, worker: Worker) -> None:
    for number in range(6):
        publish(storage, [number], of(f"account:{number % 3}", 1), of("all", 2))
    first = worker.claim(10)
    assert ids_of(first) == ["0", "1"]
    assert the_job(storage, "2").gate == "all"
    end(worker, first[0], storage=storage)
    assert ids_of(worker.claim(10)) == ["2"]
    assert sorted(run_and_finish(storage, worker, first[1])) == ["3", "4", "5"]


def test_jobs_that_name_their_limits_in_different_orders_do_not_wait_for_each_other(
    storage: Storage, worker: Worker, other: Worker
) -> None:
    a, b = of("a", 1), of("b", 1)
    publish(storage, ["holds b"], b)
    (holds_b,) = worker.claim(10)
    publish(storage, ["a and b"], a, b)
    assert other.claim(10) == []
    publish(storage, ["holds a"], a, queue="other")
    (holds_a,) = worker.claim(10, "other")
    publish(storage, ["b and a"], b, a, priority=1)
    end(worker, holds_b, storage=storage)
    assert other.claim(10) == []
    end(worker, holds_a, storage=storage)
    assert sorted(run_all(storage, worker)) == ["a and b", "b and a"]


def run_and_finish(storage: Storage, worker: Worker, *held: Job) -> list[str]:
    """End what is *held* by anybody as well, and run the rest."""
    still = [job for job in storage.all() if job.state in (State.CLAIMED, State.RUNNING)]
    for job in still:
        with storage.database.write() as connection:
            ended = {"state": State.COMPLETED.value, "node_id": None}
            connection.execute(update(jobs).where(jobs.c.seq == job.seq).values(ended))
        offer(storage, job)
    return run_all(storage, worker)


def test_a_job_that_was_let_out_for_a_job_which_waits_elsewhere_is_found(storage: Storage, worker: Worker) -> None:
    """The first job of a key has to wait for another limit; the next one of the key needs only the key."""
    publish(storage, ["holds"], of("all", 1))
    (holds,) = worker.claim(1)
    publish(storage, ["both"], of("k", 2), of("all", 1))
    publish(storage, ["one"], of("k", 2))
    assert ids_of(worker.claim(10)) == ["one"]
    end(worker, holds, storage=storage)
    assert ids_of(worker.claim(10)) == ["both"]


def test_the_rest_of_a_claim_is_filled_with_others(storage: Storage, worker: Worker) -> None:
    publish(storage, ["x"], of("all", 1), queue="elsewhere")
    assert worker.claim(1, "elsewhere")
    for number in range(5):
        publish(storage, [f"limited {number}"], of(f"account:{number}", 1), of("all", 1), priority=9)
    publish(storage, ["free 1", "free 2"])
    assert ids_of(worker.claim(2)) == ["free 1", "free 2"]


# --- weights


def test_weights_add_up(storage: Storage, worker: Worker) -> None:
    publish(storage, ["a", "b"], of("k", 10, weight=4))
    publish(storage, ["c", "d"], of("k", 10, weight=3))
    first = worker.claim(10)
    assert ids_of(first) == ["a", "b"]
    end(worker, first[0], storage=storage)
    assert ids_of(worker.claim(10)) == ["c", "d"]


def test_a_job_above_the_limit_runs_alone(storage: Storage, worker: Worker) -> None:
    publish(storage, ["light"], of("k", 3))
    publish(storage, ["heavy"], of("k", 3, weight=7))
    publish(storage, ["last"], of("k", 3))
    (light,) = worker.claim(10)
    assert light.id == "light"
    end(worker, light, storage=storage)
    (heavy,) = worker.claim(10)
    assert heavy.id == "heavy"
    end(worker, heavy, storage=storage)
    assert ids_of(worker.claim(10)) == ["last"]


def test_light_jobs_do_not_pass_a_heavy_one_for_ever(storage: Storage, worker: Worker) -> None:
    publish(storage, ["1", "2"], of("k", 2))
    held = worker.claim(10)
    publish(storage, ["heavy"], of("k", 2, weight=2))
    publish(storage, ["3", "4"], of("k", 2))
    end(worker, held[0], storage=storage)
    assert worker.claim(10) == []
    end(worker, held[1], storage=storage)
    assert ids_of(worker.claim(10)) == ["heavy"]


# --- order


def test_a_line_is_in_the_order_of_priority_then_of_publication(storage: Storage, worker: Worker) -> None:
    publish(storage, ["holds"], ONE)
    (holds,) = worker.claim(1)
    publish(storage, ["low 1", "low 2"], ONE)
    publish(storage, ["high 1", "high 2"], ONE, priority=5)
    end(worker, holds, storage=storage)
    assert run_all(storage, worker) == ["high 1", "high 2", "low 1", "low 2"]


def test_a_key_with_few_jobs_does_not_wait_behind_a_key_with_many(storage: Storage, worker: Worker) -> None:
    shared = of("all", 4)
    storage.insert_many([new_job(f"many {number}", limits=(of("t:0", 2), shared)) for number in range(50)])
    storage.insert_many([new_job(f"few {number}", limits=(of(f"t:{1 + number}", 2), shared)) for number in range(8)])
    order = run_all(storage, worker, together=4)
    assert max(order.index(f"few {number}") for number in range(8)) < 20
    assert len(order) == 58


# --- rates


def wind_back(storage: Storage, key: str, seconds: float) -> None:
    """Let so much time pass for a key."""
    with storage.database.write() as connection:
        state, wake = connection.execute(
            select(limit_keys.c.next_token, limit_keys.c.wake_at).where(limit_keys.c.key == key)
        ).one()
        moved = {"next_token": state - seconds, "wake_at": wake and wake - timedelta(seconds=seconds)}
        connection.execute(update(limit_keys).where(limit_keys.c.key == key).values(moved))


def test_a_rate_lets_one_start_at_a_time(storage: Storage, worker: Worker) -> None:
    publish(storage, range(3), of("k", rate=60, per=3600.0))
    first = worker.claim(10)
    assert ids_of(first) == ["0"]
    end(worker, *first, storage=storage)
    assert worker.claim(10) == []
    ahead = storage.next_offer()
    assert ahead is not None
    assert 0 < ahead <= SWEEP_INTERVAL  # the next token is later than the next sweep
    assert storage.offer_due() == 0
    wind_back(storage, "k", 70)
    ahead = storage.next_offer()
    assert ahead is not None
    assert ahead <= 0
    assert storage.offer_due() == 1
    assert ids_of(worker.claim(10)) == ["1"]


def test_a_burst_starts_at_once(storage: Storage, worker: Worker) -> None:
    publish(storage, range(8), of("k", rate=60, per=3600.0, burst=5))
    assert ids_of(worker.claim(10)) == ["0", "1", "2", "3", "4"]


def test_a_token_that_was_not_used_is_given_back(storage: Storage, worker: Worker) -> None:
    publish(storage, ["a", "b"], of("k", rate=60, per=3600.0))
    (job,) = worker.claim(10)
    assert worker.give_back(job, has_begun=False) == 1
    limits.give_tokens_back(storage.database, [job])
    offer(storage, job)
    (again,) = worker.claim(10)
    assert again.id == "a"
    end(worker, again, storage=storage)
    assert not worker.claim(10)


def test_a_rate_counts_weights(storage: Storage, worker: Worker) -> None:
    publish(storage, range(4), of("k", rate=6, per=3600.0, burst=6, weight=3))
    assert ids_of(worker.claim(10)) == ["0", "1"]


def test_jobs_that_have_a_token_and_find_no_worker_keep_nobody_awake(storage: Storage, worker: Worker) -> None:
    """The token is there and the next job let out: no moment is to be waited for, until that job starts."""
    publish(storage, range(3), of("k", rate=60, per=3600.0))
    end(worker, *worker.claim(10), storage=storage)
    wind_back(storage, "k", 70)
    assert storage.offer_due() == 1
    ahead = storage.next_offer()
    assert ahead is not None
    assert ahead == SWEEP_INTERVAL
    assert len(worker.claim(1)) == 1
    ahead = storage.next_offer()
    assert ahead is not None
    assert ahead == SWEEP_INTERVAL  # 60 s off
    wind_back(storage, "k", 70)
    assert storage.offer_due() == 1


def test_a_moment_that_nobody_waits_for_is_forgotten(storage: Storage, worker: Worker) -> None:
    publish(storage, ["only"], of("k", rate=60, per=3600.0))
    worker.complete(*worker.claim(1))
    assert storage.next_offer() is not None
    wind_back(storage, "k", 70)
    assert storage.offer_due() == 0
    assert storage.next_offer() is None


def test_real_time_brings_tokens(storage: Storage, worker: Worker) -> None:
    publish(storage, range(6), of("k", rate=50, per=1.0))
    began, started = time.monotonic(), 0
    while started < 6:
        assert time.monotonic() < began + PATIENCE
        storage.offer_due()
        taken = worker.claim(10)
        started += len(taken)
        if taken:
            end(worker, *taken, storage=storage)
    assert time.monotonic() - began > 5 * 0.02 - 0.02 - 0.005


# --- closed keys


def test_no_job_of_a_closed_key_starts(storage: Storage, worker: Worker) -> None:
    publish(storage, range(2), of("k", 5))
    publish(storage, ["other"], of("k2", 5))
    limits.close(storage.database, "k", 3600.0)
    assert ids_of(worker.claim(10)) == ["other"]
    publish(storage, ["later"], of("k", 5))
    assert states(storage)["later"] == "blocked"
    limits.close(storage.database, "k", 1.0)  # a shorter time does not open it
    assert storage.offer_due() == 0
    with storage.database.write() as connection:
        past = datetime.now(timezone.utc) - HOUR
        connection.execute(update(limit_keys).values(closed_until=past.timestamp(), wake_at=past))
    assert storage.offer_due() == 3
    assert ids_of(worker.claim(10)) == ["0", "1", "later"]


def test_a_key_that_nobody_has_used_yet_can_be_closed(storage: Storage, worker: Worker) -> None:
    limits.close(storage.database, "k", 3600.0)
    publish(storage, ["x"], of("k", 1))
    assert worker.claim(1) == []
    assert states(storage) == {"x": "blocked"}


# --- other ways into the line, and out of it


def test_a_job_with_an_eta_enters_its_line_when_it_is_due(
    storage: Storage, worker: Worker, set_row: Callable[..., None]
) -> None:
    publish(storage, ["now"], ONE)
    publish(storage, ["later", "even later"], ONE, scheduled_at=datetime.now(timezone.utc) + HOUR)
    (now,) = worker.claim(10)
    for name in ("later", "even later"):
        set_row(name, available_at=datetime.now(timezone.utc) - HOUR)
    assert storage.promote_scheduled() == 2
    assert worker.claim(10) == []
    end(worker, now, storage=storage)
    assert len(worker.claim(10)) == 1


def test_promotion_lets_out_what_has_room(storage: Storage, worker: Worker, set_row: Callable[..., None]) -> None:
    publish(storage, ["later"], ONE, scheduled_at=datetime.now(timezone.utc) + HOUR)
    set_row("later", available_at=datetime.now(timezone.utc) - HOUR)
    assert storage.promote_scheduled() == 1
    assert ids_of(worker.claim(1)) == ["later"]


def test_a_retry_waits_in_line_again(storage: Storage, worker: Worker) -> None:
    publish(storage, ["a", "b"], ONE)
    a = worker.claim_one()
    worker.start(a)
    assert worker.publish_again(a, limits=(ONE,))
    assert the_job(storage, "a").attempts == 1
    first = worker.claim_one()  # "a" has the lower number
    end(worker, first, storage=storage)
    second = worker.claim_one()
    assert {first.id, second.id} == {"a", "b"}


def test_a_job_that_is_parked_has_not_been_attempted(storage: Storage, worker: Worker, other: Worker) -> None:
    publish(storage, ["a"], of("k", 1), of("all", 1))
    publish(storage, ["b"], of("k2", 1), of("all", 1))
    assert ids_of(worker.claim(10)) == ["a"]
    b = the_job(storage, "b")
    assert (b.state, b.attempts, b.gate, b.node_id, b.claimed_at) == (State.BLOCKED, 0, "all", None, None)


def test_what_is_given_back_makes_room(storage: Storage, worker: Worker, other: Worker) -> None:
    publish(storage, ["a", "b"], ONE)
    a = worker.claim_one()
    assert worker.give_back(a, has_begun=False) == 1
    offer(storage, a)
    held = other.claim(10)
    assert len(held) == 1  # one of them
    end(other, *held, storage=storage)
    assert len(other.claim(10)) == 1


@pytest.mark.parametrize("has_started", [False, True])
def test_a_lost_node_makes_room(storage: Storage, worker: Worker, other: Worker, has_started: bool) -> None:
    publish(storage, ["a", "b"], of("k:1", 1), of("all", 1))
    a = worker.claim_one()
    if has_started:
        worker.start(a)
    assert other.claim(10) == []
    assert worker.die() == 1
    held = other.claim(10)
    assert len(held) == 1
    end(other, *held, storage=storage)
    assert len(other.claim(10)) == 1


def test_the_report_of_a_lost_node_frees_nothing(storage: Storage, worker: Worker, other: Worker) -> None:
    publish(storage, ["a", "b"], ONE)
    a = worker.claim_one()
    worker.die()
    held = other.claim(10)
    assert worker.complete(a) == 0
    offer(storage, a)
    assert len(held) == 1
    assert other.claim(10) == []


def test_a_job_is_revoked_while_it_waits(storage: Storage, worker: Worker) -> None:
    publish(storage, ["a", "b", "c"], ONE)
    a = worker.claim_one()
    assert storage.backend.revoke(["b"]) == 1
    assert states(storage)["b"] == "cancelled"
    end(worker, a, storage=storage)
    assert ids_of(worker.claim(10)) == ["c"]


def test_a_job_expires_while_it_waits(storage: Storage, worker: Worker, set_row: Callable[..., None]) -> None:
    publish(storage, ["a", "b", "c"], ONE, expires_at=datetime.now(timezone.utc) + HOUR)
    a = worker.claim_one()
    set_row("b", expires_at=datetime.now(timezone.utc) - HOUR)
    assert storage.discard_expired() == 1
    assert states(storage)["b"] == "discarded"
    end(worker, a, storage=storage)
    assert ids_of(worker.claim(10)) == ["c"]


@pytest.mark.parametrize("leaves", ["expires", "is revoked", "is deleted"])
def test_the_sweep_finds_the_room_of_a_job_that_was_let_out_and_left(
    storage: Storage, worker: Worker, set_row: Callable[..., None], leaves: str
) -> None:
    publish(storage, ["a", "b"], ONE, expires_at=datetime.now(timezone.utc) + HOUR)
    assert states(storage) == {"a": "available", "b": "blocked"}
    if leaves == "expires":
        set_row("a", expires_at=datetime.now(timezone.utc) - HOUR)
        assert storage.discard_expired() == 1
    elif leaves == "is revoked":
        storage.backend.revoke(["a"])
    else:
        storage.delete("a")
    assert storage.next_offer() is not None
    assert storage.sweep() == ""
    assert ids_of(worker.claim(10)) == ["b"]


def test_the_sweep_finds_what_a_killed_worker_has_not_offered(storage: Storage, worker: Worker) -> None:
    publish(storage, ["a", "b"], ONE)
    worker.complete(worker.claim_one())  # and no offer
    assert worker.claim(10) == []
    storage.sweep()
    assert ids_of(worker.claim(10)) == ["b"]


def test_the_sweep_goes_from_line_to_line(storage: Storage, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        publish(storage, [f"{number} a", f"{number} b"], of(f"k:{number}", 1))
    worker.complete(*worker.claim(10))
    monkeypatch.setattr(limits, "_GATES", limits._GATES.limit(2))
    monkeypatch.setattr(limits, "SWEPT", 2)
    assert (first := storage.sweep()) == "k:1"
    assert (second := storage.sweep(first)) == "k:3"
    assert storage.sweep(second) == ""
    assert ids_of(worker.claim(10)) == [f"{number} b" for number in range(5)]


def test_an_offer_may_be_repeated(storage: Storage, worker: Worker) -> None:
    publish(storage, range(6), of("k", 2))
    before = states(storage)
    assert Counter(before.values()) == {"available": 2, "blocked": 4}
    for _ in range(3):
        assert limits.offer(storage.database, ["k", "unknown"]) == 0
    assert states(storage) == before
    held = worker.claim(10)
    for _ in range(3):
        assert limits.offer(storage.database, ["k"]) == 0
    worker.complete(held[0])
    assert [limits.offer(storage.database, ["k"]) for _ in range(3)] == [1, 0, 0]


# --- queues


def test_a_queue_that_nobody_consumes_holds_up_no_other(storage: Storage, worker: Worker) -> None:
    for number in range(3):
        publish(storage, [f"a{number}"], ONE, queue="abandoned")
        publish(storage, [f"b{number}"], ONE, queue="busy")
        publish(storage, [f"z{number}"], ONE, queue="zzz")
    assert run_all(storage, worker, "busy") == ["b0", "b1", "b2"]
    assert run_all(storage, worker, "zzz") == ["z0", "z1", "z2"]


def test_heavy_jobs_of_a_queue_that_nobody_consumes_hold_up_no_other(storage: Storage, worker: Worker) -> None:
    publish(storage, ["x", "y", "z"], of("k", 4, weight=4), queue="abandoned")
    publish(storage, ["holds"], of("k", 4), queue="busy")
    holds = worker.claim_one("busy")
    publish(storage, ["1", "2", "3", "4"], of("k", 4), queue="busy")
    assert ids_of(worker.claim(10, "busy")) == ["1", "2", "3"]
    end(worker, holds, storage=storage)
    assert ids_of(worker.claim(10, "busy")) == ["4"]


# --- the other ways to claim


def test_a_told_job_without_room_is_parked(storage: Storage, worker: Worker, other: Worker) -> None:
    publish(storage, ["a"], of("k", 1), of("all", 1))
    publish(storage, ["b"], of("k2", 1), of("all", 1))
    b = the_job(storage, "b")
    assert ids_of(other.claim(1)) == ["a"]
    assert worker.claim_told(b) == []
    assert states(storage)["b"] == "blocked"


def test_a_told_job_with_room_is_claimed(storage: Storage, worker: Worker, other: Worker) -> None:
    publish(storage, ["a", "b"], ONE)
    assert ids_of(worker.claim_told(the_job(storage, "a"))) == ["a"]
    assert worker.claim_told(the_job(storage, "b")) == []
    assert other.claim(10) == []


def test_complete_and_claim_admits(storage: Storage, worker: Worker) -> None:
    publish(storage, range(4), of("k:1", 1), of("all", 2))
    publish(storage, ["free"])
    first = worker.claim(1)
    number, found = worker.complete_and_claim(*first, limit=3)
    assert (number, ids_of(found)) == (1, ["free"])
    offer(storage, *first)
    number, found = worker.complete_and_claim(*found, limit=3)
    assert (number, ids_of(found)) == (1, ["1"])


def test_the_storage_itself_claims_by_the_limits(storage: Storage) -> None:
    publish(storage, range(3), of("k", 1))
    worker = Worker(storage)
    assert ids_of(storage.claim("default", 10, worker.id)) == ["0"]


# --- publication


def test_a_bulk_lets_out_what_has_room(storage: Storage, worker: Worker) -> None:
    storage.insert_many(
        [new_job(str(number), limits=(of(f"k:{number % 3}", 1),) if number % 2 else ()) for number in range(12)]
    )
    found = ids_of(worker.claim(20))
    assert found[:6] == ["0", "2", "4", "6", "8", "10"]
    assert sorted(found[6:]) == ["1", "3", "5"]


def test_the_same_publication_again_changes_nothing(storage: Storage, worker: Worker) -> None:
    (a, b) = publish(storage, ["a", "b"], ONE)
    held = worker.claim(10)
    storage.insert(a)
    storage.insert(b)
    assert states(storage) == {"a": "claimed", "b": "blocked"}
    end(worker, *held, storage=storage)
    storage.insert(a)
    assert states(storage) == {"a": "completed", "b": "available"}


def test_another_publication_brings_its_own_limits(storage: Storage, worker: Worker) -> None:
    publish(storage, ["holds"], of("k", 1))
    (holds,) = worker.claim(1)
    publish(storage, ["a"], of("k", 1))
    assert states(storage)["a"] == "blocked"
    publish(storage, ["a"], of("k2", 1))
    (a,) = worker.claim(10)
    assert a.limits == (of("k2", 1),)
    end(worker, a, holds, storage=storage)


def test_another_publication_without_limits_has_none(storage: Storage, worker: Worker) -> None:
    publish(storage, ["holds"], of("k", 1))
    assert len(worker.claim(1)) == 1
    publish(storage, ["a", "b"], of("k", 1))
    publish(storage, ["a"])
    storage.insert_many([new_job("b", scheduled_at=datetime.now(timezone.utc) + HOUR)])
    (a,) = worker.claim(10)
    assert (a.id, a.limits, a.gate) == ("a", (), None)
    assert the_job(storage, "b").limits == ()


def test_a_held_job_that_is_published_again_keeps_its_slot(storage: Storage, worker: Worker) -> None:
    publish(storage, ["a"], ONE)
    held = worker.claim_one()
    publish(storage, ["a", "b"], ONE)
    assert worker.claim(10) == []
    end(worker, held, storage=storage)
    assert ids_of(worker.claim(10)) == ["b"]


# --- what is kept


@pytest.mark.parametrize(
    "text",
    [
        "nonsense", "{}", "[1]", "null", "[[]]", '[["k"]]', '[[1,2]]', '[["k","k","x"]]', '[["k","k",0]]',
        '[["k","k",1,"x"]]', '[["k","k",1,1,-1]]', '[["k","k",1,1,1,"x"]]', '[["k","k",1,1,1,0.0,1]]',
        '[["k","k",1,1,1,1.0,null]]', '[["k","k",1,1,1,1.0,1,1]]', '[["k","k",1],["k","k",1]]',
    ],
)  # fmt: skip
def test_a_job_whose_limits_cannot_be_read_runs_without(
    storage: Storage, worker: Worker, set_row: Callable[..., None], text: str
) -> None:
    publish(storage, ["holds", "corrupt", "b", "c"], ONE)
    (holds,) = worker.claim(1)
    set_row("corrupt", limits=text)
    end(worker, holds, storage=storage)
    found = worker.claim(10)
    assert "corrupt" in ids_of(found)
    worker.complete(*found)
    offer(storage, holds, *found)
    assert sorted(ids_of(found) + run_all(storage, worker)) == ["b", "c", "corrupt"]


def test_old_slots_are_deleted(storage: Storage, worker: Worker) -> None:
    publish(storage, range(4 * RUBBISH), of("k", 2))
    assert len(run_all(storage, worker)) == 4 * RUBBISH
    with storage.database.read() as connection:
        assert len(connection.execute(select(slots)).all()) <= 2 * RUBBISH


def test_the_numbers_of_the_code_in_the_table_count_for_jobs_that_were_sent_before(
    storage: Storage, worker: Worker
) -> None:
    publish(storage, range(5), of("k", 1))
    limits.define(storage.database, [of("k", 3)])
    limits.offer(storage.database, ["k"])
    assert ids_of(worker.claim(10)) == ["0", "1", "2"]


# --- several at once


class Fleet:
    """Threads that claim and complete as workers do, each with the connections of its own, and nobody who sweeps."""

    def __init__(self, storage: Storage, total: int, most: dict[str, int]) -> None:
        self.storage, self.total, self.most = storage, total, most
        self.lock, self.held, self.highest = threading.Lock(), Counter[str](), Counter[str]()
        self.done = 0
        self.errors: list[BaseException] = []
        self.deadline = time.monotonic() + PATIENCE

    def guarded(self, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                call()
            except BaseException as error:
                self.errors.append(error)

        return run

    def work(self, at_once: int) -> None:
        database, worker = self.storage.database, Worker(self.storage)
        while self.done < self.total and not self.errors and time.monotonic() < self.deadline:
            with database.once() as connection:
                found = claim.claim(database, connection, key_of("default"), at_once, worker.id)
            if not found:
                continue
            keys = [use.key for job in found for use in job.limits]
            with self.lock:
                self.held.update(keys)
                for key in keys:
                    self.highest[key] = max(self.highest[key], self.held[key])
            with self.lock:
                self.held.subtract(keys)
            worker.complete(*found)
            limits.offer(database, set(keys))
            with self.lock:
                self.done += len(found)

    def run(self, publishers: Sequence[Callable[[], None]], workers: Sequence[int]) -> None:
        calls = [*publishers, *(lambda at_once=at_once: self.work(at_once) for at_once in workers)]
        threads = [threading.Thread(target=self.guarded(call)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.errors, self.errors
        left = Counter(job.state.value for job in self.storage.all())
        assert left == {"completed": self.total}
        assert all(self.highest[key] <= most for key, most in self.most.items())


def test_a_release_and_a_park_at_the_same_time_lose_no_job(storage: Storage) -> None:
    """Many narrow keys against two wide ones, so that most claims park; nobody sweeps."""
    total = 300
    fleet = Fleet(storage, total, {"a": 1, "b": 2} | {f"k:{number}": 1 for number in range(5)})

    def publish_some(first: int) -> Callable[[], None]:
        def run() -> None:
            for number in range(first, first + total // 2):
                wide = [of("a", 1), of("b", 2)][:: 1 if number % 3 else -1]
                uses = (of(f"k:{number % 5}", 1), *wide[: 1 + number % 2])
                storage.insert(new_job(str(number), limits=uses))

        return run

    fleet.run([publish_some(0), publish_some(total // 2)], [1, 3, 7])


def test_claims_of_several_keys_in_any_order_do_not_deadlock(postgresql_storage: Storage) -> None:
    """New keys all the time, and limits in both orders: locks are taken in one order, or one at a time."""
    storage, total = postgresql_storage, 400
    fleet = Fleet(storage, total, {f"z:{number}": 2 for number in range(10)})
    batch = []
    for number in range(total):
        uses = [of(f"z:{number % 10}", 2), of(f"n:{number // 4}", 3), of(f"m:{number // 7}", 3), of("r", rate=10**6)]
        batch.append(new_job(str(number), limits=tuple(uses[:: 1 if number % 2 else -1])))

    def publish_some(share: int) -> Callable[[], None]:
        def run() -> None:
            storage.insert_many(batch[share::2])

        return run

    fleet.run([publish_some(0), publish_some(1)], [4, 6, 10])
