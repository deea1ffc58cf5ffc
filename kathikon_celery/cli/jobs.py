"""Commands for jobs: ``jobs``, ``show`` and ``explain`` read, ``cancel``, ``retry`` and ``discard`` change them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kathikon_celery.cli.group import kathikon, legible, show_table, storage_of
from kathikon_celery.job import Cause, Job, State
from kathikon_celery.operate.kathikon import Kathikon, NotAllowed
from kathikon_celery.storage.errors import NotFound

if TYPE_CHECKING:
    from celery.bin.base import CLIContext

F = TypeVar("F", bound=Callable[..., Any])

#: Number of jobs above which a question is asked.
ASKS_ABOVE = 10
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Moment(click.ParamType):  # type: ignore[type-arg]
    """A moment in ISO's form, or an age such as ``90m``."""

    name = "MOMENT"

    def convert(self, value: Any, param: Any, ctx: Any) -> datetime:
        """Return the moment. An age counts back from now by this machine's clock; without a time zone it is UTC."""
        if age := re.fullmatch(r"(\d+)([smhdw])", value):
            return datetime.now(timezone.utc) - timedelta(**{UNITS[age[2]]: int(age[1])})
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            self.fail(f"{value!r} is neither a moment such as 2026-01-31T12:00 (UTC) nor an age such as 90m, 12h or 3d")
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
    click.option("--queue", help="The queue's name."),
    click.option("--task", metavar="PATTERN", help="The task's name; * and ? stand for any characters, or for one."),
    click.option("--error", metavar="PATTERN", help="The reason of a job's end, as in 'Timeout*'."),
    click.option("--cause", type=click.Choice(CAUSES), help="Why a job has ended."),
    click.option("--root", metavar="ID", help="The workflow that began with this job."),
    click.option("--group", metavar="ID", help="The group."),
    click.option("--since", type=Moment(), help="Published then or later: an age such as 12h, or a moment in UTC."),
    click.option("--until", type=Moment(), help="Published before."),
]
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def selecting(command: F) -> F:
    """Add the options of a selection to *command*."""
    for option in reversed(SELECTING):
        command = option(command)
    return command


def changing(command: F) -> F:
    """Add what all commands have that change jobs."""
    for option in (
        click.option("--yes", is_flag=True, help=f"Do not ask, also for more than {ASKS_ABOVE} jobs."),
        click.option("--dry-run", is_flag=True, help="Only say how many jobs there are, and show the first ones."),
        click.option("--rate", help="At most so many, as in 50/s or 600/m."),
    ):
        command = option(command)
    return click.argument("ids", nargs=-1)(selecting(command))


@kathikon.command(name="jobs")
@selecting
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="How many jobs at most.")
@click.option("--after", metavar="ID", help="Go on behind this job, the last one of the page before.")
@click.option("--count", "only_count", is_flag=True, help="Print only the number of jobs.")
@AS_JSON
@click.pass_obj
def jobs_command(
    context: CLIContext, /, limit: int, after: str | None, only_count: bool, as_json: bool, **fields: Any
) -> None:
    """List jobs, without a state the newest first."""
    operator = Kathikon(storage_of(context))
    selection = operator.jobs(**fields)
    if only_count:
        click.echo(selection.count())
        return
    found = selection.page(limit, operator.job(after) if after else None)
    if as_json:
        _print_json([_as_dict(job) for job in found])
    elif found:
        _print_jobs(found)
    else:
        click.echo("There are no such jobs.")


@kathikon.command()
@click.argument("ids", nargs=-1, required=True)
@AS_JSON
@click.pass_obj
def show(context: CLIContext, /, ids: Sequence[str], as_json: bool) -> None:
    """Show all that the table says of jobs."""
    operator = Kathikon(storage_of(context))
    found = [_as_dict(operator.job(job_id), is_whole=True) for job_id in ids]
    if as_json:
        _print_json(found)
        return
    for job in found:
        width = max(map(len, job))
        for name, value in job.items():
            if value not in (None, [], ""):
                text = value if isinstance(value, str) else json.dumps(value)
                lines = [legible(line) for line in text.splitlines()] or [""]
                click.echo(f"{name:<{width}}  " + f"\n{'':<{width}}  ".join(lines))
        click.echo()


@kathikon.command()
@click.argument("ids", nargs=-1, required=True)
@AS_JSON
@click.pass_obj
def explain(context: CLIContext, /, ids: Sequence[str], as_json: bool) -> None:
    """Say why jobs do not run, or how they ended."""
    operator = Kathikon(storage_of(context))
    found = [operator.explain(job_id) for job_id in ids]
    if as_json:
        _print_json([{"id": one.job.id, "state": one.job.state, "why": one.why, "text": one.text} for one in found])
        return
    for one in found:
        click.echo(f"{legible(one.job.id)}: {legible(one.text)}")


@kathikon.command()
@changing
@click.option("--terminate", is_flag=True, help="Also end the tasks that run.")
@click.option("--reason", default="cancelled by hand", show_default=True, help="Written to the job.")
@click.pass_obj
def cancel(context: CLIContext, /, ids: Sequence[str], **options: Any) -> None:
    """Cancel jobs that have not ended: IDS, or all that fit the options."""
    storage_of(context)  # or an error: the app's broker is another
    _change(
        Kathikon(context.app),
        "cancel",
        ids,
        {"terminate": options.pop("terminate"), "reason": options.pop("reason")},
        options,
    )


@kathikon.command()
@changing
@click.pass_obj
def retry(context: CLIContext, /, ids: Sequence[str], **options: Any) -> None:
    """Run jobs again that have ended without success, in place: IDS, or all that fit the options."""
    _change(Kathikon(storage_of(context)), "retry", ids, {}, options)


@kathikon.command()
@changing
@click.option("--reason", default="discarded by hand", show_default=True, help="Written to the job.")
@click.pass_obj
def discard(context: CLIContext, /, ids: Sequence[str], **options: Any) -> None:
    """Give up jobs that are dead or wait: IDS, or all that fit the options."""
    _change(Kathikon(storage_of(context)), "discard", ids, {"reason": options.pop("reason")}, options)


def _change(operator: Kathikon, verb: str, ids: Sequence[str], how: dict[str, Any], options: dict[str, Any]) -> None:
    rate, is_dry, is_sure = options.pop("rate"), options.pop("dry_run"), options.pop("yes")
    is_selection = any(value not in (None, ()) for value in options.values())
    if bool(ids) is is_selection:
        raise click.UsageError(f"Say which jobs to {verb}: either their ids, or options such as --state and --task.")
    if ids:
        _change_each(operator, verb, ids, how, is_dry)
        return
    try:
        selection = operator.jobs(**options).able(verb)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    number = selection.count()
    if is_dry:
        click.echo(f"Would {verb} {_jobs(number)}.")
        if first := selection.page(5):
            _print_jobs(first)
        return
    if number > ASKS_ABOVE and not is_sure:
        click.confirm(f"{verb.capitalize()} {_jobs(number)}?", abort=True, err=True)
    with click.progressbar(length=number, label=verb, file=sys.stderr) as bar:
        act: Callable[..., int] = getattr(selection, verb)
        done = act(rate=rate, progress=lambda _: bar.update(1), **how)
    click.echo(f"{_past(verb)} {_jobs(done)}.")


def _change_each(operator: Kathikon, verb: str, ids: Sequence[str], how: dict[str, Any], is_dry: bool) -> None:
    failures = 0
    for job_id in ids:
        try:
            if is_dry:
                operator.check(verb, job_id)
            else:
                getattr(operator, verb)(job_id, **how)
        except (NotAllowed, NotFound) as error:
            click.echo(f"Error: {error}", err=True)
            failures += 1
    done = len(ids) - failures
    click.echo(f"Would {verb} {_jobs(done)}." if is_dry else f"{_past(verb)} {_jobs(done)}.")
    if failures:
        raise SystemExit(1)


def _past(verb: str) -> str:
    return {"cancel": "Cancelled", "retry": "Retried", "discard": "Discarded"}[verb]


def _jobs(number: int) -> str:
    return f"{number:,} job{'' if number == 1 else 's'}"


def _as_dict(job: Job, is_whole: bool = False) -> dict[str, Any]:
    """Return the row of *job* by column, times in ISO's form; not *is_whole*: without what a page leaves out."""
    left_out = {"publication"} if is_whole else {"publication", "envelope", "body", "result", "traceback", "meta"}
    row = {name: value for name, value in asdict(job).items() if name not in left_out}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _print_jobs(found: Sequence[Job]) -> None:
    rows: list[tuple[str, ...]] = [("id", "state", "queue", "task", "published", "tries", "reason")]
    for job in found:
        published = job.inserted_at.isoformat(" ", "seconds")[:19] if job.inserted_at else ""
        reason = (job.last_error or "").split("\n")[0]
        cells = (job.id, job.state, job.queue or "", job.task, published, str(job.attempts), reason)
        rows.append(tuple(legible(str(cell)) for cell in cells))
    show_table(rows, right=frozenset({5}))
