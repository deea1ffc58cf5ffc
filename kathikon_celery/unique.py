"""Unique jobs: no second job while one with the same arguments is there.

>>> @app.task(unique=Unique("account_id"))
... def sync(account_id, force=False): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from hashlib import blake2b
from typing import Any

from kombu.utils import json

from kathikon_celery.job import UniqueKey
from kathikon_celery.limits import arguments_of, lacking
from kathikon_celery.settings import checks
from kathikon_celery.storage.errors import NotUnique

__all__ = ["NotUnique", "Unique", "UniqueError"]

#: Where the id is noted of a job that is there instead of the published one; `None`: nobody would take that id.
instead: ContextVar[list[str] | None] = ContextVar("kathikon_instead", default=None)


@contextmanager
def answering(is_able: bool) -> Iterator[list[str]]:
    """Yield a list to which the id of the job that is there instead is added, if the caller *is_able* to take it."""
    if not is_able or instead.get() is not None:
        yield []
        return
    found: list[str] = []
    token = instead.set(found)
    try:
        yield found
    finally:
        instead.reset(token)


WHILE = ("waiting", "active", "kept")
ON_CONFLICT = ("return", "raise", "drop", "replace", "after")


class UniqueError(ValueError):
    """A `Unique` is wrong, or does not fit the task or the call; nothing was sent."""


class Unique:
    """The option ``unique`` of a task: at most one of its jobs with the same arguments.

    Arguments:
        fields: names of the arguments that count; none: all arguments.
        while_: how long a job is the only one: while it is ``"waiting"`` for a worker; while it is ``"active"``, until
            it has ended; or while it is ``"kept"``, until it is pruned.
        within: seconds since its publication, after which it is not the only one any more.
        on_conflict: what a call does if there is such a job. ``"return"``: it returns the `AsyncResult` of that job.
            ``"raise"``: it raises `NotUnique`. ``"drop"``: its job is discarded, with the cause ``duplicate``.
            ``"replace"``: the job that waits is discarded, with the cause ``replaced``, and the new one takes its place
            (only while ``"waiting"``). ``"after"``: its job runs when the other one has ended.
        key: called with the arguments of the call, instead of *fields*: what counts, as a value that JSON can write.

    Raises `UniqueError` for other values.

    >>> Unique("account_id", while_="kept", within=3600)
    >>> Unique("document", while_="waiting", on_conflict="replace")     # debounce, with a countdown
    >>> Unique(key=lambda order: order["id"])
    """

    def __init__(
        self,
        *fields: str,
        while_: str = "active",
        within: float | None = None,
        on_conflict: str = "return",
        key: Callable[..., object] | None = None,
    ) -> None:
        for field in fields:
            if not isinstance(field, str) or not field.isidentifier():
                raise UniqueError(f"Unique: fields are names of arguments, not {field!r}")
        if key is not None and (fields or not callable(key)):
            raise UniqueError("Unique: give names of arguments, or a function as key, not both and nothing else")
        _one_of("while_", while_, WHILE)
        _one_of("on_conflict", on_conflict, ON_CONFLICT)
        if within is not None:
            if isinstance(within, bool) or not isinstance(within, int | float) or not 0 < within <= 10**9:
                raise UniqueError(f"Unique: within is a number of seconds above 0, not {within!r}")
            if on_conflict == "after":
                raise UniqueError('Unique: within does not go with on_conflict="after", which refuses no job')
        if on_conflict == "replace" and while_ != "waiting":
            raise UniqueError('Unique: on_conflict="replace" needs while_="waiting": only a job that waits is replaced')
        self.fields, self.while_, self.within, self.on_conflict, self.key = fields, while_, within, on_conflict, key

    def __set_name__(self, owner: type, name: str) -> None:
        """Make calls of the task class *owner* return what is there instead. Python calls this for a class's own."""
        call = getattr(owner, "apply_async", None)
        if name != "unique" or call is None or getattr(call, "asks_for_others", False):
            return

        @wraps(call)
        def apply_async(
            self: Any, args: Any = None, kwargs: Any = None, task_id: str | None = None, *more: Any, **options: Any
        ) -> Any:
            with answering(task_id is None) as found:  # a caller that gives the id waits for that one
                result = call(self, args, kwargs, task_id, *more, **options)
            return self.AsyncResult(found[0]) if found else result

        apply_async.asks_for_others = True  # type: ignore[attr-defined]
        owner.apply_async = apply_async  # type: ignore[attr-defined]

    def key_of(self, task: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return the key of a call of *task*, whose *signature* names *args* and *kwargs*.

        Raises `UniqueError` if the call lacks a field, or JSON cannot write a value.
        """
        if self.key is not None:
            value: Any = self.key(*args, **kwargs)
        else:
            try:
                arguments = arguments_of(signature, args, kwargs)
            except TypeError as error:
                raise UniqueError(f"task {task}: its unique key needs its arguments: {error}") from None
            value = {name: arguments.get(name) for name in self.fields} if self.fields else arguments
        try:
            text = json.dumps(value, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise UniqueError(f"task {task}: its unique key is no value that JSON can write: {error}") from None
        return f"{task[-100:]}:{blake2b(f'{task} {text}'.encode(), digest_size=16).hexdigest()}"

    def of(self, key: str) -> UniqueKey:
        """Return what a job with *key* is published with."""
        return UniqueKey(key, self.while_, self.within, self.on_conflict)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UniqueError(
            f"Unique: {name} is one of {', '.join(allowed)}, not {value!r}{checks.did_you_mean(str(value), allowed)}"
        )


def unique_of(task: Any, signature: inspect.Signature) -> Unique | None:
    """Return the option ``unique`` of *task*. Raises `UniqueError` for a wrong one."""
    found = getattr(task, "unique", None)
    if found is None:
        return None
    if not isinstance(found, Unique):
        raise UniqueError(f"task {task.name}: unique is a Unique(…), not {found!r}")
    for field, names in lacking(signature, found.fields):
        raise UniqueError(f"task {task.name}: its unique key names {field!r}, and the task has {names}")
    return found
