from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.app.amqp import Queues
from celery.contrib.testing.app import setup_default_app
from kombu import Exchange, Queue

from kathikon_celery.routing import ConfiguredQueues, Router, configure, declare_queues
from kathikon_celery.settings import SettingError

MAIL = {
    "default": 10,
    "mail": {"concurrency": 5, "tasks": ["proj.mail.*", "proj.report.send"]},
    "reports": {"tasks": ["proj.report.*", "proj.mail.digest", "*.CSV", "proj.[ab].x"]},
}


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """No pyproject.toml upward, and no current app but one that is not ours."""
    monkeypatch.chdir(tmp_path)
    with setup_default_app(Celery("nobody's", set_as_current=False)):
        yield


def make_app(source: str = "kathikon_celery.config", **conf: Any) -> Celery:
    app = Celery("routing", set_as_current=False)
    if source:
        app.config_from_object(source)
    app.conf.update(conf)
    return app


def route(app: Celery, name: str, **options: Any) -> str:
    queue: Queue = app.amqp.router.route(options, name)["queue"]
    return str(queue.name)


def consumed(app: Celery) -> list[str]:
    return list(app.amqp.queues.consume_from)


# Routes


@pytest.mark.parametrize(
    ("task", "queue"),
    [
        ("proj.mail.send", "mail"),
        ("proj.report.send", "mail"),
        ("proj.report.sum", "reports"),
        ("proj.mail.digest", "reports"),  # written out, so before the pattern of an earlier queue
        ("export.CSV", "reports"),
        ("export.csv", "default"),  # patterns mind upper and lower case, on every platform
        ("proj.a.x", "reports"),
        ("proj.c.x", "default"),
        ("proj.mail", "default"),
    ],
)
def test_tasks_go_where_names_and_patterns_say(task: str, queue: str) -> None:
    assert route(make_app(kathikon_queues=MAIL), task) == queue


def test_first_configured_pattern_counts() -> None:
    app = make_app(kathikon_queues={"a": {"tasks": ["p.*"]}, "b": {"tasks": ["p.q.*", "r"]}, "c": {"tasks": ["r"]}})
    assert route(app, "p.q.x") == "a"
    assert route(app, "r") == "b"


def test_what_the_caller_says_comes_first() -> None:
    app = make_app(kathikon_queues=MAIL)
    assert route(app, "proj.mail.send", queue="elsewhere") == "elsewhere"
    options = app.amqp.router.route({"exchange": "own", "routing_key": "key"}, "proj.mail.send")
    assert (options["exchange"], options["routing_key"]) == ("own", "key")


def test_first_configured_queue_takes_the_rest_where_default_is_not_configured() -> None:
    app = make_app(kathikon_queues="mail:1,reports:2")
    assert route(app, "anything") == "mail"
    assert consumed(app) == ["mail", "reports"]


def test_default_queue_of_celery_takes_the_rest_where_it_is_configured() -> None:
    assert route(make_app(kathikon_queues="mail,default"), "anything") == "default"
    assert route(make_app(kathikon_queues="mail,rest", task_default_queue="rest"), "anything") == "rest"


def test_settings_after_config_from_object_count() -> None:
    app = make_app()
    app.conf.update(kathikon_queues="late:1")
    assert route(app, "anything") == "late"


def test_settings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(kathikon_queues=MAIL)
    assert route(app, "proj.mail.send") == "mail"
    monkeypatch.setenv("KATHIKON_LEASE", "wrong")
    assert route(app, "proj.report.sum") == "reports"


def test_wrong_setting_is_an_error_when_publishing() -> None:
    with pytest.raises(SettingError, match="kathikon_queues"):
        make_app(kathikon_queues={"a": 0}).send_task("x")


def test_own_routes_before_the_router() -> None:
    app = make_app(kathikon_queues=MAIL, task_routes=({"proj.mail.*": "own"}, Router()))
    assert route(app, "proj.mail.send") == "own"
    assert route(app, "proj.report.sum") == "reports"


def test_queues_may_be_closed() -> None:
    app = make_app(kathikon_queues=MAIL, task_create_missing_queues=False)
    assert route(app, "proj.mail.send") == "mail"


# Which app asks


@pytest.mark.parametrize("finalized", [True, False])
def test_each_app_has_its_own_routes_and_queues(finalized: bool) -> None:
    names = ["first", "second", "third"]
    apps = [make_app(kathikon_queues=name) for name in names]
    apps[0].set_current()
    for app in apps:
        if finalized:
            app.finalize()
    for _ in range(2):
        assert [consumed(app) for app in apps] == [[name] for name in names]
        assert [route(app, "by.name") for app in apps] == names


def test_task_of_an_app_is_routed_by_that_app() -> None:
    router = Router()
    for name in ("first", "second"):
        app = make_app(kathikon_queues=name)
        assert router("celery.chord", (), {}, {}, task=app.tasks["celery.chord"]) == {"queue": name}


def test_thread_with_another_current_app() -> None:
    app = make_app(kathikon_queues="mine")
    app.set_current()
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(route(app, "by.name")))
    thread.start()
    thread.join()
    assert seen == ["mine"]


def test_asked_by_nobody_they_answer_for_the_current_app() -> None:
    make_app(kathikon_queues="mine").set_current()
    assert [queue.name for queue in ConfiguredQueues()] == ["mine"]
    assert Router()("by.name") == {"queue": "mine"}


def test_apps_are_not_kept_alive() -> None:
    app = make_app(kathikon_queues=MAIL)
    (router,) = app.amqp.routes
    route(app, "proj.mail.send")
    seen = weakref.ref(app)
    assert app in router._routes
    del app
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("cls", [Router, ConfiguredQueues])
def test_pickled_with_the_configuration(cls: type) -> None:
    again = pickle.loads(pickle.dumps(cls()))
    assert isinstance(again, cls)
    assert repr(again) == f"{cls.__name__}()"


# Queues


def test_without_settings_the_default_queue_alone() -> None:
    assert consumed(make_app()) == ["default"]
    assert consumed(make_app(task_default_queue="celery")) == ["celery"]
    assert route(make_app(task_default_queue="celery"), "anything") == "celery"


def test_queues_are_declared_as_celery_declares_missing_ones() -> None:
    queues = make_app(kathikon_queues=MAIL).amqp.queues
    assert queues["mail"] == make_app("").amqp.queues["mail"]
    plain = make_app(
        "", task_default_queue="default", task_default_exchange_type="topic", task_default_routing_key="a.b"
    )
    ours = make_app(kathikon_queues=MAIL, task_default_exchange_type="topic", task_default_routing_key="a.b")
    assert ours.amqp.queues["default"] == plain.amqp.queues["default"]
    assert ours.amqp.queues["default"].exchange.type == "topic"


def test_names_of_any_alphabet() -> None:
    app = make_app(kathikon_queues={"日本 語": {"tasks": ["仕事.*"]}})
    assert route(app, "仕事.送る") == "日本 語"


def test_settings_change_queues_after_finalize() -> None:
    app = make_app()
    app.finalize()
    app.conf.kathikon_queues = "late"
    assert consumed(app) == ["late"]


@pytest.mark.parametrize("conf", [{}, {"kathikon_queues": MAIL}, {"kathikon_queues": "a,b"}])
def test_declare_queues_has_nothing_to_add(conf: dict[str, Any]) -> None:
    app = make_app(**conf)
    before = consumed(app)
    declare_queues(app)
    declare_queues(app)
    assert consumed(app) == before


def test_declare_queues_keeps_own_queues() -> None:
    own = [Queue("own", Exchange("topics", "topic"), "a.#"), Queue("mail", Exchange("topics", "topic"), "mail.#")]
    app = make_app(task_queues=own, kathikon_queues=MAIL)
    declare_queues(app)
    assert consumed(app) == ["own", "mail", "default", "reports"]
    assert app.amqp.queues["mail"].exchange.name == "topics"
    assert route(app, "proj.mail.send") == "mail"


def test_own_queues_alone_stay_as_they_are() -> None:
    app = make_app(task_queues=[Queue("own")], task_default_queue="own")
    declare_queues(app)
    assert consumed(app) == ["own"]
    assert route(app, "anything") == "own"


def test_declare_queues_without_our_configuration() -> None:
    app = make_app("", kathikon_queues="mail:3")
    declare_queues(app)
    assert consumed(app) == ["celery", "mail"]  # Celery sends to "celery" what nothing routes


def test_declare_queues_after_a_selection_keeps_it() -> None:
    app = make_app("", kathikon_queues="mail:3,video:1")
    app.amqp.queues.select("video")
    declare_queues(app)
    assert consumed(app) == ["video"]
    assert {"mail", "video"} <= set(app.amqp.queues)


def test_default_queue_is_consumed_where_no_router_is_at_work() -> None:
    app = make_app(kathikon_queues="mail:3", task_routes={"x": "mail"})
    assert route(app, "anything") == "default"
    assert consumed(app) == ["mail", "default"]


def test_worker_consumes_all_or_those_selected() -> None:
    def worker(**options: Any) -> Queues:
        app = make_app(kathikon_queues=MAIL, broker_url="memory://", result_backend="cache+memory://")
        app.WorkController(pool_cls="solo", **options)
        return app.amqp.queues

    assert list(worker().consume_from) == ["default", "mail", "reports"]
    assert list(worker(queues="mail").consume_from) == ["mail"]
    assert list(worker(queues=["mail", "elsewhere"]).consume_from) == ["mail", "elsewhere"]
    assert list(worker(exclude_queues="mail").consume_from) == ["default", "reports"]
    assert list(worker(queues="mail")) == ["default", "mail", "reports"]  # the others still for routing, and for purge


# Time zone


def test_celery_follows_the_timezone_of_the_settings() -> None:
    app = make_app(kathikon_timezone="Asia/Tokyo")
    assert str(app.timezone) != "Asia/Tokyo"
    assert configure(app).timezone == "Asia/Tokyo"
    assert str(app.timezone) == app.conf.timezone == "Asia/Tokyo"


def test_timezone_of_celery_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATHIKON_TIMEZONE", "Asia/Tokyo")
    app = make_app(timezone="Europe/Athens")
    assert configure(app).timezone == "Europe/Athens"
    assert str(app.timezone) == "Europe/Athens"
    assert configure(plain := make_app("")).timezone == str(plain.timezone) == "Asia/Tokyo"
