"""``celery -A proj kathikon …``: what Kathikon adds to Celery's command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import kathikon_celery.hook  # noqa: F401 (adds our parts to a worker that imports this module)
from kathikon_celery.job import State
from kathikon_celery.settings import mask, shown
from kathikon_celery.settings.brokers import broker_of, broker_urls, is_kathikon
from kathikon_celery.storage import Storage, nodes, schema

if TYPE_CHECKING:
    from celery.bin.base import CLIContext

#: Widest queue column, in characters; a longer name makes only its own line longer.
WIDEST = 60
#: The states of a job that still needs a worker.
WAITING = {State.AVAILABLE, State.SCHEDULED, State.RETRYABLE}
#: Shown as the queue of rows that are only a result, such as that of a chord's body that never ran.
NO_QUEUE = "(none)"


def _storage(context: CLIContext) -> Storage:
    app = context.app
    broker = broker_of(app.conf)
    if not is_kathikon(broker):
        brokers = ";".join(map(mask, broker_urls(broker)))
        raise click.ClickException(
            f"the broker of {app.main!r} is {brokers!r}, not Kathikon;"
            ' say app.config_from_object("kathikon_celery.config"), and name the app: celery -A proj kathikon …'
        )
    return Storage.for_app(app, setup=False)


def _legible(name: str) -> str:
    """Return *name* with its unprintable characters escaped."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in name)


@click.group(name="kathikon")
def kathikon() -> None:
    """Look after the tables that the jobs live in."""


@kathikon.command(name="schema")
@click.option("--sql", is_flag=True, help="Print the SQL instead, for the app's kind of database; it is not reached.")
@click.option("--since", metavar="VERSION", help="With --sql: only what came after that version of the schema.")
@click.pass_obj
def schema_command(context: CLIContext, sql: bool, since: str | None) -> None:
    """Make the tables, or upgrade them. Workers and producers do so by themselves as well."""
    if since and not sql:
        raise click.UsageError("--since goes with --sql: without it the version is read from the database.")
    storage = _storage(context)
    if sql:
        click.echo(schema.ddl(storage.database.url, since, storage.settings.schema), nl=False)
        return
    storage.setup()
    click.echo(f"The schema of {shown(storage.database.url)} has version {schema.HEAD}.")


@kathikon.command()
@click.pass_obj
def counts(context: CLIContext) -> None:
    """Count the jobs by queue and state, and name the queues whose jobs wait without a worker."""
    storage = _storage(context)
    storage.setup()
    counted = storage.counts()
    found = [(_legible(queue) or NO_QUEUE, state, f"{number:,}") for (queue, state), number in sorted(counted.items())]
    if not found:
        click.echo("There are no jobs.")
        return
    rows = [("queue", "state", "jobs"), *found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    queue_width, state_width, number_width = min(widths[0], WIDEST), *widths[1:]
    for queue, state, number in rows:
        click.echo(f"{queue:<{queue_width}}  {state:<{state_width}}  {number:>{number_width}}")
    waiting = {queue for queue, state in counted if queue and state in WAITING}
    with storage.database.read() as connection:
        left = nodes.without_consumer(sorted(waiting), nodes.consumed(connection))
    if left:
        click.echo(f"No worker consumes {', '.join(map(_legible, left))}.", err=True)
