"""`Limit`, `RateLimited`, and which limits a call counts for: without a worker."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
from celery import Celery, Task
from celery.contrib.testing.app import setup_default_app
from celery.exceptions import Retry

from kathikon_celery import Limit, RateLimited
from kathikon_celery.job import Job, Use
from kathikon_celery.limits import LimitError, limits_of, take
from kathikon_celery.publish.limiting import AppLimits, mark
from kathikon_celery.storage.limits import in_order
from tests.support.apps import create_app


@pytest.fixture
def app() -> Celery:
    """An app that never connects."""
    return create_app("limits", kathikon_database_url="sqlite:///nowhere/at-all.db")


def uses(app: Celery, task: Any, *args: Any, queue: str = "default", **kwargs: Any) -> tuple[Use, ...]:
    return AppLimits.of(app).uses(Job(id="one", task=task.name, queue=queue), args, kwargs)


def keys(app: Celery, task: Any, *args: Any, **kwargs: Any) -> list[str]:
    return [use.key for use in uses(app, task, *args, **kwargs)]


RATES = 'a rate such as "10/s", "60/m", "100/h" or "1000/d", or a number a second, above 0'

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "a"}, "limit 'a' limits nothing: give a concurrency, a rate, or both"),
    ({"name": "", "rate": 1}, "a limit has a name that is a text and not empty, not ''"),
    ({"name": " ", "rate": 1}, "a limit has a name that is a text and not empty, not ' '"),
    ({"name": 5, "rate": 1}, "a limit has a name that is a text and not empty, not 5"),
    ({"name": "a", "concurrency": 0}, "limit 'a': a concurrency is a whole number from 1 to 10**9, not 0"),
    (
        {"name": "a", "concurrency": True},
        "limit 'a': a concurrency is a whole number from 1 to 10**9, not True",
    ),
    ({"name": "a", "concurrency": 1.5}, "limit 'a': a concurrency is a whole number from 1 to 10**9, not 1.5"),
    ({"name": "a", "concurrency": "1"}, "limit 'a': a concurrency is a whole number from 1 to 10**9, not '1'"),
    (
        {"name": "a", "rate": "10/x"},
        'limit \'a\': a rate such as "10/s", "60/m", "100/h" or "1000/d", or a number a second, above 0, not \'10/x\'',
    ),
    ({"name": "a", "rate": 0}, f"limit 'a': {RATES} and up to 1,000,000, not 0"),
    ({"name": "a", "rate": "10/m", "burst": 11}, "limit 'a': a burst is at most the number of its rate, 10, not 11"),
    ({"name": "a", "concurrency": 3, "burst": 2}, "limit 'a': a burst is at most the number of its rate, 1, not 2"),
    ({"name": "a", "rate": "10/m", "burst": 0}, "limit 'a': a burst is a whole number from 1 to 10**9, not 0"),
    (
        {"name": "a", "rate": "10/m", "weight": 0},
        "limit 'a': a weight is a whole number from 1 to 10**9, not 0",
    ),
    (
        {"name": "a:{b}", "key": str, "rate": 1},
        "limit 'a:{b}': give fields in its name, or a function as key, not both and nothing else",
    ),
    (
        {"name": "a", "key": "b", "rate": 1},
        "limit 'a': give fields in its name, or a function as key, not both and nothing else",
    ),
    ({"name": "a:{}", "rate": 1}, "limit 'a:{}': a field needs the name of an argument, such as {account_id}"),
    (
        {"name": "a:{b", "rate": 1},
        "limit 'a:{b': expected '}' before end of string; fields are names of arguments, such as {account_id}",
    ),
]


@pytest.mark.parametrize(("given", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_definition_says_what_is_allowed(given: dict[str, Any], said: str) -> None:
    with pytest.raises(LimitError) as caught:
        Limit(**given)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "rate", ["nan/s", "inf", "-1/m", "1/0", "/m", "", True, [], "1000001/s", "٣/x", "1e400", "1e-320", "1e-9/d"]
)
def test_no_rate(rate: Any) -> None:
    with pytest.raises(LimitError, match="a rate such as"):
        Limit("a", rate=rate)


@pytest.mark.parametrize(
    ("rate", "number", "per"),
    [("60/m", 60, 60.0), ("10/s", 10, 1.0), ("1/h", 1, 3600.0), ("5/d", 5, 86400.0), (0.5, 1, 2.0), (3, 3, 1.0),
     ("0.5/m", 1, 120.0), (" 7 / m ", 7, 60.0), ("4", 4, 1.0)],
)  # fmt: skip
def test_rates(rate: Any, number: int, per: float) -> None:
    found = Limit("a", rate=rate)
    assert (found.rate, found.per, found.burst) == (number, per, 1)
    assert found.use_of("a") == Use("a", "a", 1, None, number, per, 1)


def test_how_it_is_shown() -> None:
    assert repr(Limit("a:{b}", concurrency=2, rate="60/m")) == "Limit('a:{b}', concurrency=2, rate=60/60s)"


class TestTheKeyOfACall:
    def test_by_any_way_to_give_the_argument(self, app: Celery) -> None:
        @app.task(shared=False, limits=[Limit("account:{account}", concurrency=1)])
        def charge(amount: int, account: str = "none") -> None: ...

        assert keys(app, charge, 1, "a") == ["account:a"]
        assert keys(app, charge, 1, account="a") == ["account:a"]
        assert keys(app, charge, amount=1) == ["account:none"]
        assert keys(app, charge, 1, account=None) == ["account:None"]
        with pytest.raises(LimitError, match=r"^task .*charge: its limits need its arguments: missing a required"):
            keys(app, charge)
        with pytest.raises(LimitError, match=r"got an unexpected keyword argument 'b'"):
            keys(app, charge, 1, b=1)

    def test_of_a_bound_task_a_class_and_one_that_retries(self, app: Celery) -> None:
        of_account = Limit("account:{account}", concurrency=1)

        @app.task(shared=False, bind=True, limits=[of_account])
        def bound(self: Task, account: str) -> None: ...

        @app.task(shared=False, bind=True, autoretry_for=(OSError,), limits=[of_account])
        def retried(self: Task, account: str) -> None: ...

        class OfClass(Task):
            name = "of_class"
            limits = (of_account,)

            def run(self, account: str) -> None: ...

        for task in (bound, retried, app.register_task(OfClass())):
            assert keys(app, task, "a") == keys(app, task, account="a") == ["account:a"]

    def test_of_a_task_with_any_arguments(self, app: Celery) -> None:
        @app.task(shared=False, limits=[Limit("account:{account}", concurrency=1)])
        def anything(*args: Any, **kwargs: Any) -> None: ...

        @app.task(shared=False, limits=[Limit("all:{args}", concurrency=1)])
        def positional(*args: Any) -> None: ...

        @app.task(shared=False, limits=[Limit("kw:{b}", concurrency=1)])
        def named(a: int, /, *, b: str = "x") -> None: ...

        assert keys(app, anything, 1, account="a", other=[]) == ["account:a"]
        with pytest.raises(
            LimitError, match=r"^limit 'account:\{account\}': the call has no 'account'; it has args, b$"
        ):
            keys(app, anything, 1, b=1)
        assert keys(app, positional, 1, 2) == ["all:(1, 2)"]
        assert keys(app, named, 1) == ["kw:x"]
        assert keys(app, named, 1, b="y") == ["kw:y"]

    def test_of_parts_of_an_argument(self, app: Celery) -> None:
        @app.task(shared=False, limits=[Limit("t:{order[tenant]}:{order[lines][0]}", concurrency=1)])
        def ship(order: dict[str, Any]) -> None: ...

        assert keys(app, ship, {"tenant": "acme", "lines": [5]}) == ["t:acme:5"]
        for order in ({}, {"tenant": 1, "lines": []}, None, 5, [1]):
            with pytest.raises(LimitError, match=r"^limit 't:\{order"):
                keys(app, ship, order)

    def test_by_a_function(self, app: Celery) -> None:
        @app.task(shared=False, limits=[Limit("tenant", key=lambda order, **more: order.get("tenant"), concurrency=3)])
        def ship(order: dict[str, Any], **more: Any) -> None: ...

        assert uses(app, ship, {"tenant": "acme"}, x=1) == (Use("tenant:acme", "tenant", 1, 3, None, 1.0, 1),)
        assert uses(app, ship, {}) == ()
        with pytest.raises(AttributeError):
            uses(app, ship, None)

    @pytest.mark.parametrize("text", ["{0}", "{x}", "}{", "%s", "", " ", "\n"])
    def test_braces_in_a_value_are_no_fields(self, app: Celery, text: str) -> None:
        @app.task(shared=False, limits=[Limit("account:{account}", concurrency=1)])
        def charge(account: str) -> None: ...

        assert keys(app, charge, text) == [f"account:{text}"]

    @pytest.mark.parametrize("text", ["x" * 10_000, "a\0b", "\ud800", "ü" * 200])
    def test_what_cannot_be_a_key_is_a_digest(self, app: Celery, text: str) -> None:
        @app.task(shared=False, limits=[Limit("account:{account}", concurrency=1)])
        def charge(account: str) -> None: ...

        (key,) = keys(app, charge, text)
        assert key.startswith("#")
        assert keys(app, charge, text + "2") != [key]

    def test_braces_in_a_name(self, app: Celery) -> None:
        @app.task(shared=False, name="odd{name}", rate_limit="5/s", limits=[Limit("a{{b}}", concurrency=1)])
        def odd() -> None: ...

        app.conf.kathikon_rate_limits = "fleet"
        app.conf.kathikon_queues = {"q{x}": {"fleet": 2}}
        assert AppLimits.of(app).all()
        assert [use.key for use in uses(app, odd, queue="q{x}")] == ["a{b}", "task:odd{name}", "queue:q{x}"]


def test_weights(app: Celery) -> None:
    @app.task(shared=False, limits=[Limit("memory", concurrency=16, weight=lambda size: size)])
    def convert(size: Any) -> None: ...

    assert [use.weight for use in uses(app, convert, 5)] == [5]
    for size in (0, -1, 1.5, "2", True, None, 2_000_000_000):
        with pytest.raises(LimitError, match=r"^limit 'memory': a weight is a whole number from 1 to 10\*\*9, not "):
            uses(app, convert, size)


def test_the_narrow_ones_are_first_and_none_counts_twice(app: Celery) -> None:
    wide, narrow = Limit("house", concurrency=9), Limit("tenant:{tenant}", concurrency=1)

    @app.task(shared=False, limits=[wide, narrow, wide])
    def visit(tenant: str) -> None: ...

    assert [use.key for use in in_order(uses(app, visit, "a"))] == ["tenant:a", "house"]


def test_one_limit_needs_no_list(app: Celery) -> None:
    @app.task(shared=False, limits=Limit("house", concurrency=9))
    def visit() -> None: ...

    assert keys(app, visit) == ["house"]


def test_limits_of_queues_and_of_celery(app: Celery) -> None:
    app.conf.update(
        kathikon_queues={"default": 10, "mail": {"fleet": 20, "rate": "600/m"}},
        kathikon_rate_limits="fleet",
        task_default_rate_limit="3/s",
    )

    @app.task(shared=False, name="mine", rate_limit="100/m")
    def mine() -> None: ...

    @app.task(shared=False, name="other")
    def other() -> None: ...

    assert uses(app, mine) == (Use("task:mine", "task:mine", 1, None, 100, 60.0, 1),)
    assert keys(app, other, queue="mail") == ["task:other", "queue:mail"]
    assert AppLimits.of(app).uses(Job(id="one", task="of another app", queue="mail"), (), {}) == (
        Use("queue:mail", "queue:mail", 1, 20, 600, 60.0, 1),
    )


def test_each_worker_for_itself_is_the_default(app: Celery) -> None:
    @app.task(shared=False, rate_limit="100/m")
    def mine() -> None: ...

    assert uses(app, mine) == ()


@pytest.mark.parametrize("limits", [["a"], [None], "a", [Limit]])
def test_what_is_no_limit(app: Celery, limits: Any) -> None:
    @app.task(shared=False, name="wrong", limits=limits)
    def wrong() -> None: ...

    with pytest.raises(LimitError, match=r"^task wrong: limits are a list of Limit\(…\), not of "):
        limits_of(wrong)


def test_a_field_that_is_no_argument(app: Celery) -> None:
    @app.task(shared=False, name="wrong", limits=[Limit("a:{acount}", concurrency=1)])
    def wrong(account: str, amount: int) -> None: ...

    @app.task(shared=False, name="none", limits=[Limit("a:{acount}", concurrency=1)])
    def none() -> None: ...

    with pytest.raises(LimitError) as caught:
        AppLimits.of(app).all()
    assert str(caught.value) == (
        "task wrong: limit 'a:{acount}' names {acount}, and the task has account, amount; did you mean account?"
    )
    with pytest.raises(LimitError, match=r"and the task has no arguments$"):
        limits_of(none)


class TestMessages:
    """Those that Celery makes."""

    @pytest.mark.parametrize("protocol", [1, 2])
    @pytest.mark.parametrize("serializer", ["json", "pickle", "yaml", "msgpack"])
    @pytest.mark.parametrize("compression", [None, "gzip", "bzip2"])
    def test_arguments_are_read(self, app: Celery, protocol: int, serializer: str, compression: str | None) -> None:
        if serializer in ("yaml", "msgpack"):
            pytest.importorskip(serializer)
        found: list[tuple[Use, ...]] = []
        app.conf.update(broker_url="memory://", task_protocol=protocol, accept_content=[serializer])

        @app.task(shared=False, limits=[Limit("account:{account}", concurrency=1)])
        def charge(account: str, *more: Any) -> None: ...

        with app.connection_for_write() as connection:
            channel = connection.default_channel

            def publish(message: Any, exchange: str, routing_key: str, **kwargs: Any) -> None:
                job = Job(id="one", task=charge.name, queue=routing_key)
                mark(app, job, message)
                found.append(job.limits)

            channel.basic_publish, channel.body_encoding = publish, None
            with app.amqp.Producer(channel) as producer, setup_default_app(app):
                options: dict[str, Any] = {"serializer": serializer, "compression": compression}
                charge.apply_async(("a", "ü"), producer=producer, **options)
                charge.apply_async((), {"account": "b"}, producer=producer, **options)
        assert [use.key for (use,) in found] == ["account:a", "account:b"]

    def test_a_serializer_that_is_not_accepted(self, app: Celery) -> None:
        @app.task(shared=False, name="charge", limits=[Limit("account:{account}", concurrency=1)])
        def charge(account: str) -> None: ...

        body = pickle.dumps((("a",), {}, {}))
        message = {"body": body, "content-type": "application/x-python-serialize", "content-encoding": "binary"}
        with pytest.raises(
            LimitError, match=r"^task charge: its limits and its unique key need its arguments, which cannot be read: "
        ):
            mark(app, Job(id="one", task="charge", queue="default"), message)


def test_an_app_is_not_kept() -> None:
    app = create_app("forgotten")
    AppLimits.of(app)
    assert AppLimits.of(app) is AppLimits.of(app)
    known = weakref.ref(app)
    app.close()
    del app
    gc.collect()
    assert known() is None


class TestRateLimited:
    def test_is_a_retry_and_can_be_pickled(self) -> None:
        error = pickle.loads(pickle.dumps(RateLimited("stripe", retry_after=30)))
        assert isinstance(error, Retry)
        assert (error.key, error.retry_after, error.when) == ("stripe", 30.0, 30)
        assert "stripe is rate limited for 30 s" in str(error)

    @pytest.mark.parametrize("seconds", [-1, None, "5", float("nan"), float("inf"), True, 1e10])
    def test_seconds(self, seconds: Any) -> None:
        with pytest.raises(
            LimitError, match=r"^RateLimited: retry_after is a number of seconds from 0 to 10\*\*9, not "
        ):
            RateLimited("stripe", retry_after=seconds)

    @pytest.mark.parametrize("key", ["", None, 5])
    def test_key(self, key: Any) -> None:
        with pytest.raises(LimitError, match=r"^RateLimited: the key of a limit is a text and not empty, not "):
            RateLimited(key, retry_after=1)


def test_what_is_taken_has_to_be_a_limit_with_its_fields() -> None:
    for wrong, arguments, message in (
        ("api", {}, r"^take: the first argument is a Limit\(…\), not 'api'$"),
        (Limit("api", concurrency=1), {"zzz": 1}, r"^take: limit 'api' has no field 'zzz'$"),
    ):
        with pytest.raises(LimitError, match=message), take(wrong, **arguments):  # type: ignore[arg-type]
            pass


def test_a_field_is_a_name() -> None:
    with pytest.raises(LimitError, match=r"^limit 'api:\{0\}': a field needs the name of an argument"):
        Limit("api:{0}", concurrency=1)


def test_rate_limited_says_what_it_is() -> None:
    assert repr(RateLimited("api", 3)) == "RateLimited('api', retry_after=3)"
