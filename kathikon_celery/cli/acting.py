"""Commands that change jobs: ``cancel``, ``retry``, ``rerun``, ``discard`` and ``delete``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kathikon_celery.cli.common import AS_JSON, complete_ids, print_json, storage_of
from kathikon_celery.cli.group import kathikon
from kathikon_celery.cli.jobs import chosen, print_jobs, selecting
from kathikon_celery.operate.kathikon import Kathikon, NotAllowed
from kathikon_celery.operate.selection import pace
from kathikon_celery.storage.errors import NotFound

if TYPE_CHECKING:
    from celery.bin.base import CLIContext

F = TypeVar("F", bound=Callable[..., Any])

#: Number of jobs above which a question is asked.
ASKS_ABOVE = 10
PAST = {"cancel": "Cancelled", "retry": "Retried", "rerun": "Rerun", "discard": "Discarded", "delete": "Deleted"}
REASON = click.option("--reason", help="Why, for the record.")
BY = click.option("--by", "operator", help="Who, for the record; default: the user and the machine.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say how many jobs there are, and show the first ones.")
IDS = click.argument("ids", nargs=-1, shell_complete=complete_ids)


class Rate(click.ParamType):  # type: ignore[type-arg]
    """How many jobs in a time, such as ``50/s``."""

    name = "RATE"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Return the rate, which is one."""
        try:
            pace(value)
        except ValueError as error:
            self.fail(str(error))
        return str(value)


def changing(command: F) -> F:
    """Add what all commands have that change jobs."""
    for option in (
        BY,
        REASON,
        click.option("--yes", is_flag=True, help=f"Do not ask, also for more than {ASKS_ABOVE} jobs."),
        DRY_RUN,
        click.option("--rate", type=Rate(), help="At most so many, as in 50/s or 600/m."),
        AS_JSON,
    ):
        command = option(command)
    return selecting(command)


@kathikon.command()
@IDS
@changing
@click.option("--terminate", is_flag=True, help="Also end the tasks that run.")
@click.pass_obj
def cancel(context: CLIContext, /, ids: Sequence[str], terminate: bool, **options: Any) -> None:
    """Cancel jobs that have not ended: IDS, or all that fit the options."""
    storage_of(context)  # or an error: the app's broker is another
    _change(context.app, "cancel", ids, {"terminate": terminate}, options)


@kathikon.command()
@IDS
@changing
@click.pass_obj
def retry(context: CLIContext, /, ids: Sequence[str], **options: Any) -> None:
    """Run jobs again that have ended without success, in place: IDS, or all that fit the options.

    Without --state, only dead jobs are chosen: not those that somebody has cancelled or discarded.
    """
    _change(storage_of(context), "retry", ids, {}, options)


@kathikon.command()
@IDS
@changing
@click.pass_obj
def discard(context: CLIContext, /, ids: Sequence[str], **options: Any) -> None:
    """Give up jobs that are dead or wait: IDS, or all that fit the options."""
    _change(storage_of(context), "discard", ids, {}, options)


@kathikon.command()
@changing
@click.pass_obj
def delete(context: CLIContext, /, **options: Any) -> None:
    """Delete jobs that have ended, with their results and their history: all that fit the options."""
    _change(storage_of(context), "delete", (), {}, options)


@kathikon.command()
@click.argument("ids", nargs=-1, required=True, shell_complete=complete_ids)
@DRY_RUN
@REASON
@BY
@AS_JSON
@click.pass_obj
def rerun(context: CLIContext, /, ids: Sequence[str], **options: Any) -> None:
    """Publish copies of jobs, under ids of their own, and print these. The copies run alone, without a workflow."""
    operator = Kathikon(storage_of(context), options["operator"])
    _change_each(operator, "rerun", ids, {"reason": options["reason"]}, options["dry_run"], options["as_json"])


def _change(place: Any, verb: str, ids: Sequence[str], how: dict[str, Any], options: dict[str, Any]) -> None:
    rate, is_dry, is_sure = options.pop("rate"), options.pop("dry_run"), options.pop("yes")
    operator, as_json = Kathikon(place, options.pop("operator")), options.pop("as_json")
    how |= {"reason": options.pop("reason")}
    is_selection = any(value not in (None, ()) for value in options.values())
    if bool(ids) is is_selection:
        either = "either their ids, or " if verb != "delete" else ""
        raise click.UsageError(f"Say which jobs to {verb}: {either}options such as --state and --task.")
    if ids:
        _change_each(operator, verb, ids, how, is_dry, as_json)
        return
    try:
        selection = chosen(operator, options).able(verb)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    number = selection.count()
    if is_dry:
        first = selection.page(5)
        if as_json:
            print_json({"would": verb, "count": number, "first": [job.id for job in first]})
            return
        click.echo(f"Would {verb} {_jobs(number)}.")
        if first:
            print_jobs(first)
        return
    if number > ASKS_ABOVE and not is_sure:
        _confirm(f"{verb.capitalize()} {_jobs(number)}?")
    act: Callable[..., int] = getattr(selection, verb)
    with click.progressbar(length=number, label=verb, file=sys.stderr) as bar:
        done = act(rate=rate, progress=lambda so_far: bar.update(so_far - bar.pos), **how)
    if as_json:
        print_json({"verb": verb, "changed": done})
    else:
        click.echo(f"{PAST[verb]} {_jobs(done)}.")


def _confirm(question: str) -> None:
    try:
        click.confirm(question, abort=True, err=True)
    except click.Abort:
        click.echo("Nothing was done. Say --yes to do it without this question.", err=True)
        raise


def _change_each(
    operator: Kathikon, verb: str, ids: Sequence[str], how: dict[str, Any], is_dry: bool, as_json: bool
) -> None:
    done, errors = [], {}
    for job_id in ids:
        try:
            job = operator.check(verb, job_id) if is_dry else getattr(operator, verb)(job_id, **how)
            done.append({"id": job.id, "state": job.state.value, "rerun_of": job.rerun_of})
        except (NotAllowed, NotFound) as error:
            click.echo(f"Error: {error}", err=True)
            errors[job_id] = str(error)
    if as_json:
        print_json({"would" if is_dry else "verb": verb, "changed": len(done), "jobs": done, "errors": errors})
    else:
        click.echo(f"Would {verb} {_jobs(len(done))}." if is_dry else f"{PAST[verb]} {_jobs(len(done))}.")
        for one in done if verb == "rerun" and not is_dry else ():
            click.echo(f"{one['rerun_of']} -> {one['id']}")
    if errors:
        raise SystemExit(1)


def _jobs(number: int) -> str:
    return f"{number:,} job{'' if number == 1 else 's'}"
