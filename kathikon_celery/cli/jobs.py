"""Commands that read jobs: ``jobs``, ``show``, ``explain`` and ``history``; and the options that select jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kathikon_celery.cli.common import (
    AS_JSON,
    complete_ids,
    complete_queues,
    legible,
    print_json,
    show_table,
    storage_of,
)
from kathikon_celery.cli.group import kathikon
from kathikon_celery.job import Cause, Job, State
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.operate.selection import Selection
from kathikon_celery.storage.errors import NotFound

if TYPE_CHECKING:
    from celery.bin.base import CLIContext

F = TypeVar("F", bound=Callable[..., Any])

#: `jobs --count` counts no further without `--exact`.
MOST = 10_000
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def age_of(text: str) -> timedelta | None:
    """Return a time such as ``90m``; `None` for another text. Raises `OverflowError` for too long a time."""
    found = re.fullmatch(r"(\d+)([smhdw])", text)
    return None if found is None else timedelta(**{UNITS[found[2]]: int(found[1])})


class Moment(click.ParamType):  # type: ignore[type-arg]
    """A moment in ISO's form, or an age such as ``90m``."""

    name = "MOMENT"

    def __init__(self, is_past: bool = True) -> None:
        self._is_past = is_past

    def convert(self, value: Any, param: Any, ctx: Any) -> datetime:
        """Return the moment. An age counts back from now by this machine's clock; without a time zone it is UTC."""
        if isinstance(value, datetime):
            return value
        try:
            if self._is_past and (age := age_of(value)) is not None:
                return datetime.now(timezone.utc) - age
        except OverflowError:
            self.fail(f"{value!r} is too long ago")
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            age_too = "neither a moment such as 2026-01-31T12:00 (UTC) nor an age such as 90m, 12h or 3d"
            self.fail(f"{value!r} is {age_too if self._is_past else 'no moment such as 2026-01-31T12:00 (UTC)'}")
        return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


STATES, CAUSES = ([member.value for member in kind] for kind in (State, Cause))
SELECTING = [
    click.option(
        "--state",
        "states",
        multiple=True,
        type=click.Choice(STATES),
        help="May be given several times.",
    ),
    click.option("--queue", help="The queue's name.", shell_complete=complete_queues),
    click.option("--task", metavar="PATTERN", help="The task's name; * and ? stand for any characters, or for one."),
    click.option("--error", metavar="PATTERN", help="The reason of a job's end, as in 'Timeout*'."),
    click.option("--cause", type=click.Choice(CAUSES), help="Why a job has ended."),
    click.option("--argument", metavar="PATTERN", help="In the arguments as JSON, as in '\"user_id\": 42'."),
    click.option("--root", metavar="ID", help="The workflow that began with this job."),
    click.option("--group", metavar="ID", help="The group."),
    click.option("--since", type=Moment(), help="Published then or later: an age such as 12h, or a moment in UTC."),
    click.option("--until", type=Moment(), help="Published before."),
    click.option("--ended-since", type=Moment(), help="Ended then or later."),
    click.option("--ended-until", type=Moment(), help="Ended before."),
]


def chosen(operator: Kathikon, fields: dict[str, Any]) -> Selection:
    """Return the selection that the options say."""
    try:
        return operator.jobs(**fields)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def selecting(command: F) -> F:
    """Add the options of a selection to *command*."""
    for option in reversed(SELECTING):
        command = option(command)
    return command


@kathikon.command(name="jobs")
@selecting
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="How many jobs at most.")
@click.option("--after", metavar="ID", help="Go on behind this job, the last one of the page before.")
@click.option("--count", "only_count", is_flag=True, help=f"Print only the number of jobs, up to {MOST:,}+.")
@click.option("--exact", is_flag=True, help="With --count: count them all, however many there are.")
@AS_JSON
@click.pass_obj
def jobs_command(
    context: CLIContext,
    /,
    limit: int,
    after: str | None,
    only_count: bool,
    exact: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """List jobs, without a state the newest first."""
    operator = Kathikon(storage_of(context))
    if exact and not only_count:
        raise click.UsageError("--exact goes with --count.")
    selection = chosen(operator, fields)
    if only_count:
        number = selection.count(None if exact else MOST + 1)
        if as_json:
            print_json({"count": min(number, MOST) if not exact else number, "is_exact": exact or number <= MOST})
        else:
            click.echo(number if exact or number <= MOST else f"{MOST}+")
        return
    found = selection.page(limit, operator.job(after) if after else None)
    if as_json:
        print_json([_as_dict(job) for job in found])
    elif found:
        print_jobs(found)
    else:
        click.echo("There are no such jobs.")


@kathikon.command()
@click.argument("ids", nargs=-1, required=True, shell_complete=complete_ids)
@AS_JSON
@click.pass_obj
def show(context: CLIContext, /, ids: Sequence[str], as_json: bool) -> None:
    """Show all that the table says of jobs."""
    operator = Kathikon(storage_of(context))
    jobs, errors = _each(ids, operator.job)
    found = [_as_dict(job, is_whole=True) for job in jobs]
    if as_json:
        print_json(found)
    for job in () if as_json else found:
        width = max(map(len, job))
        for name, value in job.items():
            if value not in (None, [], ""):
                text = value if isinstance(value, str) else json.dumps(value)
                lines = [legible(line) for line in text.splitlines()] or [""]
                click.echo(f"{name:<{width}}  " + f"\n{'':<{width}}  ".join(lines))
        click.echo()
    if errors:
        raise SystemExit(1)


def _each(ids: Sequence[str], read: Callable[[str], Any]) -> tuple[list[Any], int]:
    """Return what *read* returns for each of the jobs that exist, and how many do not; say which."""
    found, errors = [], 0
    for job_id in ids:
        try:
            found.append(read(job_id))
        except NotFound as error:
            click.echo(f"Error: {error}", err=True)
            errors += 1
    return found, errors


@kathikon.command()
@click.argument("ids", nargs=-1, required=True, shell_complete=complete_ids)
@AS_JSON
@click.pass_obj
def explain(context: CLIContext, /, ids: Sequence[str], as_json: bool) -> None:
    """Say why jobs do not run, or how they ended."""
    operator = Kathikon(storage_of(context))
    found, errors = _each(ids, operator.explain)
    if as_json:
        print_json([{"id": one.job.id, "state": one.job.state, "why": one.why, "text": one.text} for one in found])
    for one in () if as_json else found:
        click.echo(f"{legible(one.job.id)}: {legible(one.text)}")
    if errors:
        raise SystemExit(1)


@kathikon.command()
@click.argument("job_id", metavar="ID", shell_complete=complete_ids)
@AS_JSON
@click.pass_obj
def history(context: CLIContext, /, job_id: str, as_json: bool) -> None:
    """Show what happened to a job: its times, failures, rescues, and what operators did."""
    events = Kathikon(storage_of(context)).history(job_id)
    if as_json:
        print_json([{**asdict(event), "at": event.at.isoformat()} for event in events])
        return
    rows: list[tuple[str, ...]] = [("at", "event", "by", "text")]
    for event in events:
        at = event.at.astimezone(timezone.utc).isoformat(" ", "milliseconds")[:23]
        rows.append((at, event.event, legible(event.operator or ""), legible((event.text or "").split("\n")[0])))
    show_table(rows)


def _as_dict(job: Job, is_whole: bool = False) -> dict[str, Any]:
    """Return the row of *job* by column, times in ISO's form; not *is_whole*: without what a page leaves out."""
    left_out = {"publication"} if is_whole else {"publication", "envelope", "body", "result", "traceback", "meta"}
    row = {name: value for name, value in asdict(job).items() if name not in left_out}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}


def print_jobs(found: Sequence[Job]) -> None:
    """Print jobs as a table."""
    rows: list[tuple[str, ...]] = [("id", "state", "queue", "task", "published", "tries", "reason")]
    for job in found:
        published = job.inserted_at.isoformat(" ", "seconds")[:19] if job.inserted_at else ""
        reason = (job.last_error or "").split("\n")[0]
        cells = (job.id, job.state, job.queue or "", job.task, published, str(job.attempts), reason)
        rows.append(tuple(legible(str(cell)) for cell in cells))
    show_table(rows, right=frozenset({5}))
