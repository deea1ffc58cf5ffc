"""Limits: how many jobs run at once, and how many start in a time, in all workers together.

>>> @app.task(limits=[Limit("stripe", rate="60/m"), Limit("account:{account_id}", concurrency=1)])
... def charge(account_id, amount): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from string import Formatter
from time import monotonic, sleep
from typing import Any

from celery import Celery, current_app
from celery.exceptions import Retry

from kathikon_celery.job import Use
from kathikon_celery.nodes.own import OwnNode
from kathikon_celery.settings import checks
from kathikon_celery.storage import Storage, takers
from kathikon_celery.storage.names import key as key_of

__all__ = ["Limit", "LimitError", "LimitReached", "RateLimited", "take"]

#: Seconds between two looks at a limit that no clock makes room in: the first pause, and the longest.
PAUSE, LONGEST_PAUSE = 0.02, 0.5


class LimitError(ValueError):
    """A limit is wrong, or does not fit the task or the call; nothing was sent."""


class LimitReached(TimeoutError):
    """A limit had no room in the time that `take` was given; nothing was taken."""


class Limit:
    """A limit of the jobs that have one name, or one value of the fields in the name.

    Arguments:
        name: the limit's name. ``{field}`` in it stands for an argument of the task: each value has a limit of its own.
        key: called with the arguments of the call, instead of fields: the value, or `None` for a call without limit.
        concurrency: how many of its jobs run at once, in all workers together. A job counts from its claim on.
        rate: how many of its jobs start: ``"60/m"`` as in Celery (s, m, h, also d), or a number a second. In no window
            of that length there are more.
        burst: how many of the rate may start at once. The higher the burst, the slower the rest: see docs/limits.md.
        weight: how much one job counts for; a whole number, or called with the arguments of the call.

    Raises `LimitError` for other values.

    >>> Limit("stripe", rate="60/m", burst=5)
    >>> Limit("account:{account_id}", concurrency=1)
    >>> Limit("tenant", key=lambda order: order["tenant"], concurrency=3)
    """

    def __init__(
        self,
        name: str,
        *,
        key: Callable[..., object] | None = None,
        concurrency: int | None = None,
        rate: str | float | None = None,
        burst: int = 1,
        weight: int | Callable[..., int] = 1,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise LimitError(f"a limit has a name that is a text and not empty, not {name!r}")
        said = f"limit {name!r}"
        try:
            fields = [field for _, field, _, _ in Formatter().parse(name) if field is not None]
        except ValueError as error:
            raise LimitError(f"{said}: {error}; fields are names of arguments, such as {{account_id}}") from None
        names = [field.partition(".")[0].partition("[")[0] for field in fields]
        if any(not one.isidentifier() for one in names):
            raise LimitError(f"{said}: a field needs the name of an argument, such as {{account_id}}")
        if key is not None and (fields or not callable(key)):
            raise LimitError(f"{said}: give fields in its name, or a function as key, not both and nothing else")
        if concurrency is None and rate is None:
            raise LimitError(f"{said} limits nothing: give a concurrency, a rate, or both")
        self.name, self.key, self.weight = name, key, weight
        #: The arguments of the task that the name needs.
        self.fields = tuple(dict.fromkeys(names))
        self.concurrency = None if concurrency is None else _whole(said, "concurrency", concurrency)
        self.rate, self.per = None, 1.0
        if rate is not None:
            try:
                self.rate, self.per = checks.rate(rate)
            except ValueError as error:
                raise LimitError(f"{said}: {error}") from None
        self.burst = _whole(said, "burst", burst)
        if self.burst > (self.rate or 1):
            raise LimitError(f"{said}: a burst is at most the number of its rate, {self.rate or 1}, not {burst!r}")
        if not callable(weight):
            _whole(said, "weight", weight)

    def __repr__(self) -> str:
        rate = f", rate={self.rate}/{self.per:g}s" if self.rate else ""
        concurrency = f", concurrency={self.concurrency}" if self.concurrency else ""
        return f"Limit({self.name!r}{concurrency}{rate})"

    def use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Use | None:
        """Return what a call takes of this limit; `None`: nothing.

        Arguments:
            args, kwargs: of the call.
            arguments: the same by the names of the task's parameters, with their defaults.

        Raises `LimitError` if the call lacks a field.
        """
        if self.key is not None:
            value = self.key(*args, **kwargs)
            if value is None:
                return None
            text = f"{self.name.format()}:{value}"
        else:
            try:
                text = self.name.format_map(arguments)
            except KeyError as error:
                raise LimitError(
                    f"limit {self.name!r}: the call has no {error}; it has {', '.join(arguments) or 'no arguments'}"
                ) from None
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                raise LimitError(f"limit {self.name!r}: the arguments of the call do not fit: {error}") from None
        weight = self.weight(*args, **kwargs) if callable(self.weight) else self.weight
        return self.use_of(text, _whole(f"limit {self.name!r}", "weight", weight))

    def use_of(self, text: str, weight: int = 1) -> Use:
        """Return what a run of *weight* takes of the key *text*."""
        return Use(key_of(text), key_of(self.name), weight, self.concurrency, self.rate, self.per, self.burst)


def _whole(said: str, what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000_000:
        raise LimitError(f"{said}: a {what} is a whole number from 1 to 10**9, not {value!r}")
    return value


class RateLimited(Retry):
    """Raise this in a task when another service refuses calls for a while, such as with HTTP's status 429.

    No job with the limit *key* starts for *retry_after* seconds, in any worker. The task's job waits as long, and runs
    again; this counts as none of its retries.

    >>> answer = requests.post(url)
    >>> if answer.status_code == 429:
    ...     raise RateLimited("stripe", retry_after=30)

    Arguments:
        key: the limit's name with its fields filled in, such as ``stripe`` or ``account:7``.
        retry_after: seconds from 0.

    Raises `LimitError` for other values.
    """

    def __init__(self, key: str, retry_after: float) -> None:
        if not isinstance(key, str) or not key:
            raise LimitError(f"RateLimited: the key of a limit is a text and not empty, not {key!r}")
        if isinstance(retry_after, bool) or not isinstance(retry_after, int | float) or not 0 <= retry_after <= 10**9:
            raise LimitError(f"RateLimited: retry_after is a number of seconds from 0 to 10**9, not {retry_after!r}")
        super().__init__(f"{key} is rate limited for {retry_after:g} s", when=retry_after)
        self.key, self.retry_after = key, float(retry_after)

    def __repr__(self) -> str:
        return f"RateLimited({self.key!r}, retry_after={self.retry_after:g})"

    def __reduce__(self) -> Any:
        return RateLimited, (self.key, self.retry_after)


def signature_of(task: Any) -> inspect.Signature:
    """Return the parameters that calls of *task* fill."""
    return inspect.signature(task.run)


def arguments_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with defaults. Raises `TypeError` if the call does not fit."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for one in signature.parameters.values():
        if one.kind is one.VAR_KEYWORD:
            arguments |= arguments.pop(one.name, {})
    return arguments


def limits_of(task: Any) -> tuple[Limit, ...]:
    """Return the limits of a task's own, as its option ``limits`` says. Raises `LimitError` for a wrong one."""
    found = getattr(task, "limits", None) or ()
    found = (found,) if isinstance(found, Limit) else tuple(found)
    for limit in found:
        if not isinstance(limit, Limit):
            raise LimitError(f"task {task.name}: limits are a list of Limit(…), not of {limit!r}")
        for field, names in lacking(signature_of(task), limit.fields):
            raise LimitError(f"task {task.name}: limit {limit.name!r} names {{{field}}}, and the task has {names}")
    return found


def lacking(signature: inspect.Signature, fields: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each of *fields* that is no argument of *signature*, and for an error text: what its arguments are."""
    names = list(signature.parameters)
    is_open = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    for field in fields:
        if field not in names and not is_open:
            yield field, f"{', '.join(names) or 'no arguments'}{checks.did_you_mean(field, names)}"


@contextmanager
def take(
    limit: Limit, /, *, timeout: float | None = None, app: Celery | None = None, **arguments: Any
) -> Iterator[None]:
    """Take of a limit outside of a task, for a block: such as in a web request that calls the API of a limit.

    >>> with limits.take(Limit("stripe", rate="60/m"), timeout=5):
    ...     stripe.charge(…)

    A rate loses a token; concurrency counts until the block is left, or this process ends. Jobs that wait for the limit
    are not passed: but whoever looks first when there is room has it.

    Arguments:
        limit: the same as on the tasks. Numbers that a worker or an operator has set count more than its own.
        timeout: seconds to wait for room; `None`: as long as it takes; 0: not at all.
        app: default: the current app.
        arguments: values of the limit's fields.

    Raises `LimitReached` without room, and `LimitError` for wrong arguments.
    """
    if not isinstance(limit, Limit):
        raise LimitError(f"take: the first argument is a Limit(…), not {limit!r}")
    is_plain = limit.key is None and not callable(limit.weight)
    if is_plain and (unknown := arguments.keys() - set(limit.fields)):
        raise LimitError(f"take: limit {limit.name!r} has no field {', '.join(map(repr, sorted(unknown)))}")
    if isinstance(timeout, bool) or not (timeout is None or (isinstance(timeout, int | float) and timeout >= 0)):
        raise LimitError(f"take: timeout is a number of seconds from 0, or None, not {timeout!r}")
    use = limit.use((), arguments, arguments)
    if use is None:
        yield
        return
    storage = Storage.for_app(app or current_app._get_current_object())
    node = OwnNode.of(storage)
    with ExitStack() as stack:
        if use.concurrency is not None:  # a slot is in use as long as its node lives
            node.enter()
            stack.callback(node.leave)
        taken = _wait_for(storage, use, timeout, node)
        stack.callback(takers.release, storage.database, taken)
        yield


def _wait_for(storage: Storage, use: Use, timeout: float | None, node: OwnNode) -> takers.Taken:
    until = None if timeout is None else monotonic() + timeout
    pause = PAUSE
    while not isinstance(found := takers.take(storage.database, use, node.id), takers.Taken):
        left = None if until is None else until - monotonic()
        wait = min(pause if found is None else max(found, 0.001), LONGEST_PAUSE)
        if left is not None and left < wait:
            if left <= 0 or found is not None:
                raise LimitReached(f"limit {use.key!r} has no room" + (f" within {timeout:g} s" if timeout else ""))
            wait = left
        sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)
    return found
