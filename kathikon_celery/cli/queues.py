"""Commands for queues and the fleet: what there is, pauses, the record of operators' acts, and probes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kathikon_celery.cli.acting import BY, REASON
from kathikon_celery.cli.common import AS_JSON, complete_queues, legible, print_json, show_table, storage_of
from kathikon_celery.cli.group import kathikon
from kathikon_celery.cli.jobs import Moment, age_of
from kathikon_celery.job import State
from kathikon_celery.operate.health import check
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.storage.pauses import Pause
from kathikon_celery.storage.status import MOST, WINDOW, QueueStatus, Status, capped

if TYPE_CHECKING:
    from celery.bin.base import CLIContext

F = TypeVar("F", bound=Callable[..., Any])


class Age(click.ParamType):  # type: ignore[type-arg]
    """A time such as ``90s``, ``10m`` or ``2h``."""

    name = "AGE"

    def convert(self, value: Any, param: Any, ctx: Any) -> timedelta:
        """Return the time."""
        if isinstance(value, timedelta):
            return value
        try:
            age = age_of(value)
        except OverflowError:
            self.fail(f"{value!r} is too long a time")
        if age is None:
            self.fail(f"{value!r} is no time such as 90s, 10m, 2h or 3d")
        return age


# --- what there is


@kathikon.command()
@AS_JSON
@click.pass_obj
def queues(context: CLIContext, as_json: bool) -> None:
    """Show each queue that has jobs, workers or a pause."""
    status = Kathikon(storage_of(context)).status()
    if as_json:
        print_json([_as_dict(one) for one in status.queues])
    elif status.queues:
        _show_queues(status)
    else:
        click.echo("There are no jobs, workers or pauses.")


@kathikon.command()
@click.option(
    "--interval", default=2.0, show_default=True, type=click.FloatRange(0.2), help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Look once, and end.")
@AS_JSON
@click.pass_obj
def top(context: CLIContext, interval: float, once: bool, as_json: bool) -> None:
    """Show queues, workers and running jobs, again and again, until Ctrl-C. With --json: a line for each look."""
    operator = Kathikon(storage_of(context))
    while True:
        status = operator.status()
        running = operator.jobs(State.RUNNING).page(10)
        if as_json:
            click.echo(_as_line(status))
        else:
            if not once:
                click.clear()
            _show_top(status, running)
        if once:
            return
        time.sleep(interval)


def _show_top(status: Status, running: list[Any]) -> None:
    lately = ", ".join(f"{capped(number)} {state}" for state, number in sorted(status.ended.items()) if number)
    click.echo(f"{status.workers} workers; ended in the last {WINDOW:g} s: {lately or 'none'}")
    click.echo()
    if status.queues:
        _show_queues(status)
    for job in running:
        since = job.started_at.isoformat(" ", "seconds")[:19] if job.started_at else "?"
        click.echo(f"running since {since}: {legible(job.task)} {legible(job.id)} on node {job.node_id}")


def _show_queues(status: Status) -> None:
    rows: list[tuple[str, ...]] = [
        ("queue", "ready", "oldest", "blocked", "scheduled", "claimed", "running", "dead", "workers", "paused")
    ]
    for one in status.queues:
        numbers = (one.blocked, one.scheduled, one.claimed, one.running, one.dead)
        oldest = "" if one.oldest is None else _age(one.oldest)
        workers = "?" if one.workers is None else str(one.workers)
        paused = "" if one.paused is None else _until(one.paused)
        rows.append((legible(one.name), capped(one.ready), oldest, *map(capped, numbers), workers, paused))
    show_table(rows, right=frozenset(range(1, 9)))
    for pause in status.pauses:
        click.echo(legible(str(pause)))


def _age(seconds: float) -> str:
    if seconds < 60:
        return f"{max(0.0, seconds):.1f}s"
    return f"{seconds / 60:.0f}m" if seconds < 7200 else f"{seconds / 3600:.1f}h"


def _until(pause: Pause) -> str:
    return "yes" if pause.until is None else f"until {pause.until.isoformat(' ', 'seconds')[:19]}"


def _as_dict(one: QueueStatus) -> dict[str, Any]:
    row = asdict(one)
    row["paused"] = None if one.paused is None else _pause_as_dict(one.paused)
    row["at_most"] = MOST
    return row


def _pause_as_dict(pause: Pause) -> dict[str, Any]:
    row = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(pause).items()}
    return {**row, "kind": pause.kind.value}


def _as_line(status: Status) -> str:
    ended = {state.value: number for state, number in status.ended.items()}
    queues = [_as_dict(one) for one in status.queues]
    return json.dumps({"workers": status.workers, "ended": ended, "window": WINDOW, "queues": queues})


# --- pauses


def pausing(command: F) -> F:
    """Add what says what to pause or to resume."""
    for option in (
        BY,
        REASON,
        click.option("--all", "everything", is_flag=True, help="Everything."),
        click.option("--task", "tasks", multiple=True, metavar="PATTERN", help="A task; * and ? as in jobs --task."),
        click.option("--queue", "queues", multiple=True, help="A queue.", shell_complete=complete_queues),
    ):
        command = option(command)
    return command


@kathikon.command()
@pausing
@click.option("--for", "age", type=Age(), help="The pause ends by itself after that time, such as 30m.")
@click.option("--until", type=Moment(is_past=False), help="The pause ends by itself at that moment in UTC.")
@click.pass_obj
def pause(
    context: CLIContext, /, age: timedelta | None, until: datetime | None, reason: str | None, **options: Any
) -> None:
    """Keep all workers from starting jobs of queues or tasks. What runs goes on; what waits keeps its place."""
    if age is not None and until is not None:
        raise click.UsageError("Say either --for or --until.")
    operator = Kathikon(storage_of(context), options.pop("operator"))
    for verb, name in _chosen("pause", **options):
        try:
            getattr(operator, f"pause_{verb}")(*name, until=until if age is None else age, reason=reason)
        except (ValueError, OverflowError) as error:
            raise click.UsageError(str(error)) from None
    _show_pauses(operator.pauses())


@kathikon.command()
@pausing
@click.pass_obj
def resume(context: CLIContext, /, reason: str | None, **options: Any) -> None:
    """End pauses. A pause of everything ends by --all alone, which leaves the pauses of queues and tasks."""
    operator = Kathikon(storage_of(context), options.pop("operator"))
    failures = 0
    for verb, name in _chosen("resume", **options):
        if not getattr(operator, f"resume_{verb}")(*name, reason=reason):
            what = f"{verb} {name[0]!r}" if name else "everything"
            click.echo(f"Error: {what} is not paused", err=True)
            failures += 1
    _show_pauses(operator.pauses())
    if failures:
        raise SystemExit(1)


def _chosen(
    verb: str, queues: tuple[str, ...], tasks: tuple[str, ...], everything: bool
) -> list[tuple[str, tuple[str, ...]]]:
    chosen: list[tuple[str, tuple[str, ...]]] = []
    chosen += [("queue", (name,)) for name in queues] + [("task", (name,)) for name in tasks]
    if everything:
        chosen.append(("all", ()))
    if not chosen or not all(name != ("",) for _, name in chosen):
        raise click.UsageError(f"Say what to {verb}: --queue NAME, --task PATTERN, or --all.")
    return chosen


@kathikon.command()
@AS_JSON
@click.pass_obj
def pauses(context: CLIContext, as_json: bool) -> None:
    """List what is paused, by whom, and why."""
    found = Kathikon(storage_of(context)).pauses()
    if as_json:
        print_json([_pause_as_dict(one) for one in found])
    else:
        _show_pauses(found)


def _show_pauses(found: list[Pause]) -> None:
    for one in found:
        click.echo(legible(str(one)))
    if not found:
        click.echo("Nothing is paused.")


# --- the record, and probes


@kathikon.command()
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="How many at most.")
@AS_JSON
@click.pass_obj
def acts(context: CLIContext, limit: int, as_json: bool) -> None:
    """List what operators did, the newest first. An act without an end goes on, or was interrupted."""
    found = Kathikon(storage_of(context)).acts(limit)
    if as_json:
        rows = [asdict(one) for one in found]
        print_json([{k: v.isoformat() if isinstance(v, datetime) else v for k, v in row.items()} for row in rows])
        return
    table: list[tuple[str, ...]] = [("began", "by", "verb", "jobs", "ended", "target", "reason")]
    for one in found:
        began, ended = (at.isoformat(" ", "seconds")[:19] if at else "no" for at in (one.began_at, one.ended_at))
        cells = (began, one.operator, one.verb, f"{one.changed:,}", ended[11:] or ended, one.target, one.reason or "")
        table.append(tuple(map(legible, cells)))
    show_table(table, right=frozenset({3}))


@kathikon.command()
@click.option("--min-workers", default=0, show_default=True, type=click.IntRange(0), help="Fewer living workers fail.")
@click.option("--max-age", type=Age(), help="A job that is ready for longer, and not paused, fails: such as 10m.")
@click.option("--queue", "names", multiple=True, help="Look at these queues only.", shell_complete=complete_queues)
@click.option("--max-lag", type=Age(), help="A schedule whose tick is late by more fails: such as 1m.")
@AS_JSON
@click.pass_obj
def health(
    context: CLIContext,
    min_workers: int,
    max_age: timedelta | None,
    names: tuple[str, ...],
    max_lag: timedelta | None,
    as_json: bool,
) -> None:
    """Check database, schema, workers, the age of ready jobs, and schedules; exit code 1 if something is wrong."""
    report = check(storage_of(context), min_workers, max_age, names, max_lag)
    if as_json:
        print_json(asdict(report))
    else:
        for line in str(report).split("\n"):
            click.echo(legible(line))
    if report.problems:
        raise SystemExit(1)
