"""The pages: each reads what it shows, and names its template."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from time import time
from typing import TYPE_CHECKING, Any

from celery import Celery

from kathikon_celery.job import Cause, Job, State
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.operate.schedules import lag
from kathikon_celery.operate.selection import Selection
from kathikon_celery.operate.verbs import MAY
from kathikon_celery.storage.errors import NotFound
from kathikon_celery.storage.status import MOST, WINDOW, Status, capped
from kathikon_celery.web import showing
from kathikon_celery.web.access import User
from kathikon_celery.web.shared import Shared
from kathikon_celery.web.showing import Redaction

if TYPE_CHECKING:
    from kathikon_celery.storage import Storage

#: Jobs on one page.
LIMIT = 50
#: Jobs of a workflow that are drawn.
DRAWN = 200
#: Verbs for one job; `Kathikon` has a method for each.
VERBS = ("retry", "cancel", "rerun", "discard")
#: Verbs for all jobs of a selection.
BULK = ("retry", "cancel", "discard", "delete")
#: Seconds that the curves of the overview show.
CURVES = 300.0
#: Fields that no index finds.
SEARCHED = ("task", "error", "cause", "argument")
#: Fields of a selection, as `Kathikon.jobs` takes them.
TEXTS = ("queue", "task", "error", "cause", "argument", "root", "group")
MOMENTS = ("since", "until", "ended_since", "ended_until")
FIELDS = ("state", *TEXTS, *MOMENTS)
#: Parameters of the pages' addresses.
KNOWN = frozenset({*FIELDS, "after", "id", "limit"})


@dataclass(frozen=True)
class Visit:
    """One look at a page, or one act."""

    place: Celery | Storage
    user: User
    query: Mapping[str, str]
    redaction: Redaction
    samples: deque[tuple[float, dict[str, int]]]
    shared: Shared

    @property
    def kathikon(self) -> Kathikon:
        """The jobs, in the hands of the user."""
        return Kathikon(self.place, self.user.name)

    def status(self) -> Status:
        """The state of all queues, as it was a second ago at most."""
        found: Status = self.shared.get("status", self.kathikon.status)
        return found

    @property
    def app(self) -> Celery | None:
        """The app, if there is one."""
        return self.place if isinstance(self.place, Celery) else None


Data = dict[str, Any]
#: Reads what a page shows. What it returns is shown to all who look at the page with the same rights.
Page = Callable[[Visit], Data]


def overview(visit: Visit) -> Data:
    """Numbers, what has ended lately, what is wrong."""
    status = visit.status()
    totals = {
        name: sum(getattr(one, name) for one in status.queues)
        for name in ("ready", "blocked", "scheduled", "claimed", "running", "dead")
    }
    ended = {state.value: number for state, number in status.ended.items()}
    sample = {"ready": totals["ready"], "running": totals["running"], **ended}
    present = time()
    visit.samples.append((present, sample))
    lately = [(at - present, one) for at, one in visit.samples if present - at <= CURVES]
    curves = {}
    for name in sample:
        values = [(at, one.get(name, 0)) for at, one in lately]
        curves[name] = showing.curve(values, CURVES), max(value for _, value in values)
    oldest = max((one.oldest for one in status.queues if one.oldest is not None and one.paused is None), default=None)
    late = visit.kathikon.schedules.late(timedelta(minutes=1))
    numbers_too = {"totals": totals, "ended": ended, "window": WINDOW, "curves": curves}
    return {"status": status, "oldest": oldest, "late": late, **numbers_too}


def queues(visit: Visit) -> Data:
    """Each queue, and what is paused."""
    return {"status": visit.status()}


def selection_of(visit: Visit, given: Mapping[str, str]) -> Selection:
    """Return the jobs that the fields of a form choose. Raises `ValueError` for a field that is wrong."""
    fields: dict[str, Any] = {name: given[name] for name in TEXTS if given.get(name)}
    if not visit.user.may_act:
        fields.pop("argument", None)  # whoever may search arguments can guess what is hidden in them
    for name in MOMENTS:
        if given.get(name):
            fields[name] = moment_of(name, given[name])
    return visit.kathikon.jobs([given["state"]] if given.get("state") else (), **fields)


def moment_of(name: str, text: str) -> datetime:
    """Return the moment that the field *name* says. Raises `ValueError`."""
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"{name} = {text!r} is no moment such as 2026-01-31T12:00 (UTC)") from None
    if not 1970 <= moment.year <= 9000:
        raise ValueError(f"{name} = {text!r} is not between the years 1970 and 9000")
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def jobs(visit: Visit) -> Data:
    """A page of jobs that fit the filter."""
    selection = selection_of(visit, visit.query)
    after = visit.kathikon.job(visit.query["after"]) if visit.query.get("after") else None
    found = selection.page(LIMIT + 1, after)
    is_search = any(visit.query.get(name) for name in SEARCHED)
    # Whoever searches in texts reads the table until the page is full: the rest is not read only to be counted.
    here = f"{min(len(found), LIMIT)}{'+' if len(found) > LIMIT else ''}"
    count = here if is_search else capped(selection.count(MOST))
    return {
        "jobs": found[:LIMIT],
        "count": count,
        "next": found[LIMIT - 1].id if len(found) > LIMIT else None,
        "states": [state.value for state in State],
        "causes": [cause.value for cause in Cause],
        "chosen": {name: visit.query[name] for name in FIELDS if name in visit.query},
        "verbs": [verb for verb in BULK if visit.query.get("state") in ("", None, *MAY[verb])],
    }


def job(visit: Visit) -> Data:
    """One job: its call, times, failures, history and workflow."""
    operator = visit.kathikon
    one = operator.job(visit.query.get("id", ""))
    args, kwargs = showing.call_of(one, visit.app, visit.redaction)
    root = one.root_id or one.id
    workflow = operator.jobs(root=root).page(DRAWN + 1)
    known = {one.id, *(other.id for other in workflow)}
    if one.group_id is not None:
        workflow += [other for other in operator.jobs(group=one.group_id).page(DRAWN) if other.id not in known]
        known |= {other.id for other in workflow}
    if root not in known:
        workflow += _existing(operator, root)
    return {
        "job": one,
        "args": args,
        "kwargs": kwargs,
        "result": showing.result_of(one, visit.redaction),
        "explanation": operator.explain(one.id).text,
        "history": operator.history(one.id),
        "timeline": showing.timeline(one, datetime.now(timezone.utc)),
        "graph": showing.graph(workflow[:DRAWN]) if len(workflow) > 1 else None,
        "more": len(workflow) > DRAWN,
        "verbs": [verb for verb in VERBS if verb == "rerun" or one.state in MAY[verb]],
    }


def _existing(operator: Kathikon, job_id: str) -> list[Job]:
    try:
        return [operator.job(job_id)]
    except NotFound:
        return []


def workers(visit: Visit) -> Data:
    """The living processes, and the jobs that run."""
    return {"workers": visit.kathikon.workers(), "running": visit.kathikon.jobs(State.RUNNING).page(LIMIT)}


def schedules(visit: Visit) -> Data:
    """All schedules."""
    return {"schedules": [(one, lag(one)) for one in visit.kathikon.schedules.every()]}


def limits(visit: Visit) -> Data:
    """All limits, and the keys of one."""
    hands, name = visit.kathikon.limits, visit.query.get("limit")
    return {"limits": hands.all(), "name": name, "keys": hands.keys(name) if name else []}


def acts(visit: Visit) -> Data:
    """What operators did."""
    found = visit.kathikon.acts(100)
    return {"acts": [(one, one.target if visit.user.may_act else _public(one.target)) for one in found]}


def _public(target: str) -> str:
    """Return an act's target without what was searched for in arguments: a reader may not search there."""
    try:
        said = json.loads(target)
    except ValueError:
        return target
    return json.dumps({**said, "argument": showing.HIDDEN}) if isinstance(said, dict) and "argument" in said else target


#: Path -> page and template.
PAGES: dict[str, tuple[Page, str]] = {
    "/": (overview, "overview.html"),
    "/queues": (queues, "queues.html"),
    "/jobs": (jobs, "jobs.html"),
    "/job": (job, "job.html"),
    "/workers": (workers, "workers.html"),
    "/schedules": (schedules, "schedules.html"),
    "/limits": (limits, "limits.html"),
    "/acts": (acts, "acts.html"),
}
