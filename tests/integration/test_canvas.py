"""Every shape of canvas, run by real workers: its value, and nothing that is left over in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError
from celery.result import AsyncResult

from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Journal, Workers
from tests.support import apps
from tests.support.apps import accumulate, add, fail, quiet, replaced_by_group, total
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

pytestmark = pytest.mark.usefixtures("worker")


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
    "starmap": (lambda: add.starmap([(1, 2), (3, 4)]), [3, 7]),
    "chunks": (lambda: add.chunks([(n, n) for n in range(5)], 2).group(), [[0, 2], [4, 6], [8]]),
    "three deep": (lambda: chord([chord([chord(doubles(2), total.s()), add.s(1, 1)], total.s())], total.s()), 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_value(app: Celery, jobs: Jobs, shape: str) -> None:
    make, value = SHAPES[shape]
    assert make().apply_async().get(timeout=30) == value
    assert not [job.task for job in jobs.storage.all() if job.task == "celery.chord_unlock"]


def ready(result: AsyncResult) -> AsyncResult:
    """Wait without what `get` does: it raises what a parent has raised, before the chord's own end."""
    wait_until(lambda: result.state in ("SUCCESS", "FAILURE"), 30, "the end of the canvas")
    return result


FAILING: dict[str, Callable[[], Any]] = {
    "a part": lambda: chord([add.s(1, 1), fail.s("broken")], total.s()),
    "a part of a part": lambda: chord([chord([fail.s("broken"), add.s(1, 1)], total.s()), add.s(1, 1)], total.s()),
    "a part before a chain": lambda: chord(
        [chord([fail.s("broken"), add.s(1, 1)], chain(total.s(), add.s(1))), add.s(1, 1)], total.s()
    ),
    "a link of a part": lambda: chord([chain(add.s(1, 1), fail.si("broken"), add.s(1)), add.s(1, 1)], total.s()),
    "before the chain's end": lambda: chain(group(add.s(1, 1), fail.s("broken")), total.s(), add.s(1)),
}


@pytest.mark.parametrize("what", FAILING)
def test_failure(app: Celery, what: str) -> None:
    result = ready(FAILING[what]().apply_async())
    assert result.state == "FAILURE"
    assert isinstance(result.result, ChordError)
    assert "ValueError('broken')" in str(result.result)


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
