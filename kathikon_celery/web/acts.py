"""The forms: each does one thing, in the name of the user who sent it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Thread
from typing import Any
from urllib.parse import quote, urlencode

from kathikon_celery.operate.selection import Selection, pace
from kathikon_celery.schedules.entries import LONGEST_NAME
from kathikon_celery.schedules.options import json_of
from kathikon_celery.schedules.timetable import FIELDS as CRONTAB
from kathikon_celery.schedules.timetable import crontab_of
from kathikon_celery.storage.status import MOST
from kathikon_celery.web.pages import BULK, FIELDS, VERBS, Visit, moment_of, selection_of

logger = logging.getLogger(__name__)

#: What was done, in words.
PAST = {"retry": "retried", "cancel": "cancelled", "rerun": "rerun", "discard": "discarded", "delete": "deleted"}
#: Verbs for one schedule that take no more than its name; `Schedules` has a method for each.
SCHEDULE_VERBS = ("pause", "resume", "remove", "reset")


@dataclass
class Done:
    """What an act leads to.

    Arguments:
        to: the path of the next page.
        text: what was done.
        template, data: a page to show instead.
    """

    to: str = "/"
    text: str = ""
    template: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


Form = Mapping[str, str]
Act = Callable[[Visit, Form], Done]


def act_on_job(visit: Visit, form: Form) -> Done:
    """Do one of `VERBS` to one job."""
    verb, job_id = _member("verb", form, VERBS), form.get("id", "")
    more = {"terminate": True} if verb == "cancel" and form.get("terminate") else {}
    job = getattr(visit.kathikon, verb)(job_id, reason=_reason(form), **more)
    return Done(f"/job?id={quote(job.id, safe='')}", f"The job was {PAST[verb]}.")


def act_on_jobs(visit: Visit, form: Form) -> Done:
    """Show how many jobs one of `BULK` would change; do that, if the form says so."""
    verb = _member("verb", form, BULK)
    selection = selection_of(visit, form)
    if not form.get("state") and verb == "retry":
        form = {**form, "state": "dead"}
        selection = selection_of(visit, form)
    rate = form.get("rate") or None
    pace(rate)
    able = selection.able(verb)
    chosen = {name: form[name] for name in FIELDS if form.get(name)}
    if form.get("sure") != "yes":
        data = {"verb": verb, "count": able.count(MOST), "jobs": able.page(5), "chosen": chosen}
        return Done(template="sure.html", data={**data, "rate": rate or "", "reason": form.get("reason", "")})
    Thread(target=_do, args=(selection, verb, rate, _reason(form)), name=f"kathikon-{verb}", daemon=True).start()
    return Done("/acts", f"Jobs are being {PAST[verb]}; this page shows how many.")


def _do(selection: Selection, verb: str, rate: str | None, reason: str | None) -> None:
    try:
        getattr(selection, verb)(rate=rate, reason=reason)
    except Exception:
        logger.exception("Kathikon: the bulk act %r was interrupted; it can be called again", verb)


def pause(visit: Visit, form: Form) -> Done:
    """Pause a queue, a task pattern, or everything."""
    kind, name = _member("kind", form, ("queue", "task", "all")), _what(form)
    age = timedelta(minutes=_number("minutes", form["minutes"])) if form.get("minutes") else None
    getattr(visit.kathikon, f"pause_{kind}")(*name, until=age, reason=_reason(form))
    return Done("/queues", "Paused.")


def resume(visit: Visit, form: Form) -> Done:
    """End a pause."""
    kind, name = _member("kind", form, ("queue", "task", "all")), _what(form)
    was_paused = getattr(visit.kathikon, f"resume_{kind}")(*name, reason=_reason(form))
    return Done("/queues", "Resumed." if was_paused else "That was not paused.")


def _what(form: Form) -> tuple[str, ...]:
    if form.get("kind") == "all":
        return ()
    if not form.get("name") or not form["name"].isprintable() or len(form["name"]) > LONGEST_NAME:
        raise ValueError("say the name of a queue, or the pattern of a task, in printable characters")
    return (form["name"],)


def act_on_schedule(visit: Visit, form: Form) -> Done:
    """Pause, resume, run, backfill, remove, reset, add or change a schedule."""
    verb = _member("verb", form, (*SCHEDULE_VERBS, "run_now", "backfill", "add", "change"))
    hands, name, reason = visit.kathikon.schedules, form.get("name", ""), _reason(form)
    if verb == "run_now":
        return Done(f"/job?id={quote(hands.run_now(name, reason=reason), safe='')}", "Sent.")
    if verb == "backfill":
        sent = hands.backfill(name, moment_of("since", form["since"]), moment_of("until", form["until"]), reason=reason)
        return Done("/schedules", f"{len(sent):,} ticks were sent.")
    if verb in SCHEDULE_VERBS:
        getattr(hands, verb)(name, reason=reason)
        return Done("/schedules", f"Done: {verb} {name}.")
    given: dict[str, Any] = {key: _json(key, form[key], kind) for key, kind in _JSON.items() if form.get(key)}
    given |= {key: form[key] for key in ("zone", "missed", "overlap") if form.get(key)}
    given |= {key: _number(key, form[key]) for key in ("grace", "jitter") if form.get(key)}
    if form.get("when"):
        given["schedule"] = _when(form["when"])
    if verb == "change":
        hands.change(name, reason=reason, **given)
        return Done("/schedules", f"{name} was changed.")
    if not name or not form.get("task") or "schedule" not in given:
        raise ValueError("a schedule needs a name, a task, and when: seconds, or five fields of a crontab")
    was_there = hands.add(name, form["task"], given.pop("schedule"), reason=reason, **given)
    return Done("/schedules", f"{name} was {'replaced' if was_there else 'added'}.")


def act_on_limit(visit: Visit, form: Form) -> Done:
    """Set or reset the numbers of a limit."""
    verb, name = _member("verb", form, ("set", "reset")), form.get("name", "")
    if verb == "reset":
        was_set = visit.kathikon.limits.reset(name, reason=_reason(form))
        return Done("/limits", f"{name} was reset." if was_set else f"The code's numbers of {name} count already.")
    given = {one: form[one] for one in ("concurrency", "rate", "burst") if form.get(one)}
    hands: Any = visit.kathikon.limits
    return Done("/limits", f"{name}: {hands.set(name, reason=_reason(form), **given).numbers}.")


_JSON: dict[str, type] = {"args": list, "kwargs": dict, "options": dict}


def _when(text: str) -> Any:
    return crontab_of(text) if len(text.split()) == len(CRONTAB) else _number("when", text)


def _json(name: str, text: str, kind: type) -> Any:
    try:
        return json_of(text, kind)
    except ValueError as error:
        raise ValueError(f"{name} = {error}") from error


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} = {text!r} is no number") from None


def _member(name: str, form: Form, allowed: tuple[str, ...]) -> str:
    value = form.get(name, "")
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}; allowed are {', '.join(allowed)}")
    return value


def _reason(form: Form) -> str | None:
    return form.get("reason", "").strip() or None


def address(chosen: Mapping[str, str], **more: str) -> str:
    """Return the path of the page of jobs with this selection."""
    return f"/jobs?{urlencode({**chosen, **more})}"


#: Path -> act.
ACTS: dict[str, Act] = {
    "/act/job": act_on_job,
    "/act/jobs": act_on_jobs,
    "/act/pause": pause,
    "/act/resume": resume,
    "/act/schedule": act_on_schedule,
    "/act/limit": act_on_limit,
}
