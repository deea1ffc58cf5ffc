"""What Celery's result backends offer, each of it with a real worker: as it is with Redis, or better."""

from __future__ import annotations

import json
import pickle
from base64 import b64decode
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import celery
import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ImproperlyConfigured, IncompleteStream, TaskRevokedError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult, GroupResult, ResultSet, result_from_tuple
from celery.utils import uuid
from kombu.exceptions import ContentDisallowed

from kathikon_celery.job import State
from kathikon_celery.results.backend import BINARY
from kathikon_celery.storage import Storage
from tests.integration.conftest import Jobs, Journal, Workers, client_of, on_one_database
from tests.support import apps, outcomes
from tests.support.apps import add, fail
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

EXTENDED = {"result_extended": True}


@pytest.fixture(scope="module")
def worker(shared_workers: Workers) -> WorkerProcess:
    (shared_workers.directory / "only_here.py").write_text("class OnlyHereError(Exception):\n    pass\n")
    return shared_workers(app="tests.support.outcomes", conf=EXTENDED, concurrency=3)


@pytest.fixture
def app(shared_database_url: str, worker: WorkerProcess) -> Iterator[Celery]:
    with client_of(shared_database_url, **EXTENDED) as app:
        yield app


def again(result: AsyncResult) -> AsyncResult:
    """The same as another process would have it, which knows no more than the id."""
    return result.app.AsyncResult(result.id)


def exists(result: AsyncResult) -> bool:
    """``result.exists()``, which Celery has since 5.7."""
    answer: bool = result.backend.task_result_exists(result.id)
    assert celery.VERSION < (5, 7) or result.exists() is answer
    return answer


def wait_for_state(result: AsyncResult, *states: str) -> AsyncResult:
    wait_until(lambda: result.state in states, 60, f"{' or '.join(states)} of {result.id}")
    return result


class TestWhatIsKnown:
    def test_of_a_success(self, app: Celery, worker: WorkerProcess) -> None:
        before = datetime.now(timezone.utc)
        sent = add.apply_async((1,), {"y": 2})
        assert sent.get(timeout=60) == 3
        for result in (sent, again(sent)):
            assert (result.state, result.status, result.result, result.info) == ("SUCCESS", "SUCCESS", 3, 3)
            assert (result.ready(), result.successful(), result.failed(), exists(result)) == (True, True, False, True)
            assert (result.traceback, result.children) == (None, [])
            assert abs(result.date_done - before) < timedelta(minutes=1)
            assert (result.name, result.args, result.kwargs) == (add.name, [1], {"y": 2})
            assert (result.worker, result.retries, result.queue) == (worker.hostname, 0, "default")

    def test_under_a_uuid_as_its_id(self, app: Celery) -> None:
        first, second, third = uuid4(), uuid4(), uuid4()
        assert app.send_task(add.name, (1, 2), task_id=first).get(timeout=60) == 3
        result = app.AsyncResult(first)
        assert (result.get(timeout=60), result.status, exists(result)) == (3, "SUCCESS", True)
        result.forget()
        assert not exists(app.AsyncResult(str(first)))
        assert chain(add.si(1, 1), add.s(2)).apply_async(task_id=second, countdown=0.1).get(timeout=60) == 4
        assert app.AsyncResult(str(second)).get(timeout=60) == 4
        assert group(add.s(1, 1).set(task_id=third), add.s(2, 2)).apply_async().get(timeout=60) == [2, 4]
        assert app.AsyncResult(third).get(timeout=60) == 2
        assert group(add.s(1, 1), add.s(2, 2)).apply_async(task_id=uuid4()).get(timeout=60) == [2, 4]
        with pytest.raises(TypeError, match="5 is no name: give a text or a UUID"):
            app.AsyncResult(5).get(timeout=60)

    def test_of_a_failure(self, app: Celery) -> None:
        result = fail.delay("broken")
        with pytest.raises(ValueError, match="broken"):
            result.get(timeout=60)
        assert repr(result.get(propagate=False)) == "ValueError('broken')"
        result = again(result)
        assert (result.state, repr(result.info)) == ("FAILURE", "ValueError('broken')")
        assert "tests/support/apps.py" in result.traceback
        assert result.name == fail.name
        assert result.failed()

    def test_of_a_retry_without_an_error(self, app: Celery, jobs: Jobs) -> None:
        result = apps.after_retries.delay(1, "done")
        assert result.get(timeout=60) == "done"
        # It is noted by the run that was retried, which may end after the next one.
        (error,) = wait_until(lambda: jobs.of(result).errors)
        assert error["reason"] == "Retry"

    def test_of_a_retry(self, app: Celery, tmp_path: Path) -> None:
        result = wait_for_state(outcomes.retry_once_there_is.delay(str(tmp_path / "file")), "RETRY")
        wait_until(lambda: result.traceback, 60)  # it is noted once the retry is sent
        assert repr(result.info) == "KeyError('not yet')"
        assert "not yet" in result.traceback
        assert (result.retries, result.args, result.date_done) == (0, [str(tmp_path / "file")], None)
        result.revoke()
        assert isinstance(wait_for_state(result, "REVOKED").result, TaskRevokedError)

    def test_of_none(self, app: Celery) -> None:
        result = outcomes.return_value.delay(None)
        assert result.get(timeout=60) is None
        assert again(result).successful()

    def test_queued_is_told_apart_from_unknown(self, app: Celery) -> None:
        queued, unknown = add.apply_async((1, 1), countdown=3600), app.AsyncResult("nobody sent it")
        for result in (queued, unknown):
            assert (result.state, result.info, result.date_done, result.ready()) == ("PENDING", None, None, False)
        assert (exists(queued), exists(unknown)) == (True, False)
        queued.revoke()
        wait_for_state(queued, "REVOKED")

    def test_a_backend_by_its_own_url_says_no_less(self, app: Celery) -> None:
        result = add.delay(1, 1)
        result.get(timeout=60)
        same = pickle.loads(pickle.dumps(result))
        assert (same.id, same.state, same.result) == (result.id, "SUCCESS", 2)


class TestStatesOfOnesOwn:
    def test_progress(self, app: Celery, tmp_path: Path) -> None:
        result = wait_for_state(outcomes.say_and_wait.delay(str(tmp_path / "file"), "PROGRESS"), "PROGRESS")
        assert (result.info, result.ready(), result.name) == ({"done": 1}, False, outcomes.say_and_wait.name)
        (tmp_path / "file").touch()
        assert result.get(timeout=60) == "done"

    def test_started(self, app: Celery, jobs: Jobs, tmp_path: Path) -> None:
        tracked = wait_for_state(outcomes.tracked.delay(str(tmp_path / "file")), "STARTED")
        assert tracked.info.keys() == {"pid", "hostname"}
        untracked = apps.wait_for_file.delay(str(tmp_path / "file"))
        jobs.wait(untracked, State.RUNNING)
        assert (untracked.state, untracked.info) == ("PENDING", None)
        (tmp_path / "file").touch()
        assert [one.get(timeout=60) for one in (tracked, untracked)] == ["done", "done"]

    def test_aborted_before_it_runs(self, app: Celery) -> None:
        result = outcomes.abortable.apply_async(countdown=3)
        result.abort()
        assert result.state == "ABORTED"
        assert result.get(timeout=60) == "aborted"

    @pytest.mark.parametrize("word", ["SUCCESS", "FAILURE", "REVOKED"])
    def test_a_word_for_the_end_is_no_end(self, app: Celery, jobs: Jobs, journal: Journal, word: str) -> None:
        linked = apps.append.si(journal.path, "linked")
        result = outcomes.say.apply_async((word,), link=linked)
        assert journal.wait(1) == ["linked"]
        assert jobs.wait(result, State.COMPLETED).status == "SUCCESS"
        assert again(result).result == "returned"

    @pytest.mark.parametrize("word", ["SUCCESS", "FAILURE"])
    def test_nor_before_a_failure(self, app: Celery, jobs: Jobs, journal: Journal, word: str) -> None:
        errback = apps.append.si(journal.path, "errback")
        result = outcomes.say.apply_async((word, "raise"), link_error=errback)
        assert journal.wait(1) == ["errback"]
        assert jobs.wait(result, State.DEAD).status == "FAILURE"
        assert repr(again(result).result) == "ValueError('raised')"

    @pytest.mark.parametrize("word", ["FAILURE", "HALF-DONE"])
    def test_a_word_before_ignore_stays(self, app: Celery, jobs: Jobs, word: str) -> None:
        result = outcomes.say.delay(word, "ignore")
        jobs.wait(result, State.COMPLETED)
        assert result.state == word
        if word == "FAILURE":
            with pytest.raises(KeyError, match="said"):
                result.get(timeout=60)

    def test_of_another_task(self, app: Celery, jobs: Jobs) -> None:
        done, queued = add.delay(1, 1), add.apply_async((1, 1), countdown=3600)
        assert done.get(timeout=60) == 2
        for task_id in (done.id, queued.id, "of nobody"):
            outcomes.say_of_another.delay(task_id, "SENT", {"by": "me"}).get(timeout=60)
        assert (again(done).state, again(done).result) == ("SUCCESS", 2)
        for result in (queued, app.AsyncResult("of nobody")):
            assert (result.state, result.info, exists(result)) == ("SENT", {"by": "me"}, True)
        app.AsyncResult("of nobody").forget()
        jobs.storage.delete(queued.id)


class TestGet:
    def test_all_that_it_takes(self, app: Celery, tmp_path: Path) -> None:
        path, calls = tmp_path / "file", []
        result = outcomes.say_and_wait.delay(str(path), "PROGRESS")
        with pytest.raises(ResultTimeout):
            result.get(timeout=0.01)

        def on_interval() -> None:
            calls.append("interval")
            path.touch()

        def on_message(meta: dict[str, Any]) -> None:
            calls.append(meta["status"])

        def callback(task_id: str, value: Any) -> None:
            assert task_id == result.id
            calls.append(value)

        options = {"interval": 0.01, "on_interval": on_interval, "on_message": on_message, "callback": callback}
        assert result.get(timeout=60, no_ack=False, follow_parents=False, **options) == "done"
        assert calls[-2:] == ["SUCCESS", "done"]
        assert "interval" in calls
        assert result.get(callback=callback) == result.wait() == "done"
        assert calls[-1] == "done"

    def test_an_ignored_result_is_not_waited_for(self, app: Celery, jobs: Jobs) -> None:
        for result in (apps.quiet.delay(1), add.apply_async((1, 1), ignore_result=True)):
            assert result.get() is None
            assert jobs.wait(result, State.COMPLETED).result is None
            assert (again(result).state, again(result).get(timeout=60)) == ("SUCCESS", None)

    @pytest.mark.parametrize("allow", ["argument", "block"])
    def test_within_a_task(self, app: Celery, allow: str) -> None:
        assert outcomes.join_within.delay(allow).get(timeout=60) == 2

    def test_within_a_task_it_is_an_error_by_default(self, app: Celery) -> None:
        with pytest.raises(RuntimeError, match="Never call"):
            outcomes.join_within.delay("no").get(timeout=60)

    def test_then(self, app: Celery) -> None:
        called: list[Any] = []
        result = add.delay(1, 1)
        result.then(lambda ready: called.append(ready.result), on_error=called.append)
        result.get(timeout=60)
        assert called == [2]


class TestErrors:
    def test_that_cannot_be_pickled(self, app: Celery) -> None:
        for task, text in ((outcomes.raise_two_words, "one two"), (outcomes.raise_locked, "locked")):
            error = task.delay().get(timeout=60, propagate=False)
            assert isinstance(error, Exception)
            assert text in str(error)

    def test_that_cannot_be_imported(self, app: Celery) -> None:
        error = outcomes.raise_only_here.delay().get(timeout=60, propagate=False)
        assert (type(error).__name__, str(error)) == ("OnlyHereError", "from afar")
        error = outcomes.raise_local.delay().get(timeout=60, propagate=False)
        assert "LocalError('from within')" in str(error)

    def test_a_value_that_cannot_be_stored(self, app: Celery, jobs: Jobs) -> None:
        result = outcomes.return_nothing_storable.delay()
        error = result.get(timeout=60, propagate=False)
        assert type(error).__name__ == "EncodeError"
        assert jobs.wait(result, State.DEAD)

    def test_of_ignored_results(self, app: Celery, jobs: Jobs) -> None:
        result = outcomes.fail_quietly.delay()
        assert jobs.wait(result, State.DEAD)
        assert repr(wait_for_state(again(result), "FAILURE").result) == "ValueError('nobody asked')"
        result = outcomes.fail_unheard.delay()  # whatever the result backend keeps, the row has its reason
        assert jobs.wait(result, State.DEAD).reason == "ValueError('nobody may ask')"
        assert jobs.of(result).result is None

    def test_an_errback_that_takes_the_error_reads_it(self, app: Celery, journal: Journal) -> None:
        errback = outcomes.note_failure.s(path=journal.path)
        result = outcomes.say.apply_async(("PROGRESS", "raise"), link_error=errback)
        assert journal.wait(1) == [f"FAILURE {again(result).result!r}"]


class TestForgetting:
    def test_a_result_and_its_parents(self, app: Celery, jobs: Jobs) -> None:
        result = chain(add.s(1, 1), add.s(2)).apply_async()
        assert result.get(timeout=60) == 4
        result.forget()
        for one in (again(result), again(result.parent)):
            assert (one.state, one.result, exists(one)) == ("PENDING", None, False)
            assert jobs.of(one).state is State.COMPLETED

    def test_a_failure_is_not_told_twice(self, app: Celery, jobs: Jobs, journal: Journal) -> None:
        result = fail.apply_async(link_error=apps.append.si(journal.path, "errback"))
        journal.wait(1)
        jobs.wait(result, State.DEAD)  # such an errback is called before the end is committed
        result.forget()
        later = add.apply_async((1, 1), expires=-1)  # what the lifeline tells of, after all that is older
        assert isinstance(later.get(timeout=60, propagate=False), TaskRevokedError)
        assert journal.lines == ["errback"]
        assert (again(result).state, jobs.of(result).state) == ("PENDING", State.DEAD)

    def test_a_set(self, app: Celery) -> None:
        results = ResultSet([add.delay(1, 1), add.delay(2, 2)])
        assert results.get(timeout=60) == [2, 4]
        results.forget()
        assert [again(one).state for one in results] == ["PENDING", "PENDING"]


class TestSets:
    def test_a_group_is_saved_and_restored(self, app: Celery) -> None:
        sent = group(add.s(1, 1), fail.s("broken")).apply_async()
        assert sent.save() is sent
        restored = app.GroupResult.restore(sent.id)
        assert restored == sent
        assert repr(restored.join_native(timeout=60, propagate=False)) == repr([2, ValueError("broken")])
        assert repr(restored.join(timeout=60, propagate=False)) == repr([2, ValueError("broken")])
        assert (restored.ready(), restored.waiting(), restored.completed_count()) == (True, False, 1)
        assert (restored.successful(), restored.failed()) == (False, True)
        with pytest.raises(ValueError, match="broken"):
            restored.get(timeout=60)
        with pytest.raises(ImproperlyConfigured):
            restored.join(timeout=60, on_message=print)
        sent.delete()
        assert GroupResult.restore(sent.id, app=app) is None

    def test_nested_groups_are_saved_with_their_parents(self, app: Celery) -> None:
        inner = group(add.si(1, 1), add.si(2, 2)).apply_async()
        outer = GroupResult("outer", [inner, add.delay(3, 3)], parent=add.delay(4, 4), app=app)
        outer.save()
        restored = app.GroupResult.restore("outer")
        assert restored == outer
        assert restored.parent.get(timeout=60) == 8
        assert restored.get(timeout=60) == [[2, 4], 6]
        outer.delete()

    def test_one_by_one(self, app: Celery) -> None:
        sent = group(add.s(number, 1) for number in range(5)).apply_async()
        found = {task_id: meta["result"] for task_id, meta in sent.iter_native(timeout=60)}
        assert found == {one.id: number + 1 for number, one in enumerate(sent)}
        values: list[Any] = []
        assert sent.join(timeout=60, callback=lambda task_id, value: values.append(value)) == []
        assert values == [1, 2, 3, 4, 5]

    def test_what_is_called_when_all_is_ready(self, app: Celery) -> None:
        called: list[Any] = []
        sent = group(add.s(1, 1), add.s(2, 2)).apply_async()
        sent.then(lambda ready: called.append([one.result for one in ready]))
        assert sent.get(timeout=60) == [2, 4]
        assert called == [[2, 4]]

    def test_it_can_be_changed(self, app: Celery) -> None:
        one, two, three = (add.delay(number, 1) for number in range(3))
        results = ResultSet([one])
        results.add(two)
        results.update([two, three])
        results.remove(one.id)
        results.discard(one)
        with pytest.raises(KeyError):
            results.remove(one)
        assert results.get(timeout=60) == [2, 3]
        results.clear()
        assert results.get(timeout=60) == []


class TestTrees:
    def test_what_a_task_has_sent(self, app: Celery) -> None:
        result = outcomes.spread.delay(3)
        result.get(timeout=60)
        wait_until(lambda: len(list(again(result).iterdeps(intermediate=True))) == 8 and _is_whole(again(result)), 60)
        result = again(result)
        collected = [(child, value) for child, value in result.collect(timeout=60)]
        assert [value for child, value in collected if not child.children] == [1, 2, 3]
        assert result.get_leaf() == 3
        assert len(result.graph) == 8
        assert isinstance(result.children[0], GroupResult)

    def test_that_is_not_whole(self, app: Celery, tmp_path: Path) -> None:
        result = apps.wait_for_file.delay(str(tmp_path / "file"))
        with pytest.raises(IncompleteStream):
            list(result.iterdeps())
        assert list(result.iterdeps(intermediate=True)) == [(None, result)]
        (tmp_path / "file").touch()
        result.get(timeout=60)

    def test_as_tuples(self, app: Celery) -> None:
        result = chain(add.s(1, 1), group(add.s(1), add.s(2)), apps.total.s()).apply_async()
        assert result.get(timeout=60) == 7
        same = result_from_tuple(json.loads(json.dumps(result.as_tuple())), app)
        assert (same, same.parent, same.parent.parent) == (result, result.parent, result.parent.parent)
        assert same.get(timeout=60) == 7
        assert [one.get(timeout=60) for one in same.parent] == [3, 4]
        assert same.parent.parent.get(timeout=60) == 2
        result = chain(add.s(1, 1), add.s(1)).apply_async()
        assert result_from_tuple(result.as_tuple(), app).as_list() == result.as_list() == [result.id, result.parent.id]


def _is_whole(result: AsyncResult) -> bool:
    return all(child.ready() for _, child in result.iterdeps(intermediate=True))


class TestRevoking:
    def test_what_waits(self, app: Celery, jobs: Jobs) -> None:
        result = add.apply_async((1, 1), countdown=3600)
        result.revoke()
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)
        assert jobs.of(result).state is State.CANCELLED

    def test_a_part_of_a_chord_that_waits(self, app: Celery, jobs: Jobs) -> None:
        part = add.si(1, 1).set(countdown=3600, task_id=uuid())
        result = chord([part, add.si(2, 2)], apps.total.s()).apply_async()
        app.AsyncResult(part.id).revoke()
        assert "TaskRevokedError" in str(wait_for_state(result, "FAILURE").result)
        revoked = wait_for_state(app.AsyncResult(part.id), "REVOKED")
        assert wait_until(lambda: again(revoked).args, 60) == [1, 1]

    def test_what_runs(self, app: Celery, jobs: Jobs, tmp_path: Path) -> None:
        result = apps.wait_for_file.delay(str(tmp_path / "file"))
        jobs.wait(result, State.RUNNING)
        result.revoke(terminate=True, signal="SIGKILL")
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)
        assert jobs.wait(result, State.CANCELLED)

    def test_a_group(self, app: Celery, jobs: Jobs, tmp_path: Path) -> None:
        running = apps.wait_for_file.delay(str(tmp_path / "file"))
        jobs.wait(running, State.RUNNING)
        waiting = group(add.si(1, 1), add.si(2, 2)).apply_async(countdown=3600)
        both = GroupResult("both", [running, *waiting])
        answers = both.revoke(terminate=True, wait=True, timeout=1)
        assert answers is None  # Celery drops them
        for error in both.get(timeout=60, propagate=False):
            assert isinstance(error, TaskRevokedError)


def test_20_megabytes(app: Celery) -> None:
    text = "ü" * 100
    sent = apps.big_payload.delay(text, 20_000_000)
    assert len(sent.get(timeout=120)) == 20_000_000
    assert again(sent).result == sent.result


VALUES: list[Any] = ["text", "base64,text", "", 0, 1.5, None, True, [1, [2]], {"a": {"b": [None]}}, "\N{SNAKE}\0"]

SERIALIZERS: dict[str, dict[str, Any]] = {
    "json": {},
    "json-gzip": {"result_compression": "gzip"},
    "pickle": {"result_accept_content": ["pickle"]},
    "pickle-bzip2": {"result_compression": "bzip2", "result_accept_content": ["pickle"]},
    "yaml": {"accept_content": ["json", "yaml"]},
    "msgpack": {"accept_content": ["json", "application/x-msgpack"]},
    "msgpack-zlib": {"result_compression": "zlib", "accept_content": ["json", "msgpack"]},
}
if celery.VERSION < (5, 7):  # which brought the setting
    SERIALIZERS = {name: conf for name, conf in SERIALIZERS.items() if "result_compression" not in conf}


@pytest.fixture(params=SERIALIZERS)
def serialized(
    request: pytest.FixtureRequest, database_url: str, workers: Workers
) -> Iterator[tuple[str, Celery, Callable[..., Any]]]:
    """A worker and a client that store results so; the serializer's name, the client, and how to open another one."""
    serializer = request.param.partition("-")[0]
    conf = {"result_serializer": serializer, **SERIALIZERS[request.param], **EXTENDED}
    workers(app="tests.support.outcomes", pool="threads", conf=conf)
    with client_of(database_url, **conf) as client:
        yield serializer, client, lambda **other: client_of(database_url, **{**conf, **other})


@on_one_database
def test_every_serializer(serialized: tuple[str, Celery, Callable[..., Any]]) -> None:
    serializer, client, another = serialized
    for value in VALUES:
        result = outcomes.return_value.delay(value)
        assert result.get(timeout=60) == value
        assert (again(result).result, again(result).args) == (value, [value])
    spread = outcomes.spread.delay(2)
    spread.get(timeout=60)
    assert isinstance(again(spread).children[0], GroupResult)
    with pytest.raises(ValueError, match="broken"):
        fail.delay("broken").get(timeout=60)
    for task, text in (
        (outcomes.raise_two_words, "one two"),
        (outcomes.raise_locked, "locked"),
        (outcomes.raise_local, "from within"),
    ):
        assert text in str(task.delay().get(timeout=60, propagate=False))
    sent = group(add.s(1, 1), add.s(2, 2)).apply_async()
    sent.save()
    assert client.GroupResult.restore(sent.id).get(timeout=60) == [2, 4]
    if serializer != "json":
        with another(result_accept_content=["json"]) as other, pytest.raises(ContentDisallowed):
            other.AsyncResult(sent[0].id).get(timeout=60)
    if client.conf.result_compression:
        large = outcomes.return_value.delay("x" * 10_000)
        job = Jobs(client).wait(large, State.COMPLETED)
        assert job.result is not None
        assert len(job.result) < 1000
        assert b64decode(job.result.removeprefix(BINARY)).startswith(b"\0celery-compressed\0")
        with another(result_compression=None) as other:
            assert other.AsyncResult(sent[0].id).get(timeout=60) == 2


@on_one_database
@pytest.mark.parametrize(
    ("conf", "is_kept"),
    [
        ({"result_expires": 0.05}, False),
        ({"result_expires": None}, True),
        ({}, True),
        ({"result_expires": 0.05, "kathikon_retention_period": None}, True),
        ({"kathikon_retention_period": {"completed": 0.05}}, False),
    ],
    ids=["expires", "never expires", "default", "retention goes first", "retention"],
)
def test_how_long_a_result_stays(database_url: str, workers: Workers, conf: dict[str, Any], is_kept: bool) -> None:
    workers(pool="threads", conf={"kathikon_prune_interval": 0.1, **conf})
    with client_of(database_url) as client:
        storage, result, other = Storage.for_app(client), add.delay(1, 1), fail.delay("kept")
        group_result = GroupResult("group", [result], app=client)
        group_result.save()
        other.get(timeout=60, propagate=False)
        if is_kept:
            result.get(timeout=60)
            first = add.apply_async((1, 1), expires=-1)
            Jobs(client).wait(first, State.DISCARDED)  # the pruner has had its turn
            assert again(result).get(timeout=60) == 2
        else:
            wait_until(lambda: storage.fetch(result.id) is None, 60)
            assert (again(result).state, exists(again(result))) == ("PENDING", False)
            wait_until(lambda: client.backend.restore_group("group", cache=False) is None, 60)
        assert repr(again(other).result) == "ValueError('kept')"  # the dead stay


def test_failures_that_expire(database_url: str, workers: Workers) -> None:
    workers(pool="threads", conf={"kathikon_prune_interval": 0.1, "result_failure_expires": 0.05})
    with client_of(database_url) as client:
        done, dead = add.delay(1, 1), fail.delay()
        done.get(timeout=60)
        wait_until(lambda: Storage.for_app(client).fetch(dead.id) is None, 60)
        assert again(done).result == 2


def test_results_beside_the_brokers_database(database_url: str, workers: Workers, tmp_path: Path) -> None:
    conf = {"result_backend": f"kathikon+sqlite:///{tmp_path / 'results.db'}", "result_expires": 0.05}
    workers(pool="threads", conf=conf)
    with client_of(database_url, **conf) as client:
        result = add.delay(1, 1)
        assert result.get(timeout=60) == 2
        assert not client.backend.supports_autoexpire  # so `celery beat` sends celery.backend_cleanup once a day
        wait_until(lambda: client.backend.cleanup() or not exists(again(result)), 60)
