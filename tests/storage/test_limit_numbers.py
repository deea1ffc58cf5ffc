"""The limits in an operator's hands: read, changed at run time, and cleaned up."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select, update

from kathikon_celery.job import Job, State, Use
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.operate.limits import Limits, Numbers
from kathikon_celery.storage import Storage, limit_numbers, limits, nodes, prune
from kathikon_celery.storage.errors import NotFound
from kathikon_celery.storage.limit_numbers import KeyStatus
from kathikon_celery.storage.tables import limit_keys, slots
from tests.storage.actors import Worker, new_job, the_job
from tests.support.statements import counted

NAME = "account:{account}"


def use(account: int = 7, concurrency: int | None = 1, rate: int | None = None, per: float = 1.0) -> Use:
    return Use(f"account:{account}", NAME, 1, concurrency, rate, per, 1)


def publish(storage: Storage, job_id: str, *uses: Use, queue: str = "default") -> None:
    storage.insert(new_job(job_id, queue=queue, limits=uses or (use(),)))


def states(storage: Storage) -> dict[str, State]:
    return {job.id: job.state for job in storage.all()}


@pytest.fixture
def hands(storage: Storage) -> Limits:
    """An operator's, of a fleet whose code has one limit."""
    limits.define(storage.database, [use()])
    return Kathikon(storage, operator="ada").limits


def claim(worker: Worker, number: int = 10) -> list[Job]:
    return worker.claim(number)


def test_what_there_is(storage: Storage, hands: Limits, worker: Worker) -> None:
    (one,) = hands.all()
    assert (one.name, one.numbers, one.of_operator) == (NAME, Numbers(1), None)
    assert (one.keys, one.in_use, one.blocked, one.next_in) == (0, 0, 0, None)
    for number in range(3):
        publish(storage, f"seven {number}")
    publish(storage, "nine", use(9))
    assert sorted(job.id for job in claim(worker)) == ["nine", "seven 0"]
    one = hands.get(NAME)
    assert (one.keys, one.in_use, one.blocked) == (2, 2, 2)
    seven, nine = hands.keys(NAME)
    assert seven == KeyStatus("account:7", Numbers(1), in_use=1, blocked=2, has_room=False)
    assert str(seven) == "1 of 1 in use"
    assert nine == KeyStatus("account:9", Numbers(1), in_use=1, blocked=0, has_room=False)
    assert hands.keys(NAME, limit=1) == [seven]


def test_a_higher_concurrency_lets_jobs_out_at_once(storage: Storage, hands: Limits, worker: Worker) -> None:
    for number in range(4):
        publish(storage, str(number))
    assert len(claim(worker)) == 1
    found = hands.set(NAME, concurrency=3, reason="they can")
    assert (found.numbers, found.of_operator, found.of_code) == (Numbers(3), Numbers(3), Numbers(1))
    assert (found.operator, found.reason) == ("ada", "they can")
    assert found.changed_at is not None
    assert sorted(states(storage).values()) == ["available", "available", "blocked", "claimed"]
    assert len(claim(worker)) == 2


def test_lower_numbers_take_nothing_away(storage: Storage, hands: Limits, worker: Worker) -> None:
    hands.set(NAME, concurrency=2)
    for number in range(4):
        publish(storage, str(number))
    running = claim(worker)
    hands.set(NAME, concurrency=0)
    assert [the_job(storage, job.id).state for job in running] == [State.CLAIMED] * 2
    (seven,) = hands.keys(NAME)
    assert (seven.in_use, str(seven)) == (2, "2 of 0 in use")
    worker.complete(*running)
    limits.sweep_all(storage.database)
    assert claim(worker) == []
    assert storage.next_offer() == limits.SWEEP_INTERVAL
    assert hands.reset(NAME)
    assert len(claim(worker)) == 1
    assert not hands.reset(NAME)


def test_what_is_not_given_stays_as_it_counts(storage: Storage, hands: Limits) -> None:
    assert hands.set(NAME, rate="60/m", burst=5).numbers == Numbers(1, 60, 60.0, 5)
    assert hands.set(NAME, concurrency="none").numbers == Numbers(None, 60, 60.0, 5)
    assert hands.set(NAME, rate="3/s").numbers == Numbers(None, 3, 1.0, 3)
    assert hands.set(NAME, rate="none").numbers == Numbers(None, None, 1.0, 3)
    assert str(hands.get(NAME).numbers) == "no limit"
    assert hands.set(NAME, concurrency=2, rate=0.5).numbers == Numbers(2, 1, 2.0, 1)
    assert str(hands.get(NAME).numbers) == "2 at once, 1 in 2 s"


def test_the_code_says_other_numbers_meanwhile(storage: Storage, hands: Limits) -> None:
    hands.set(NAME, concurrency=5)
    limits.define(storage.database, [use(concurrency=2)])
    found = hands.get(NAME)
    assert (found.numbers, found.of_code) == (Numbers(5), Numbers(2))
    hands.reset(NAME)
    assert hands.get(NAME).numbers == Numbers(2)


def test_the_record(storage: Storage, hands: Limits) -> None:
    hands.set(NAME, concurrency=2, rate="60/m", reason="why")
    hands.set(NAME, concurrency=2)  # as it is
    hands.reset(NAME, reason="over")
    hands.reset(NAME)  # as it is
    acts = Kathikon(storage).acts()
    assert [(act.verb, act.target, act.operator, act.reason) for act in acts] == [
        ("unlimit", f"limit {NAME}", "ada", "over"),
        ("limit", f"limit {NAME}: concurrency 2, rate 60/m", "ada", "why"),
    ]
    assert all(act.ended_at for act in acts)


def test_an_unknown_limit(storage: Storage, hands: Limits, worker: Worker) -> None:
    with pytest.raises(NotFound, match=r"no limit 'acount:{account}'; there are: 'account:{account}'; did you mean"):
        hands.set("acount:{account}", concurrency=2)
    for call in (hands.get, hands.keys, hands.reset):
        with pytest.raises(NotFound, match="no limit 'none'"):
            call("none")
    publish(storage, "job")
    claim(worker)
    with pytest.raises(NotFound, match=r"'account:7': that is a key of the limit 'account:{account}'"):
        hands.get("account:7")
    assert Kathikon(storage).acts() == []


def test_a_fleet_without_limits(storage: Storage) -> None:
    hands = Kathikon(storage).limits
    assert hands.all() == []
    with pytest.raises(NotFound, match="no worker has told of any limit yet"):
        hands.get("x")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "say what to set: a concurrency, a rate, or a burst"),
        ({"concurrency": -1}, "a concurrency is a whole number from 0 to 2147483647, or 'none', not -1"),
        ({"concurrency": "many"}, "a concurrency is a whole number"),
        ({"rate": "60/w"}, 'a rate is a rate such as "10/s"'),
        ({"rate": 0}, "above 0"),
        ({"burst": 0}, "a burst is a whole number from 1"),
        ({"rate": "5/s", "burst": 6}, "a burst is at most the number of its rate, 5, not 6"),
    ],
)
def test_wrong_numbers(hands: Limits, given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        hands.set(NAME, **given)  # type: ignore[arg-type]
    assert hands.get(NAME).of_operator is None


def test_a_rate_at_run_time(storage: Storage, hands: Limits, worker: Worker) -> None:
    hands.set(NAME, concurrency="none", rate="1/h")
    for number in range(3):
        publish(storage, str(number))
    assert len(claim(worker)) == 1
    (seven,) = hands.keys(NAME)
    assert seven.next_in is not None
    assert 3500 < seven.next_in < 3700
    assert str(seven).startswith("the next of 1 in 3600 s starts in 3,6")
    assert 3500 < (hands.get(NAME).next_in or 0) < 3700
    assert 3500 < (limits_wake(storage) or 0) < 3700
    hands.set(NAME, rate="1000/s")  # the hour is forgotten
    assert (hands.keys(NAME)[0].next_in or 0) < 1
    assert (limits_wake(storage) or 0) < 1
    hands.set(NAME, rate="none")
    assert len(claim(worker)) == 2


def limits_wake(storage: Storage) -> float | None:
    """Seconds until jobs leave the lines by the clock."""
    with storage.database.read() as connection:
        return connection.execute(limit_numbers._NEXT, {"of_name": NAME}).scalar()


def test_a_full_limit_with_a_rate_waits_for_no_clock(storage: Storage, hands: Limits, worker: Worker) -> None:
    hands.set(NAME, concurrency=1, rate="1000/s")
    publish(storage, "runs")
    publish(storage, "waits")
    assert len(claim(worker)) == 1
    storage.offer_due()
    limits.sweep_all(storage.database)
    assert limits_wake(storage) is None
    (seven,) = hands.keys(NAME)
    assert (str(seven), seven.next_in) == ("1 of 1 in use", None)


def test_explained(storage: Storage, hands: Limits, worker: Worker) -> None:
    operator = Kathikon(storage)
    publish(storage, "runs")
    publish(storage, "waits")
    nodes.consume(storage.database, worker.id, ["other"])
    assert operator.explain("waits").why == "no_consumer"
    nodes.consume(storage.database, worker.id, ["default"])
    assert (
        str(operator.explain("waits")) == "it waits in the line of the limit 'account:7': others were let out before it"
    )
    assert len(claim(worker)) == 1
    explained = operator.explain("waits")
    assert (explained.why, explained.text) == ("limit", "it waits for the limit 'account:7': 1 of 1 in use")
    limits.close(storage.database, "account:7", 30)
    assert operator.explain("waits").text.startswith("it waits for the limit 'account:7': closed for ")
    assert operator.explain("waits").text.endswith(" s by a task")
    operator.pause_queue("default")
    assert operator.explain("waits").why == "paused"


def test_a_rate_is_explained_without_a_worker_s_word(storage: Storage, worker: Worker) -> None:
    nodes.consume(storage.database, worker.id, ["default"])
    for number in range(2):
        publish(storage, str(number), use(concurrency=None, rate=1, per=3600.0))
    claim(worker)
    text = Kathikon(storage).explain("1").text
    assert text.startswith("it waits for the limit 'account:7': the next of 1 in 3600 s starts in 3,6")


def test_blocked_jobs_are_counted_and_alarm_nobody(storage: Storage, hands: Limits, worker: Worker) -> None:
    for number in range(3):
        publish(storage, str(number))
    claim(worker)
    (queue,) = Kathikon(storage).queue_status()
    assert (queue.ready, queue.blocked, queue.claimed, queue.oldest) == (0, 2, 1, None)
    assert [job.id for job in Kathikon(storage).jobs("blocked").page(10)] == ["1", "2"]


def test_a_purge_takes_blocked_jobs(storage: Storage, hands: Limits, worker: Worker) -> None:
    for number in range(3):
        publish(storage, str(number))
        publish(storage, f"other {number}", queue="other")
    claim(worker, 1)
    with storage.database.write() as connection:
        assert prune.purge(connection, "default") == 2
    assert set(states(storage)) == {"0", "other 0", "other 1", "other 2"}


def number_of(storage: Storage, table: object) -> int:
    with storage.database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())  # type: ignore[arg-type]


def test_rubbish(storage: Storage, hands: Limits, worker: Worker) -> None:
    for account in range(5):
        publish(storage, f"over {account}", use(account))
        publish(storage, f"runs {account}", use(account + 100))
    found = {job.id: job for job in claim(worker)}
    publish(storage, "waits", use(100))
    worker.complete(*(job for name, job in found.items() if name.startswith("over")))
    assert (number_of(storage, slots), number_of(storage, limit_keys)) == (10, 10)
    with storage.database.write() as connection:
        connection.execute(update(limit_keys).where(limit_keys.c.key == "account:3").values(next_token=4e9))
        connection.execute(update(limit_keys).where(limit_keys.c.key == "account:4").values(closed_until=4e9))
    assert storage.prune_limits()
    assert (number_of(storage, slots), number_of(storage, limit_keys)) == (5, 7)
    assert [one.in_use for one in hands.keys(NAME)] == [1] * 5 + [0] * 2
    assert states(storage)["waits"] is State.BLOCKED
    worker.complete(*(job for name, job in found.items() if name.startswith("runs")))
    storage.delete("waits")
    with storage.database.write() as connection:
        connection.execute(update(limit_keys).values(next_token=1.0, closed_until=1.0))
    assert not storage.prune_limits()
    assert (number_of(storage, slots), number_of(storage, limit_keys)) == (0, 0)
    publish(storage, "anew", use(100))
    assert len(claim(worker)) == 1


def test_in_chunks(storage: Storage, hands: Limits, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit_numbers, "CHUNK", 3)
    hands.set(NAME, concurrency="none", rate="1/h")
    for number in range(14):
        publish(storage, str(number), use(number % 7))
    running = claim(worker, 20)
    assert len(running) == 7
    hands.set(NAME, rate="1000/s")
    assert all((one.next_in or 0.0) < 1 for one in hands.keys(NAME))
    hands.set(NAME, rate="none")
    running += claim(worker, 20)
    assert len(running) == 14
    worker.complete(*running)
    with storage.database.write() as connection:
        connection.execute(update(limit_keys).values(next_token=1.0, wake_at=None))
    with counted("DELETE") as statements:
        assert not storage.prune_limits()
    assert len(statements) == 6
    assert number_of(storage, slots) == 0
