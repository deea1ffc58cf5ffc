"""Commands for the tables as a whole: ``schema`` and ``counts``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kathikon_celery.cli.common import legible, show_table, storage_of
from kathikon_celery.cli.group import kathikon
from kathikon_celery.job import State
from kathikon_celery.settings import shown
from kathikon_celery.storage import nodes, schema

if TYPE_CHECKING:
    from celery.bin.base import CLIContext

#: The states of a job that still needs a worker.
WAITING = {State.AVAILABLE, State.BLOCKED, State.SCHEDULED, State.RETRYABLE}
#: Shown as the queue of rows that are only a result, such as that of a chord's body that never ran.
NO_QUEUE = "(none)"


@kathikon.command(name="schema")
@click.option("--sql", is_flag=True, help="Print the SQL instead, for the app's kind of database; it is not reached.")
@click.option("--since", metavar="VERSION", help="With --sql: only what came after that version of the schema.")
@click.pass_obj
def schema_command(context: CLIContext, sql: bool, since: str | None) -> None:
    """Make the tables, or upgrade them. Workers and producers do so by themselves as well."""
    if since and not sql:
        raise click.UsageError("--since goes with --sql: without it the version is read from the database.")
    storage = storage_of(context)
    if sql:
        if ddl := schema.ddl(storage.database.url, since, storage.settings.schema):
            click.echo(f"-- Kathikon {schema.HEAD} for the database {shown(storage.database.url)}")
            click.echo(ddl, nl=False)
        return
    storage.setup()
    click.echo(f"The schema of {shown(storage.database.url)} has version {schema.HEAD}.")


@kathikon.command()
@click.pass_obj
def counts(context: CLIContext) -> None:
    """Count the jobs by queue and state, and name the queues whose jobs wait without a worker."""
    storage = storage_of(context)
    storage.setup()
    counted = storage.counts()
    found = [(legible(queue) or NO_QUEUE, state, f"{number:,}") for (queue, state), number in sorted(counted.items())]
    if not found:
        click.echo("There are no jobs.")
        return
    show_table([("queue", "state", "jobs"), *found], right=frozenset({2}))
    waiting = {queue for queue, state in counted if queue and state in WAITING}
    with storage.database.read() as connection:
        left = nodes.without_consumer(sorted(waiting), nodes.consumed(connection))
    if left:
        click.echo(f"No worker consumes {', '.join(map(legible, left))}.", err=True)
