"""Every shape of canvas, run by real workers: its value, and nothing that is left over in the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import celery
import pytest
from celery import Celery, chain, chord, group
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError
from celery.result import AsyncResult, GroupResult, result_from_tuple
from sqlalchemy import func, select

from kathikon_celery.job import TERMINAL, State
from kathikon_celery.results.backend import KathikonBackend
from kathikon_celery.storage.selecting import Filter
from kathikon_celery.storage.tables import chord_parts, chords
from tests.integration.conftest import Jobs, Journal, Workers
from tests.support import apps
from tests.support.apps import (
    accumulate,
    add,
    add_parts,
    after_retries,
    big_payload,
    fail,
    hand_over,
    lengths,
    lineage,
    print_page,
    quiet,
    replaced_by_group,
    send,
    total,
)  # fmt: skip
from tests.support.statements import heard
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

pytestmark = [
    pytest.mark.usefixtures("worker"),
    # Celery says so of its own default, to whoever links an errback to a chord or a callback to a group.
    pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning"),
]


@pytest.fixture(scope="module", params=["prefork", "threads"])
def pool(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def worker(shared_workers: Workers, pool: str) -> WorkerProcess:
    for earlier in shared_workers.started:
        earlier.kill9()
    return shared_workers(pool=pool, name=f"canvas-{pool}", concurrency=2)


def doubles(count: int) -> list[Any]:
    return [add.s(number, number) for number in range(count)]


SHAPES: dict[str, tuple[Callable[[], Any], Any]] = {
    "chain": (lambda: chain(add.s(1, 2), add.s(3), add.s(4)), 10),
    "group": (lambda: group(doubles(5)), [0, 2, 4, 6, 8]),
    "chord": (lambda: chord(doubles(10), total.s()), 90),
    "chord of one": (lambda: chord([add.s(1, 1)], total.s()), 2),
    "chord of none": (lambda: chord([], total.s()), 0),
    "chord from a generator": (lambda: chord((add.s(n, n) for n in range(20)), total.s()), 380),
    "chord of tasks without results": (lambda: chord([quiet.s(n) for n in range(4)], accumulate.s()), [0, 1, 2, 3]),
    "chord in a chain": (lambda: chain(add.s(1, 1), group(add.s(n) for n in range(3)), total.s(), add.s(1)), 10),
    "chain that ends in a group in a header": (
        lambda: chord([add.s(1, 1), chain(add.s(1, 1), group(add.s(n) for n in range(5)))], accumulate.s()),
        [2, [2, 3, 4, 5, 6]],
    ),
    "chains in a header": (lambda: chord([chain(add.s(n, n), add.s(1)) for n in range(3)], total.s()), 9),
    "chords in a header": (lambda: chord([chord(doubles(3), total.s()) for _ in range(3)], total.s()), 18),
    "group in a header": (lambda: chord([group(doubles(2)), add.s(3, 3)], total.s()), 8),
    "group as body": (lambda: chord(doubles(2), group(total.s(), accumulate.s())), [2, [0, 2]]),
    "chain as body": (lambda: chord(doubles(2), chain(total.s(), add.s(10))), 12),
    "replaced by a group": (lambda: replaced_by_group.s(10), [10, 11, 12]),
    "parts replaced by groups": (
        lambda: chord([replaced_by_group.s(1), replaced_by_group.s(2)], accumulate.s()),
        [[1, 2, 3], [2, 3, 4]],
    ),
    "part replaced by a chain": (
        lambda: chord([hand_over.si(chain(add.s(1, 1), add.s(1))), add.s(1, 1)], total.s()),
        5,
    ),
    "part replaced by a chord": (
        lambda: chord([hand_over.si(chord(doubles(3), total.s())), add.s(1, 1)], total.s()),
        8,
    ),
    "part replaced twice": (
        lambda: chord([hand_over.si(hand_over.si(group(doubles(2)))), add.s(1, 1)], accumulate.s()),
        [[0, 2], 2],
    ),
    "body replaced by a chain": (lambda: chord(doubles(2), hand_over.si(chain(add.s(1, 1), add.s(1)))), 3),
    "body replaced by a group": (lambda: chord(doubles(2), hand_over.si(group(doubles(3)))), [0, 2, 4]),
    "body replaced by a chord": (lambda: chord(doubles(2), hand_over.si(chord(doubles(3), total.s()))), 6),
    "replaced in a chain": (lambda: chain(add.s(1, 1), hand_over.si(chord(doubles(3), total.s())), add.s(1)), 7),
    "parts that retry": (lambda: chord([after_retries.s(2, 5), after_retries.s(1, 6), add.s(1, 1)], total.s()), 13),
    "body that retries": (lambda: chord(doubles(2), after_retries.si(2, 5)), 5),
    "parts that add parts": (lambda: chord([add_parts.s(3), add.s(1, 1), add_parts.s(2)], total.s()), 210),
    "nested groups": (lambda: group(group(doubles(2)), group(group(doubles(3)), add.s(3, 3))), [0, 2, 0, 2, 4, 6]),
    "chord of a group in a group": (lambda: chord(group(group(doubles(2)), group(doubles(3))), total.s()), 8),
    "group after a chord": (lambda: chain(chord(doubles(3), total.s()), group(add.s(1), add.s(2))), [7, 8]),
    "megabytes": (
        lambda: chord([big_payload.s("", 2**20) for _ in range(3)], chain(accumulate.s(), lengths.s())),
        [2**20] * 3,
    ),
    "map": (lambda: total.map([[1, 2], [3]]), [3, 3]),
    "starmap": (lambda: add.starmap([(1, 2), (3, 4)]), [3, 7]),
    "chunks": (lambda: add.chunks([(n, n) for n in range(5)], 2).group(), [[0, 2], [4, 6], [8]]),
    "three deep": (lambda: chord([chord([chord(doubles(2), total.s()), add.s(1, 1)], total.s())], total.s()), 4),
}


#: Celery 5.5 gives the members of a group from a generator the place of the part that they replace, and so no order.
HAVE_NO_ORDER = {"parts replaced by groups"} if celery.VERSION < (5, 6) else set()


def in_order(shape: str, value: Any) -> Any:
    return [sorted(one) for one in value] if shape in HAVE_NO_ORDER else value


#: Eager mode knows no chord that a task could add to.
EAGER_HAS_NONE = {"parts that add parts"}


@pytest.mark.parametrize("shape", SHAPES)
def test_value(app: Celery, jobs: Jobs, shape: str) -> None:
    make, value = SHAPES[shape]
    assert in_order(shape, make().apply_async().get(timeout=60)) == value
    assert not [job.task for job in jobs.storage.all() if job.task == "celery.chord_unlock"]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in EAGER_HAS_NONE])
def test_value_in_eager_mode(app: Celery, shape: str) -> None:
    make, value = SHAPES[shape]
    app.conf.task_always_eager = True
    assert make().apply_async().get() == value


@pytest.mark.parametrize("shape", ["chain", "group", "chord", "chord in a chain", "group as body"])
def test_value_of_a_canvas_that_a_task_sends(app: Celery, jobs: Jobs, shape: str) -> None:
    make, value = SHAPES[shape]
    sender = send.delay(make())
    sent = result_from_tuple(sender.get(timeout=60), app)
    assert sent.get(timeout=60) == value
    # What a task sends has the root of the task, whatever its shape.
    members = [job for job in jobs.storage.workflow(sender.id) if job.id != sender.id]
    assert len(members) >= len(make().tasks)
    assert {job.root_id for job in members} == {sender.id}


def test_what_a_task_sends_is_sent_in_few_steps_and_is_its_child(app: Celery, jobs: Jobs) -> None:
    result = apps.send_many.delay(5)
    assert result.get(timeout=60) >= 4  # the first one of a process connects, in Celery's way
    sent = [job for job in jobs.storage.workflow(result.id) if job.id != result.id]
    assert [job.parent_id for job in sent] == [result.id] * 5
    assert [child.id for child in result.children] == [job.id for job in sent]


def ready(result: AsyncResult) -> AsyncResult:
    """Wait without what `get` does: it raises what a parent has raised, before the chord's own end."""
    wait_until(lambda: result.state in ("SUCCESS", "FAILURE"), 60, "the end of the canvas")
    return result


FAILING: dict[str, Callable[[], Any]] = {
    "a part": lambda: chord([add.s(1, 1), fail.s("broken")], total.s()),
    "a part of a part": lambda: chord([chord([fail.s("broken"), add.s(1, 1)], total.s()), add.s(1, 1)], total.s()),
    "a part before a chain": lambda: chord(
        [chord([fail.s("broken"), add.s(1, 1)], chain(total.s(), add.s(1))), add.s(1, 1)], total.s()
    ),
    "a link of a part": lambda: chord([chain(add.s(1, 1), fail.si("broken"), add.s(1)), add.s(1, 1)], total.s()),
    "before a chain as a body": lambda: chain(
        group(add.s(1, 1), fail.s("broken")), chord([add.s(1)], chain(total.s(), add.s(1)))
    ),
    "before a group that ends a part": lambda: chord(
        [chain(add.s(1, 1), fail.si("broken"), group(add.s(1), add.s(1))), add.s(1, 1)], accumulate.s()
    ),
    "before the chain's end": lambda: chain(group(add.s(1, 1), fail.s("broken")), total.s(), add.s(1)),
}


@pytest.mark.parametrize("what", FAILING)
def test_failure(app: Celery, what: str) -> None:
    result = ready(FAILING[what]().apply_async())
    assert result.state == "FAILURE"
    assert isinstance(result.result, ChordError)
    assert "ValueError('broken')" in str(result.result)


#: What was to follow a task that fails, and is not a link of the chain itself.
NEVER_SENT: dict[str, Callable[[], Any]] = {
    "group": lambda: chain(add.s(1, 1), fail.si("broken"), group(add.s(1), add.s(1))),
    "nested groups": lambda: chain(fail.si("broken"), group(group(add.s(1), chain(add.s(1), add.s(1))), add.s(1))),
    "group of a chord": lambda: chain(fail.si("broken"), group(add.s(1), chord([add.s(1)], total.s()))),
    "group as a body": lambda: chain(fail.si("broken"), chord([add.s(1)], group(total.s(), accumulate.s()))),
    "group after a chord": lambda: chain(group(add.s(1, 1), fail.si("broken")), total.s(), group(add.s(1), add.s(1))),
}


@pytest.mark.parametrize("what", NEVER_SENT)
def test_a_group_that_is_never_sent_fails(app: Celery, what: str) -> None:
    result = NEVER_SENT[what]().apply_async()
    wait_until(result.ready, 60, "the end of each member")
    states = {one.state for one in leaves(result)}
    assert states == {"FAILURE"}
    with pytest.raises((ValueError, ChordError), match="broken"):
        result.get(timeout=60)


def leaves(result: Any) -> list[AsyncResult]:
    return [leaf for one in result.results for leaf in leaves(one)] if isinstance(result, GroupResult) else [result]


def test_get_raises_what_a_part_has_raised(app: Celery) -> None:
    with pytest.raises(ValueError, match="broken"):
        chord([add.s(1, 1), fail.s("broken")], total.s()).apply_async().get(timeout=60)


@pytest.mark.parametrize("pool", ["threads"], indirect=True, scope="module")
def test_the_parts_are_looked_at_all_together(app: Celery, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    parts = [apps.wait_for_file.s(str(gate)), *doubles(50)]
    result = chord(parts, accumulate.s()).apply_async()
    heard_at: list[float] = []

    def hear(*_: Any) -> None:
        heard_at.append(monotonic())
        if len(heard_at) == len(parts) + 100:  # Celery begins with one for each part
            gate.touch()

    with heard(hear):
        assert result.get(timeout=60, interval=0.05)[0] == "done"
    # From then on there is about one in each interval, besides those that follow the end of a part: a hundred take
    # seconds, however slow all else is, and not the time of two intervals.
    assert heard_at[len(parts) + 99] - heard_at[len(parts)] > 1.0


def test_what_follows_is_published_with_the_result(app: Celery, jobs: Jobs, journal: Journal) -> None:
    first = apps.append.apply_async((journal.path, "first"), link=apps.append.si(journal.path, "second"))
    job = jobs.wait(first, State.COMPLETED)
    assert [one.task for one in jobs.storage.all() if one.parent_id == job.id] == [apps.append.name]
    assert journal.wait(2) == ["first", "second"]


@pytest.mark.parametrize("pool", ["prefork"], indirect=True, scope="module")  # a thread that is killed kills the worker
def test_a_part_whose_process_is_lost_fails_its_chord(app: Celery, journal: Journal) -> None:
    lost = apps.kill_own_process_early.s(journal.path, "once")
    result = ready(chord([add.s(1, 1), lost], total.s()).apply_async())
    assert isinstance(result.result, ChordError)
    assert "WorkerLostError" in str(result.result)


def members(result: AsyncResult) -> list[dict[str, Any]]:
    """What the tasks of a canvas of `lineage` say, in the order of their ends."""
    value = result.get(timeout=60)
    return value if isinstance(value[0], dict) else [one for each in value for one in each]


def test_a_chain_has_one_root(app: Celery, jobs: Jobs) -> None:
    result = chain(lineage.s(), lineage.s(), lineage.s()).apply_async()
    first, second, third = members(result)
    assert (first["root_id"], first["parent_id"], first["group"]) == (first["id"], None, None)
    assert (second["root_id"], second["parent_id"]) == (first["id"], first["id"])
    assert (third["root_id"], third["parent_id"], third["id"]) == (first["id"], second["id"], result.id)
    assert [job.id for job in jobs.storage.workflow(third["id"])] == [first["id"], second["id"], third["id"]]


def test_a_group_has_an_id_and_its_members_a_place_in_it(app: Celery, jobs: Jobs) -> None:
    result = group(lineage.s(), chain(lineage.s(), lineage.s())).apply_async()
    alone, first, last = members(result)
    assert (alone["group"], alone["group_index"]) == (last["group"], last["group_index"] - 1) == (result.id, 0)
    assert (first["group"], last["root_id"]) == (None, first["id"])
    assert {job.id for job in jobs.storage.workflow(result.id)} == {alone["id"], first["id"], last["id"]}


def test_a_chord_is_a_group_and_what_follows_it(app: Celery, jobs: Jobs) -> None:
    result = chord([lineage.s(), lineage.s(), hand_over.si(lineage.s())], lineage.s()).apply_async()
    *parts, body = members(result)
    chord_id = result.parent.id
    assert [(one["group"], one["group_index"]) for one in parts] == [(chord_id, 0), (chord_id, 1), (chord_id, 2)]
    assert [one["id"] for one in parts] == [one.id for one in result.parent.results]
    assert (body["id"], body["group"], body["parent_id"] in [one["id"] for one in parts]) == (result.id, chord_id, True)
    assert {job.id for job in jobs.storage.workflow(chord_id)} == {one["id"] for one in [*parts, body]}


class Batch(StampingVisitor):
    """Stamps each task with the batch that it belongs to."""

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"batch": "b1", "note": "no stamp", "stamped_headers": ["batch"]}


STAMPED: dict[str, Callable[[], Any]] = {
    "task": lambda: lineage.s(),
    "chain": lambda: chain(lineage.s(), lineage.s(), lineage.s()),
    "group": lambda: group(lineage.s(), chain(lineage.s(), lineage.s())),
    "chord": lambda: chord([lineage.s(), lineage.s()], chain(lineage.s(), lineage.s())),
    "chain with a chord": lambda: chain(lineage.s(), group(lineage.s(), lineage.s()), lineage.s()),
}


@pytest.mark.parametrize("shape", STAMPED)
def test_stamps_reach_every_task(app: Celery, shape: str) -> None:
    canvas = STAMPED[shape]()
    canvas.stamp(Batch(), stamped_headers=["by"], by="me")
    found = [(one["stamps"], one["stamped_headers"]) for one in members(canvas.apply_async())]
    assert found
    assert all(one == ({"batch": "b1", "by": "me"}, ["batch", "by"]) for one in found)


def test_what_replaces_a_task_may_be_stamped(app: Celery) -> None:
    found = members(chain(apps.stamp_what_replaces.si(chain(lineage.s(), lineage.s())), lineage.s()).apply_async())
    assert [one["stamps"] for one in found] == [{"replaced": "yes"}] * 3


def test_a_part_is_revoked_by_its_stamp(app: Celery, worker: WorkerProcess) -> None:
    app.control.revoke_by_stamped_headers({"batch": "revoked"}, reply=True, timeout=60, limit=1)
    part = add.s(1, 1)
    part.stamp(batch="revoked")
    result = ready(chord([part, add.s(1, 1)], total.s()).apply_async())
    assert isinstance(result.result, ChordError)
    assert "TaskRevokedError" in str(result.result)


def test_parts_that_fail_before_the_size_of_their_chord_is_known(
    app: Celery, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_size = KathikonBackend.set_chord_size
    has_failed = Filter(states={State.DEAD}, task=fail.name, error="*too early*")

    def set_late(*args: Any, **options: Any) -> None:
        wait_until(lambda: jobs.storage.count(has_failed), what="the failure")
        set_size(*args, **options)

    monkeypatch.setattr(KathikonBackend, "set_chord_size", set_late)
    part = chain(add.s(1, 1), fail.si("too early"), group(add.s(1), add.s(1)))
    result = chord([part, add.s(1, 1)], accumulate.s()).apply_async()
    assert "too early" in str(ready(result).result)


def test_a_part_that_waits_for_a_slot_is_revoked(app: Celery, jobs: Jobs, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    result = chord([*[apps.wait_for_file.s(str(gate))] * 2, add.s(1, 1)], accumulate.s()).apply_async()
    *running, waiting = result.parent.results
    for one in running:
        jobs.wait(one, State.RUNNING)
    waiting.revoke()
    jobs.wait(waiting, State.CANCELLED)  # before a slot is free
    gate.touch()
    assert "TaskRevokedError" in str(ready(result).result)
    assert [one.state for one in result.parent.results] == ["SUCCESS", "SUCCESS", "REVOKED"]


def with_errback(canvas: Any, journal: Journal) -> Any:
    canvas.link_error(apps.append.si(journal.path, "errback"))
    return canvas


#: How often an errback is called: on the chord, and on each part where the setting says so. As with Redis.
ERRBACKS: dict[str, tuple[Callable[[], Any], int]] = {
    "chord": (lambda: chord([add.s(1, 1), fail.s("broken")], total.s()), 1),
    "chord with a broken body": (lambda: chord([add.s(1, 1)], fail.si("broken")), 1),
    "chord with a group as body": (lambda: chord([add.s(1, 1), fail.s("broken")], group(total.s(), total.s())), 2),
    "chord with a chain as body": (lambda: chord([add.s(1, 1), fail.s("broken")], chain(total.s(), add.s(1))), 1),
    "chord in a header": (lambda: chord([add.s(1, 1), chord([fail.s("broken")], total.s())], total.s()), 1),
    "chord in a chord in a header": (
        lambda: chord([chord([chord([fail.s("broken")], total.s())], total.s()), add.s(1, 1)], total.s()),
        1,
    ),
    # Celery links the errback to both bodies, and both fail.
    "chord with a broken body in a header": (lambda: chord([chord([add.s(1, 1)], fail.si("broken"))], total.s()), 2),
    "chain": (lambda: chain(add.s(1, 1), fail.si("broken"), add.s(1)), 1),
    "chain with a chord": (lambda: chain(add.s(1, 1), group(add.s(1), fail.si("broken")), total.s(), add.s(1)), 1),
    "group": (lambda: group(add.s(1, 1), fail.si("broken"), fail.si("broken")), 2),
    "replaced": (lambda: hand_over.si(chord([fail.s("broken")], total.s())), 1),
}


@pytest.mark.parametrize("shape", ERRBACKS)
def test_errbacks_of_a_canvas(app: Celery, jobs: Jobs, journal: Journal, shape: str) -> None:
    make, times = ERRBACKS[shape]
    result = with_errback(make(), journal).apply_async()
    assert journal.wait(times) == ["errback"] * times
    for one in result.results if isinstance(result, GroupResult) else [result]:
        ready(one)
    assert_no_more(jobs, journal, times)


def assert_no_more(jobs: Jobs, journal: Journal, times: int) -> None:
    """Nothing is under way, and the journal has so many lines."""
    wait_until(lambda: all(job.state in TERMINAL for job in jobs.storage.all()), 60, "the end of all jobs")
    assert len(journal.lines) == times


@pytest.mark.parametrize("on_header", [True, False])
def test_errbacks_of_a_header(app: Celery, jobs: Jobs, journal: Journal, on_header: bool) -> None:
    app.conf.task_allow_error_cb_on_chord_header = on_header
    canvas = chord([add.s(1, 1), fail.s("broken")], total.s())
    canvas.link_error(apps.note.s(journal.path, "failed"))
    result = canvas.apply_async()
    failed = [result.id, result.parent.results[1].id] if on_header else [result.id]
    lines = journal.wait(len(failed))
    assert sorted(lines) == sorted(json.dumps(["failed", task_id]) for task_id in failed)
    assert_no_more(jobs, journal, len(failed))


LINKED: dict[str, Callable[[], Any]] = {
    "chord": lambda: chord(doubles(3), total.s()),
    "chord with a group as body": lambda: chord(doubles(3), group(total.s(), accumulate.s())),
    "chord with a chain as body": lambda: chord(doubles(3), chain(total.s(), add.s(1))),
    "chain": lambda: chain(add.s(1, 1), add.s(1)),
    "group": lambda: group(add.s(1, 1), add.s(2, 2)),
    "replaced": lambda: hand_over.si(chord(doubles(3), total.s())),
}


@pytest.mark.parametrize("shape", LINKED)
def test_callbacks_of_a_canvas(app: Celery, jobs: Jobs, journal: Journal, shape: str) -> None:
    canvas = LINKED[shape]()
    canvas.link(apps.append.si(journal.path, "linked"))
    canvas.apply_async()
    assert journal.wait(1) == ["linked"]
    assert_no_more(jobs, journal, 1)


def test_an_exception_with_arguments_fails_a_chord_with_its_words(app: Celery, jobs: Jobs) -> None:
    result = chord([add.s(1, 1), print_page.s()], total.s()).apply_async()
    failed = ready(result)
    assert isinstance(failed.result, ChordError)
    assert str(failed.result) == f"Dependency {result.parent.results[1].id} raised OutOfPaper(2, [1, 2])"
    assert jobs.of(result).reason == f"ChordError({str(failed.result)!r})"
    error = result.parent.results[1].result
    assert isinstance(error, apps.OutOfPaper)
    assert error.args == (2, [1, 2])


@pytest.mark.usefixtures("worker")
def test_nothing_is_left_over(app: Celery, jobs: Jobs) -> None:
    for shape, (make, value) in SHAPES.items():
        assert in_order(shape, make().apply_async().get(timeout=60)) == value
    with jobs.storage.database.read() as connection:
        failed = select(chords.c.id).where(chords.c.failed)  # of other tests: their parts may be retried
        left = select(func.count()).select_from(chord_parts).where(chord_parts.c.chord.not_in(failed))
        assert connection.execute(left).scalar() == 0
