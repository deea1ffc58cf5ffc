"""Which calls `Sender` leaves to Celery, and when it forgets what it knew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import kombu
import pytest
from celery import Celery, Task, signals
from celery.exceptions import QueueNotFound, SoftTimeLimitExceeded
from kombu import Exchange, Queue
from kombu.exceptions import EncodeError, OperationalError

from kathikon_celery.publish import fast_path
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import Unavailable
from tests.support import apps


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """An app with one task, ``plain``, and a way for it that is known."""
    app = make(tmp_path / "k.db")
    yield app
    Storage.for_app(app).close()


def make(path: Path, **conf: Any) -> Celery:
    app = apps.create_app("sending", kathikon_database_url=f"sqlite:///{path}", **conf)

    @app.task(name="plain", shared=False)
    def plain(x: int = 0) -> None:
        pass

    plain.delay()  # makes the connection, and so the sender
    plain.delay()  # with which it finds out the way
    Storage.for_app(app).clear_jobs()
    return app


@pytest.fixture
def plain(app: Celery) -> Task:
    return app.tasks["plain"]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of what was sent without Celery."""
    ids: list[str] = []
    publish = fast_path.publish_new

    def noted(storage: Storage, job: Any) -> None:
        ids.append(job.id)
        publish(storage, job)

    monkeypatch.setattr(fast_path, "publish_new", noted)
    return ids


def queues(app: Celery) -> list[str | None]:
    return [job.queue for job in Storage.for_app(app).all()]


def test_the_first_call_of_all_is_celerys_and_the_next_is_not(tmp_path: Path, ours: list[str]) -> None:
    app = make(tmp_path / "k.db")  # calls it twice
    assert len(ours) == 1
    sent = app.tasks["plain"].delay()
    assert ours[1:] == [sent.id]


def test_a_queue_is_declared_before_the_first_call_to_it(app: Celery, plain: Task, ours: list[str]) -> None:
    sent = plain.apply_async((1,), queue="other")
    assert ours == [sent.id]
    assert queues(app) == ["other"]
    with app.connection_for_write() as connection:
        connection.default_channel.queue_declare("other", passive=True)  # raises NotFound where there is none


def test_what_goes_wrong_before_a_first_call_is_left_to_celery(app: Celery, plain: Task, ours: list[str]) -> None:
    with mock.patch.object(fast_path, "maybe_declare", side_effect=Unavailable("for a moment")) as declare:
        plain.apply_async((1,), queue="other")
    assert declare.call_count == 1
    assert ours == []
    assert queues(app) == ["other"]
    sent = plain.apply_async((1,), queue="other")
    assert ours == [sent.id]


def test_a_time_limit_while_a_queue_is_declared_is_the_tasks(app: Celery, plain: Task) -> None:
    with (
        mock.patch.object(fast_path, "maybe_declare", side_effect=SoftTimeLimitExceeded),
        pytest.raises(SoftTimeLimitExceeded),
    ):
        plain.apply_async((1,), queue="other")
    assert queues(app) == []


def test_a_queue_that_is_not_known_costs_no_connection(tmp_path: Path, ours: list[str]) -> None:
    app = make(tmp_path / "k.db", task_create_missing_queues=False)
    with mock.patch.object(kombu.connection.ConnectionPool, "replace") as replace, pytest.raises(QueueNotFound):
        app.tasks["plain"].apply_async((1,), queue="other")
    assert replace.call_count == 0


def test_a_queue_that_goes_by_itself_is_declared_for_each_call(tmp_path: Path, ours: list[str]) -> None:
    fleeting = Queue("fleeting", Exchange("fleeting"), "fleeting", auto_delete=True)
    app = make(tmp_path / "k.db", task_queues=[fleeting, Queue("default", Exchange("default"), "default")])
    ours.clear()
    for _ in range(2):
        app.tasks["plain"].apply_async((1,), queue="fleeting")
        with app.connection_for_write() as connection:
            connection.default_channel.queue_declare("fleeting", passive=True)  # raises NotFound where there is none
            connection.default_channel.queue_delete("fleeting")
    assert ours == []


def test_the_only_producer_may_be_in_the_callers_hands(tmp_path: Path, ours: list[str]) -> None:
    app = make(tmp_path / "k.db", broker_pool_limit=1)
    with app.producer_pool.acquire() as producer:
        sent = app.tasks["plain"].apply_async((1,), queue="other", producer=producer)
    assert ours[1:] == [sent.id]


@pytest.mark.parametrize(
    "options",
    [
        {"countdown": 5},
        {"expires": 60},
        {"link": Celery().signature("plain")},
        {"headers": {"x": 1}},
        {"retries": 1},
        {"compression": "zlib"},
        {"queue": Queue("default", Exchange("default"), "default")},
        {"routing_key": "default", "exchange": "default"},
        {"reply_to": "me"},
        {"retry": False},
        {"stamped_headers": ["stamp"], "stamp": "1"},
        {"correlation_id": "7"},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_is_not_plain_is_celerys(app: Celery, plain: Task, ours: list[str], options: dict[str, Any]) -> None:
    sent = plain.apply_async((1,), **options)
    assert ours == []
    assert Storage.for_app(app).fetch(sent.id) is not None


def test_a_task_that_is_only_named_is_celerys(app: Celery, ours: list[str]) -> None:
    app.send_task("plain", (1,))
    app.send_task("unknown", (1,), {}, 0)
    assert ours == []
    assert queues(app) == ["default"] * 2


def test_what_a_task_sends_of_itself_or_with_its_priority_is_celerys(app: Celery, plain: Task, ours: list[str]) -> None:
    with apps.running(plain, id="sender", delivery_info={"priority": 7}):
        plain.apply_async((1,), task_id="sender")
        assert ours == []
        plain.delay(1)
        assert len(ours) == 1
        app.conf.task_inherit_parent_priority = True
        inherits = plain.delay(1)
        assert len(ours) == 1
    job = Storage.for_app(app).fetch(inherits.id)
    assert job is not None
    assert job.priority == 7


@pytest.mark.parametrize("signal", ["before_task_publish", "after_task_publish"])
def test_signals_are_sent_to_who_listens(plain: Task, ours: list[str], signal: str) -> None:
    heard = []

    def hear(sender: str, headers: dict[str, Any], **_: Any) -> None:
        heard.append(headers["id"])

    getattr(signals, signal).connect(hear)
    try:
        sent = plain.delay(1)
    finally:
        getattr(signals, signal).disconnect(hear)
    assert heard == [sent.id]
    assert ours == []
    assert [plain.delay(1).id] == ours  # learns anew


def test_a_proxy_of_a_method_is_no_method_of_celerys() -> None:
    class Proxy:
        def __getattr__(self, name: str) -> Any:
            return getattr(publish, name)

    publish, module = kombu.Producer.publish, "kombu.messaging"
    assert fast_path._is_own(kombu.Producer, "publish", module)
    with mock.patch.object(kombu.Producer, "publish", Proxy()):
        assert kombu.Producer.publish.__globals__["__name__"] == module
        assert not fast_path._is_own(kombu.Producer, "publish", module)


@pytest.mark.parametrize(("owner", "method"), [(Celery, "send_task"), (kombu.Producer, "publish")])
def test_who_replaces_a_method_of_celerys_sees_the_call(plain: Task, ours: list[str], owner: type, method: str) -> None:
    with mock.patch.object(owner, method, autospec=True) as replaced:
        plain.delay(1)
    assert replaced.call_count == 1
    assert ours == []


def test_who_replaces_the_apps_own_send_task_sees_the_call(app: Celery, plain: Task, ours: list[str]) -> None:
    with mock.patch.object(app, "send_task") as replaced:
        plain.delay(1)
    assert replaced.call_count == 1
    assert ours == [plain.delay(1).id]


def test_a_class_that_sends_by_itself_goes_on_to_do_so(tmp_path: Path, ours: list[str]) -> None:
    sent = []

    class Own(Celery):
        def send_task(self, *args: Any, **options: Any) -> Any:
            sent.append(args)
            return super().send_task(*args, **options)

    app = Own("own", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.kathikon_database_url = f"sqlite:///{tmp_path}/own.db"

    @app.task(name="plain", shared=False)
    def task(x: int) -> None:
        pass

    for number in range(3):
        task.delay(number)
    assert sent == [("plain", (number,), {}) for number in range(3)]
    assert ours == []


@pytest.mark.parametrize(
    "change",
    [
        lambda app: app.conf.update(task_send_sent_event=True),
        lambda app: app.conf.update(task_compression="zlib"),
        lambda app: app.conf.update(task_protocol=1),
    ],
    ids=["events", "compression", "protocol"],
)
def test_a_setting_that_changes_is_respected(
    app: Celery, plain: Task, ours: list[str], change: Callable[[Celery], None]
) -> None:
    change(app)
    for _ in range(2):
        plain.delay(1)
    assert ours == []
    assert queues(app) == ["default"] * 2


def test_a_route_that_changes_is_respected(app: Celery, plain: Task, ours: list[str]) -> None:
    app.conf.update(task_routes={"plain": {"queue": "new"}})
    for _ in range(2):
        plain.delay(1)
    assert queues(app) == ["new", "new"]
    assert len(ours) == 2


def test_a_router_that_may_decide_otherwise_the_next_time_is_asked_each_time(tmp_path: Path, ours: list[str]) -> None:
    def router(name: str, args: tuple[int, ...], *_: Any, **__: Any) -> dict[str, str]:
        return {"queue": f"q{args[0] if args else ''}"}

    app = make(tmp_path / "k.db", task_routes=(router,))
    for number in (1, 2, 1):
        app.tasks["plain"].delay(number)
    assert queues(app) == ["q1", "q2", "q1"]
    assert ours == []


def test_arguments_that_cannot_be_sent_are_celerys_error(app: Celery, plain: Task) -> None:
    with pytest.raises(EncodeError, match="not JSON serializable"):
        plain.delay(object())
    with pytest.raises(TypeError, match="args must be a list or tuple"):
        plain.apply_async({1})
    with pytest.raises(TypeError):
        plain.delay(1, 2)
    assert queues(app) == []


def test_a_lost_database_is_left_to_kombu_and_the_job_is_sent_once(app: Celery, plain: Task, ours: list[str]) -> None:
    publish, fences = fast_path.publish_new, list[int]()

    def committed_but_unheard(storage: Storage, job: Any) -> None:
        publish(storage, job)
        fences.extend(one.fence for one in storage.all())
        raise Unavailable("the answer was lost")

    with mock.patch.object(fast_path, "publish_new", committed_but_unheard):
        sent = plain.delay(1)
    (job,) = Storage.for_app(app).all()
    assert (job.id, job.fence) == (sent.id, *fences)


def test_a_database_that_stays_away_is_celerys_error(app: Celery, plain: Task, tmp_path: Path) -> None:
    Storage.for_app(app).close()
    (tmp_path / "k.db").chmod(0)
    (tmp_path / "k.db").unlink()
    tmp_path.joinpath("k.db").mkdir()
    with pytest.raises(OperationalError, match="cannot be opened"):
        plain.apply_async((1,), retry_policy={"max_retries": 0})
    with pytest.raises(OperationalError, match="cannot be opened"):
        plain.delay(1)


def test_an_app_that_was_closed_sends_again(app: Celery, plain: Task) -> None:
    app.close()
    for _ in range(2):
        plain.delay(1)
    assert queues(app) == ["default"] * 2


def test_a_producer_of_another_database_is_used(app: Celery, plain: Task, ours: list[str], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    with kombu.Connection(f"kathikon+{url}") as connection:
        sent = plain.apply_async((1,), producer=app.amqp.Producer(connection, auto_declare=False))
        with connection.channel() as channel:
            assert channel.storage.fetch(sent.id) is not None
    assert ours == []
    assert queues(app) == []
    with app.producer_pool.acquire() as producer:
        sent = plain.apply_async((1,), producer=producer)
    assert ours == [sent.id]


def test_a_producer_that_compresses_is_used(app: Celery, plain: Task, ours: list[str]) -> None:
    with app.producer_pool.acquire() as producer, mock.patch.object(producer, "compression", "zlib"):
        sent = plain.apply_async((1,), producer=producer)
    assert ours == []
    job = Storage.for_app(app).fetch(sent.id)
    assert job is not None
    assert "application/x-gzip" in job.envelope
