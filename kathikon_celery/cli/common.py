"""What the commands share: the app's storage, options, completions, and tables that fit a terminal."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click
from celery.app.utils import find_app

from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.settings import mask
from kathikon_celery.settings.brokers import broker_of, broker_urls, is_kathikon
from kathikon_celery.storage import Storage

if TYPE_CHECKING:
    from celery.bin.base import CLIContext

#: Widest column of names, in characters; a longer name makes only its own line longer.
WIDEST = 60


def storage_of(context: CLIContext) -> Storage:
    """Return the storage of the command's app, whose tables may not be there yet."""
    app = context.app
    broker = broker_of(app.conf)
    if not is_kathikon(broker):
        brokers = ";".join(map(mask, broker_urls(broker)))
        raise click.ClickException(
            f"the broker of {app.main!r} is {brokers!r}, not Kathikon;"
            ' say app.config_from_object("kathikon_celery.config"), and name the app: celery -A proj kathikon …'
        )
    return Storage.for_app(app, setup=False)


AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(value: Any) -> None:
    """Print *value* as JSON."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _completing(ctx: Any) -> Kathikon | None:
    """Return the app's jobs for a completion; `None` if there is no such app or database."""
    with suppress(Exception):
        app = (ctx.find_root().params or {}).get("app") or os.environ.get("CELERY_APP")
        if app is not None:
            app = find_app(app) if isinstance(app, str) else app
            storage = Storage.for_app(app, setup=False)
            storage.database.connect_timeout = 1.0
            return Kathikon(storage)
    return None


def complete_ids(ctx: Any, param: Any, incomplete: str) -> list[str]:
    """Return ids of the newest jobs that begin with *incomplete*, for the shell's completion."""
    with suppress(Exception):
        if (operator := _completing(ctx)) is not None:
            return [job.id for job in operator.jobs().page(200) if job.id.startswith(incomplete)]
    return []


def complete_queues(ctx: Any, param: Any, incomplete: str) -> list[str]:
    """Return names of queues that begin with *incomplete*, for the shell's completion."""
    with suppress(Exception):
        if (operator := _completing(ctx)) is not None:
            return [one.name for one in operator.queue_status() if one.name.startswith(incomplete)]
    return []


def legible(name: str) -> str:
    """Return *name* with its unprintable characters escaped."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in name)


def show_table(rows: list[tuple[str, ...]], right: frozenset[int] = frozenset()) -> None:
    """Print *rows*, of which the first has the names of the columns. *right*: numbers of columns that end together."""
    last = len(rows[0]) - 1
    widths = [min(max(map(len, column)), WIDEST) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if number in right else f"{cell:<{width}}" if number < last else cell
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells))
