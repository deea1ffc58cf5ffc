"""Commands for schedules: ``schedules`` lists them, ``schedule`` changes one."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from celery.schedules import crontab

from kathikon_celery import frameworks
from kathikon_celery.cli.acting import BY, REASON
from kathikon_celery.cli.common import AS_JSON, legible, print_json, show_table, storage_of
from kathikon_celery.cli.group import kathikon
from kathikon_celery.cli.jobs import Moment
from kathikon_celery.cli.queues import Age
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.operate.schedules import as_dict, lag
from kathikon_celery.schedules import imports
from kathikon_celery.schedules.following import Kept
from kathikon_celery.schedules.options import json_of
from kathikon_celery.schedules.ticking import MISSED, OVERLAP
from kathikon_celery.schedules.timetable import crontab_of, in_words
from kathikon_celery.storage.errors import NotFound

if TYPE_CHECKING:
    from celery.bin.base import CLIContext


class Crontab(click.ParamType):  # type: ignore[type-arg]
    """Five fields, as in a crontab."""

    name = "CRONTAB"

    def convert(self, value: Any, param: Any, ctx: Any) -> crontab:
        """Return Celery's crontab."""
        if isinstance(value, crontab):
            return value
        try:
            return crontab_of(value)
        except ValueError as error:
            self.fail(str(error))


class Json(click.ParamType):  # type: ignore[type-arg]
    """A value in JSON."""

    name = "JSON"

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value."""
        if isinstance(value, self._kind):
            return value
        try:
            return json_of(value, self._kind)
        except ValueError as error:
            self.fail(str(error))


TIMING = [
    click.option("--every", type=Age(), help="A time between ticks, such as 10s or 2h."),
    click.option("--crontab", "fields", type=Crontab(), help="Five fields: minute hour day month weekday."),
    click.option("--zone", help="The time zone of a crontab, such as Europe/Berlin."),
    click.option("--args", type=Json(list), help="Arguments, a list in JSON."),
    click.option("--kwargs", type=Json(dict), help="Keyword arguments, an object in JSON."),
    click.option("--options", type=Json(dict), help="Options of apply_async, an object in JSON."),
    click.option("--missed", type=click.Choice(MISSED), help="What is sent of missed ticks."),
    click.option("--grace", type=float, help="Seconds for which a missed tick is still sent."),
    click.option("--overlap", type=click.Choice(OVERLAP), help="If the job before has not ended."),
    click.option("--jitter", type=float, help="Seconds; each tick is sent up to so much later."),
    click.option("--max-runs", type=int, help="How many ticks are sent in all."),
    click.option("--starts-at", type=Moment(is_past=False), help="No tick before."),
    click.option("--ends-at", type=Moment(is_past=False), help="No tick after."),
]


@kathikon.command(name="schedules")
@AS_JSON
@click.pass_obj
def schedules_command(context: CLIContext, as_json: bool) -> None:
    """List the schedules: next and last tick, how late it was sent, the last job, missed ticks."""
    operator = Kathikon(storage_of(context))
    found = operator.schedules.every()
    if as_json:
        print_json([as_dict(one) for one in found])
        return
    if not found:
        click.echo("There are no schedules.")
        return
    rows: list[tuple[str, ...]] = [
        ("name", "task", "when", "next (UTC)", "last (UTC)", "late", "runs", "skipped", "last job", "note")
    ]
    for one in found:
        late = lag(one)
        note = "paused" if one.paused else (one.problem or ("changed" if one.is_changed else ""))
        note = note or ("over" if one.next_at is None else "")
        cells = (one.name, one.task, in_words(one.timing, one.zone), _at(one.next_at), _at(one.last_tick))
        numbers = (f"{late.total_seconds():.3f}" if late is not None else "", str(one.runs), str(one.skipped))
        rows.append(tuple(map(legible, (*cells, *numbers, one.last_job or "", note))))
    show_table(rows, right=frozenset({5, 6, 7}))


def _at(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone(timezone.utc).isoformat(" ", "seconds")[:19]


@kathikon.group()
def schedule() -> None:
    """Add or change a schedule. Workers obey at once."""


def timing(command: Any) -> Any:
    """Add the options that say when and what."""
    for option in reversed([*TIMING, REASON, BY]):
        command = option(command)
    return command


def _given(every: timedelta | None, fields: crontab | None, options: dict[str, Any]) -> dict[str, Any]:
    if every is not None and fields is not None:
        raise click.UsageError("Say either --every or --crontab.")
    when = {} if every is None and fields is None else {"schedule": every if every is not None else fields}
    return when | {name: value for name, value in options.items() if value is not None}


@schedule.command()
@click.argument("name")
@click.argument("task")
@timing
@click.pass_obj
def add(
    context: CLIContext, /, name: str, task: str, every: timedelta | None, fields: crontab | None, **options: Any
) -> None:
    """Add a schedule NAME that sends TASK, or replace one that was added so."""
    operator = Kathikon(_app(context), options.pop("operator"))
    given = _given(every, fields, options)
    if "schedule" not in given:
        raise click.UsageError("Say when: --every 10s or --crontab '0 6 * * *'.")
    was_there = _try(lambda: operator.schedules.add(name, task, given.pop("schedule"), **given))
    click.echo(f"{'Replaced' if was_there else 'Added'} {legible(name)}.")


@schedule.command()
@click.argument("name")
@timing
@click.pass_obj
def change(context: CLIContext, /, name: str, every: timedelta | None, fields: crontab | None, **options: Any) -> None:
    """Change a schedule. An entry of the code stays changed, until it is reset."""
    operator = Kathikon(_app(context), options.pop("operator"))
    given = _given(every, fields, options)
    if not given.keys() - {"reason"}:
        raise click.UsageError("Say what to change.")
    _try(lambda: operator.schedules.change(name, **given))
    click.echo(f"Changed {legible(name)}.")


def _verb(verb: str, done: str, text: str) -> None:
    @schedule.command(name=verb, help=text)
    @click.argument("names", nargs=-1, required=True)
    @REASON
    @BY
    @click.pass_obj
    def command(
        context: CLIContext, /, names: tuple[str, ...], reason: str | None, operator: str | None
    ) -> None:  # numpydoc ignore
        hands = Kathikon(_app(context), operator).schedules
        failures = 0
        for name in names:
            try:
                _try(lambda name=name: getattr(hands, verb)(name, reason=reason))
                click.echo(f"{done} {legible(name)}.")
            except click.ClickException as error:
                error.show()
                failures += 1
        if failures:
            raise SystemExit(1)


_verb("pause", "Paused", "Send no ticks until resume.")
_verb("resume", "Resumed", "Go on with the first tick from now on.")
_verb("remove", "Removed", "Delete schedules.")
_verb("reset", "Reset", "Undo changes of entries of the code.")


@schedule.command()
@click.argument("name")
@REASON
@BY
@click.pass_obj
def run(context: CLIContext, /, name: str, reason: str | None, operator: str | None) -> None:
    """Send the task of a schedule once, beside its ticks; print the job's id."""
    hands = Kathikon(_app(context), operator).schedules
    click.echo(_try(lambda: hands.run_now(name, reason=reason)))


@schedule.command()
@click.argument("name")
@click.option("--since", type=Moment(), required=True, help="After that: an age such as 12h, or a moment in UTC.")
@click.option("--until", type=Moment(), required=True, help="Up to that moment.")
@REASON
@BY
@click.pass_obj
def backfill(
    context: CLIContext, /, name: str, since: datetime, until: datetime, reason: str | None, operator: str | None
) -> None:
    """Send ticks of the past that were not sent."""
    hands = Kathikon(_app(context), operator).schedules
    click.echo(f"Sent {len(_try(lambda: hands.backfill(name, since, until, reason=reason)))} ticks.")


@schedule.command(name="import")
@click.argument("source")
@click.option("--prefix", default="redbeat:", show_default=True, help="Of RedBeat's keys.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@REASON
@BY
@click.pass_obj
def import_command(
    context: CLIContext, /, source: str, prefix: str, dry_run: bool, reason: str | None, operator: str | None
) -> None:
    """Add the schedules of another scheduler, which is stopped.

    SOURCE is django-celery-beat, the URL of RedBeat's Redis, or the path of a file that Celery's beat has written. Such
    a file is a pickle: use your own only.
    """
    app, bad = _app(context), {}  # type: tuple[Any, dict[str, str]]
    kept: Iterable[Kept]
    if source == "django-celery-beat":
        kept = _try(lambda: frameworks.periodic_tasks(app, bad))
    elif "://" in source:
        kept = imports.of_redbeat(source, prefix, app.timezone, bad)
    else:
        kept = imports.of_beat_file(Path(source), app.timezone, bad)
    hands = Kathikon(app, operator).schedules
    done = _try(lambda: hands.take_over(kept, reason=reason, dry_run=dry_run))
    rows = [("name", "result"), *sorted(done.items()), *((name, f"left out: {why}") for name, why in bad.items())]
    show_table([tuple(map(legible, row)) for row in rows])
    if bad:
        raise SystemExit(1)


def _app(context: CLIContext) -> Any:
    storage_of(context)  # or an error: the app's broker is another
    return context.app


def _try(call: Any) -> Any:
    try:
        return call()
    except (ValueError, TypeError, OverflowError, NotFound) as error:
        raise click.ClickException(str(error)) from error
