"""Limits in an operator's hands: seen, and changed at run time, without a worker."""

from __future__ import annotations

from typing import Any, Literal

from kathikon_celery.settings import checks
from kathikon_celery.storage import Storage, limit_numbers
from kathikon_celery.storage.acts import Act
from kathikon_celery.storage.limit_numbers import KeyStatus, LimitStatus, Numbers

__all__ = ["NONE", "KeyStatus", "LimitStatus", "Limits", "Numbers"]

#: Lifts a part of a limit.
NONE = "none"
_NONE = Literal["none"]


class Limits:
    """The limits of an app. Reached as ``Kathikon(app).limits``.

    >>> kathikon.limits.set("stripe", rate="10/m", reason="they complain")
    >>> kathikon.limits.set("account:{account_id}", concurrency=2)
    >>> kathikon.limits.reset("stripe")

    A limit has a name, as the code says it, and keys: one for each value of the fields in its name. Numbers are for all
    keys of a limit. All workers obey at once. What an operator has set counts until `reset`, whatever the code says
    meanwhile. Lower numbers take nothing from jobs that run.

    Arguments:
        storage: where the limits are.
        operator: who acts, for the record.

    Arguments of the methods:
        name: the limit's name as the code says it, with its fields, such as ``account:{account_id}``.
        reason: why, for the record of acts.

    The methods raise `NotFound` for a limit that no worker has told of, and `ValueError` for a number that is not
    allowed.
    """

    def __init__(self, storage: Storage, operator: str) -> None:
        self._storage, self._operator = storage, operator

    def all(self) -> list[LimitStatus]:
        """Return all limits, by name.

        >>> [(one.name, str(one.numbers), one.in_use, one.blocked) for one in kathikon.limits.all()]
        [('stripe', '60/m', 2, 17)]
        """
        with self._storage.database.read() as connection:
            return limit_numbers.every(connection)

    def get(self, name: str) -> LimitStatus:
        """Return one limit. Raises `NotFound`.

        >>> str(kathikon.limits.get("stripe").numbers)
        '60/m'
        """
        with self._storage.database.read() as connection:
            return limit_numbers.fetch(connection, name)

    def keys(self, name: str, limit: int = 50) -> list[KeyStatus]:
        """Return up to *limit* keys of a limit, those with the most waiting and running jobs first. Raises `NotFound`.

        >>> [(one.key, one.in_use, one.blocked) for one in kathikon.limits.keys("account:{account_id}")]
        [('account:7', 1, 12), ('account:9', 1, 0)]
        """
        with self._storage.database.read() as connection:
            return limit_numbers.keys_of(connection, name, limit)

    def set(
        self,
        name: str,
        *,
        concurrency: int | _NONE | None = None,
        rate: str | float | None = None,
        burst: int | None = None,
        reason: str | None = None,
    ) -> LimitStatus:
        """Let these numbers count for a limit, in all workers at once; return the limit as it is then.

        What is not given stays as it counts now. Jobs that there is room for then are let out at once.

        >>> kathikon.limits.set("stripe", concurrency=0, reason="stripe is down")
        >>> kathikon.limits.set("stripe", concurrency="none", rate="30/m", burst=5)

        Arguments:
            concurrency: how many of its jobs run at once; 0: no job starts; ``"none"``: any number.
            rate: as in ``"60/m"``, or a number a second; ``"none"``: any number.
            burst: how many of the rate may start at once.

        Raises `NotFound`, and `ValueError` for another number or without one.
        """
        given = numbers_of(concurrency, rate, burst)
        if not given:
            raise ValueError("say what to set: a concurrency, a rate, or a burst")
        said = [
            f"{word} {value}"
            for word, value in (("concurrency", concurrency), ("rate", rate), ("burst", burst))
            if value is not None
        ]
        act = Act(verb="limit", target=f"limit {name}: {', '.join(said)}", operator=self._operator, reason=reason)
        self._storage.backend.set_limit(name, given, act)
        return self.get(name)

    def reset(self, name: str, reason: str | None = None) -> bool:
        """Let the code's numbers count again; return false if they count already. Raises `NotFound`.

        >>> kathikon.limits.reset("stripe", reason="they are well again")
        True
        """
        act = Act(verb="unlimit", target=f"limit {name}", operator=self._operator, reason=reason)
        return self._storage.backend.reset_limit(name, act)


def numbers_of(concurrency: Any = None, rate: Any = None, burst: Any = None) -> dict[str, int | float | None]:
    """Return what is given as columns. Raises `ValueError`, which says what is allowed."""
    given: dict[str, int | float | None] = {}
    if concurrency is not None:
        given["concurrency"] = _whole("concurrency", concurrency, 0)
    if _is_none(rate):
        given |= {"rate": None, "per": 1.0}
    elif rate is not None:
        try:
            given["rate"], given["per"] = checks.rate(rate)
        except ValueError as error:
            raise ValueError(f"a rate is {error}; or {NONE!r}") from None
    if burst is not None:
        given["burst"] = 1 if _is_none(burst) else _whole("burst", burst, 1)
    return given


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() == NONE


def _whole(what: str, value: Any, low: int) -> int | None:
    if _is_none(value):
        return None
    try:
        return checks.whole_number(low, checks.LARGEST)(value)
    except ValueError as error:
        raise ValueError(f"a {what} is {error}, or {NONE!r}, not {value!r}") from None
