"""`Unique`: what it takes, and which calls have the same key."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
from celery import Celery

from kathikon_celery.publish.limiting import AppLimits
from kathikon_celery.storage.errors import NotUnique
from kathikon_celery.unique import Unique, UniqueError


def key_of(function: Any, unique: Unique, *args: Any, **kwargs: Any) -> str:
    return unique.key_of("proj.task", inspect.signature(function), args, kwargs)


def sync(account: int, force: bool = False, *more: Any, **options: Any) -> None: ...


def test_the_same_values_are_the_same_key() -> None:
    unique = Unique("account")
    key = key_of(sync, unique, 7)
    assert key == key_of(sync, unique, account=7) == key_of(sync, unique, 7, True, "more", a=1)
    assert key != key_of(sync, unique, 8)
    assert key != key_of(sync, unique, "7")
    assert key != unique.key_of("proj.other", inspect.signature(sync), (7,), {})


def test_without_names_all_arguments_count_with_their_defaults() -> None:
    unique = Unique()
    assert key_of(sync, unique, 7) == key_of(sync, unique, 7, False) == key_of(sync, unique, force=False, account=7)
    assert len({key_of(sync, unique, *args) for args in [(7,), (7, True), (7, False, "more"), (8,)]}) == 4
    assert key_of(sync, unique, 7, b=1, a=2) == key_of(sync, unique, 7, a=2, b=1) != key_of(sync, unique, 7, a=1, b=2)


def test_an_option_may_be_named() -> None:
    unique = Unique("a")
    assert key_of(sync, unique, 7, a=1) == key_of(sync, unique, 8, a=1) != key_of(sync, unique, 7, a=2)
    assert key_of(sync, unique, 7) == key_of(sync, unique, 8, a=None)


def test_a_function() -> None:
    unique = Unique(key=lambda account, **options: account % 2)
    assert key_of(sync, unique, 7) == key_of(sync, unique, 9) != key_of(sync, unique, 8)


def test_keys_are_short() -> None:
    assert len(key_of(sync, Unique(), "x" * 10_000)) < 190
    assert len(Unique().key_of("t" * 500, inspect.signature(sync), (1,), {})) < 190


def test_a_call_that_lacks_a_field() -> None:
    with pytest.raises(UniqueError, match=r"task proj.task: its unique key needs its arguments: missing .*'account'"):
        key_of(sync, Unique("account"))


def test_a_value_that_json_cannot_write() -> None:
    with pytest.raises(UniqueError, match=r"task proj.task: its unique key is no value that JSON can write: .*object"):
        key_of(sync, Unique("account"), object())


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        (("a b",), {}, "fields are names of arguments, not 'a b'"),
        ((1,), {}, "fields are names of arguments, not 1"),
        ((), {"while_": "activ"}, r"while_ is one of waiting, active, kept, not 'activ'; did you mean active\?"),
        ((), {"on_conflict": "skip"}, "on_conflict is one of return, raise, drop, replace, after, not 'skip'"),
        ((), {"on_conflict": "replace"}, r'on_conflict="replace" needs while_="waiting"'),
        ((), {"within": 0}, "within is a number of seconds above 0, not 0"),
        ((), {"within": "1h"}, "within is a number of seconds above 0, not '1h'"),
        ((), {"within": True}, "within is a number of seconds above 0, not True"),
        ((), {"within": 5, "on_conflict": "after"}, "within does not go with"),
        ((), {"key": 5}, "give names of arguments, or a function as key"),
        (("a",), {"key": str}, "give names of arguments, or a function as key"),
    ],
)
def test_what_is_wrong_is_said_at_once(fields: tuple[Any, ...], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UniqueError, match=said):
        Unique(*fields, **options)


def only_account(account: int) -> None: ...


@pytest.fixture
def app() -> Celery:
    return Celery("proj", set_as_current=False)


def test_a_field_that_the_task_has_not(app: Celery) -> None:
    app.task(shared=False, unique=Unique("acount"), name="proj.sync")(sync)
    closed = app.task(shared=False, unique=Unique("acount"), name="proj.closed")(only_account)
    with pytest.raises(UniqueError, match=r"task proj.closed: .* names 'acount', and the task has account; did you"):
        AppLimits.of(app).unique_of(closed.name)
    assert AppLimits.of(app).unique_of("proj.sync") is not None  # it takes any names
    with pytest.raises(UniqueError):
        AppLimits.of(app).all()


def test_something_else_than_unique(app: Celery) -> None:
    task = app.task(shared=False, unique=True, name="proj.sync")(sync)
    with pytest.raises(UniqueError, match=r"task proj.sync: unique is a Unique\(…\), not True"):
        AppLimits.of(app).unique_of(task.name)


def test_a_subclass_asks_once(app: Celery) -> None:
    class Base(app.Task):  # type: ignore[misc, name-defined]
        unique = Unique("account")

    task = app.task(shared=False, base=Base, unique=Unique("account"), name="proj.sync")(sync)
    assert task.apply_async.asks_for_others
    assert not hasattr(task.apply_async.__wrapped__, "asks_for_others")
    assert not hasattr(app.Task.apply_async, "asks_for_others")


def test_the_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(NotUnique("proj.sync", "id")))
    assert (error.task, error.job_id, str(error)) == (
        "proj.sync",
        "id",
        "task proj.sync: job id has the same unique key",
    )
