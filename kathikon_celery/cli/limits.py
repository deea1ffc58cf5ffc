"""Commands for limits: ``limits`` lists them, ``limit`` changes one at run time."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from kathikon_celery.cli.acting import BY, REASON
from kathikon_celery.cli.common import AS_JSON, legible, print_json, show_table, storage_of
from kathikon_celery.cli.group import kathikon
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.operate.limits import KeyStatus, LimitStatus
from kathikon_celery.storage.errors import NotFound
from kathikon_celery.storage.limit_numbers import MOST
from kathikon_celery.storage.status import capped

if TYPE_CHECKING:
    from celery.bin.base import CLIContext


@kathikon.command(name="limits")
@click.option("--keys", "name", metavar="NAME", help="List the keys of that limit, the fullest first.")
@click.option("--limit", "most", default=50, show_default=True, type=click.IntRange(1), help="How many keys at most.")
@AS_JSON
@click.pass_obj
def limits_command(context: CLIContext, name: str | None, most: int, as_json: bool) -> None:
    """List the limits: their numbers, who has set them, what is in use, and how many jobs wait."""
    hands = Kathikon(storage_of(context)).limits
    if name is not None:
        keys = _try(lambda: hands.keys(name, most))
        print_json([asdict(one) for one in keys]) if as_json else _show_keys(keys)
        return
    found = hands.all()
    if as_json:
        print_json([as_dict(one) for one in found])
    elif found:
        _show(found)
    else:
        click.echo("No worker has told of any limit.")


def as_dict(one: LimitStatus) -> dict[str, Any]:
    """Return a limit for JSON."""
    row = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(one).items()}
    return {**row, "at_most": MOST}


def _show(found: list[LimitStatus]) -> None:
    rows: list[tuple[str, ...]] = [("limit", "numbers", "keys", "in use", "blocked", "next", "of the code", "set by")]
    for one in found:
        numbers = (capped(one.keys), f"{one.in_use:,}", capped(one.blocked), _seconds(one.next_in))
        code, by = ("", "") if one.of_operator is None else (str(one.of_code), _who(one))
        rows.append((legible(one.name), str(one.numbers), *numbers, code, legible(by)))
    show_table(rows, right=frozenset({2, 3, 4, 5}))


def _who(one: LimitStatus) -> str:
    return f"{one.operator}{f': {one.reason}' if one.reason else ''}"


def _show_keys(keys: list[KeyStatus]) -> None:
    if not keys:
        click.echo("No key of that limit has been used lately.")
        return
    rows: list[tuple[str, ...]] = [("key", "in use", "blocked", "next", "state")]
    for one in keys:
        numbers = (f"{one.in_use:,}", capped(one.blocked), _seconds(one.next_in))
        rows.append((legible(one.key), *numbers, str(one)))
    show_table(rows, right=frozenset({1, 2, 3}))


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{max(0.0, seconds):.1f}s"


@kathikon.group()
def limit() -> None:
    """Change the numbers of a limit. Workers obey at once; what runs goes on."""


@limit.command(name="set")
@click.argument("name")
@click.option("--concurrency", metavar="N", help="How many jobs run at once; 0: none starts; none: any number.")
@click.option("--rate", metavar="RATE", help="How many jobs start in a time, such as 60/m; none: any number.")
@click.option("--burst", metavar="N", help="How many of the rate may start at once.")
@REASON
@BY
@click.pass_obj
def set_command(context: CLIContext, /, name: str, operator: str | None, **given: Any) -> None:
    """Let these numbers count for the limit NAME until it is reset. What is not said stays as it counts."""
    if all(given[one] is None for one in ("concurrency", "rate", "burst")):
        raise click.UsageError("Say what to set: --concurrency N, --rate 60/m, or --burst N.")
    hands = Kathikon(storage_of(context), operator).limits
    _show([_try(lambda: hands.set(name, **given))])


@limit.command(name="reset")
@click.argument("names", nargs=-1, required=True)
@REASON
@BY
@click.pass_obj
def reset_command(
    context: CLIContext, /, names: tuple[str, ...], reason: str | None, operator: str | None
) -> None:  # numpydoc ignore
    """Let the numbers of the code count again."""
    hands = Kathikon(storage_of(context), operator).limits
    for name in names:
        was_set = _try(lambda name=name: hands.reset(name, reason))
        click.echo(f"{legible(name)}: {'reset' if was_set else 'the numbers of the code count already'}.")


def _try(call: Any) -> Any:
    try:
        return call()
    except (ValueError, NotFound) as error:
        raise click.ClickException(str(error)) from error
