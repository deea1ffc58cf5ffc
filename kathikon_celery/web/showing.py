"""What a page shows of a job: its call without secrets, its times as a line, its workflow as a graph."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kathikon_celery.job import Job, State
from kathikon_celery.publish.envelope import unfold

if TYPE_CHECKING:
    from celery import Celery

#: Names of arguments whose values are not shown, unless others are given.
SECRETS = (
    "*passw*",
    "*pwd*",
    "*secret*",
    "*token*",
    "*api?key*",
    "*apikey*",
    "*private?key*",
    "*credential*",
    "*authorization*",
)
HIDDEN = "[hidden]"
#: Characters of a value that are shown at most.
LONGEST = 20_000


class Redaction:
    """Hides the values of arguments and keys by name.

    Arguments:
        names: patterns with ``*`` and ``?``; upper and lower case are one.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [name.lower() for name in names]

    def hides(self, name: object) -> bool:
        """Whether the value of *name* is not shown."""
        return any(fnmatchcase(str(name).lower(), pattern) for pattern in self._names)

    def of(self, value: Any, app: Celery | None = None) -> Any:
        """Return *value* without what is hidden in it: also in the arguments of signatures, of `map` and `starmap`."""
        if isinstance(value, dict):
            shown = {name: HIDDEN if self.hides(name) else self.of(one, app) for name, one in value.items()}
            task = value.get("task")
            if isinstance(task, str) and isinstance(value.get("args"), list):
                shown["args"] = self.of_arguments(value["args"], parameters(app, task), app)
            if isinstance(task, dict) and isinstance(value.get("it"), list):
                names = parameters(app, task.get("task"))
                items = [one if isinstance(one, list) else [one] for one in value["it"]]
                shown["it"] = [self.of_arguments(one, names, app) for one in items]
            return shown
        return [self.of(one, app) for one in value] if isinstance(value, list | tuple) else value

    def of_arguments(self, args: Sequence[Any], names: Sequence[str], app: Celery | None = None) -> list[Any]:
        """Return positional arguments without those that are hidden; *names*: of the task's parameters."""
        known = [*names[: len(args)], *[""] * (len(args) - len(names))]
        return [HIDDEN if self.hides(name) else self.of(one, app) for name, one in zip(known, args, strict=True)]


def call_of(job: Job, app: Celery | None, redaction: Redaction) -> tuple[str, str]:
    """Return arguments and keyword arguments of *job* as JSON, or words that say why they are not shown.

    Only JSON is read: a pickle would run code.
    """
    try:
        message = unfold(job.envelope, job.body, "", redelivered=False)
        if message["content-type"] != "application/json" or not isinstance(message["body"], str):
            return f"not shown: {message['content-type'] or 'no content type'}, {len(message['body'])} characters", ""
        args, kwargs, *_ = json.loads(message["body"])
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError("it is no call")
        shown = redaction.of_arguments(args, parameters(app, job.task), app), redaction.of(kwargs, app)
        return pretty(shown[0]), pretty(shown[1])
    except (ValueError, TypeError, RecursionError) as error:
        return f"not shown: {error}", ""


def parameters(app: Celery | None, name: object) -> list[str]:
    """Return the names of the parameters of the task *name*, as far as this process knows the task."""
    task = app.tasks.get(name) if app is not None else None
    try:
        return list(inspect.signature(task.run).parameters) if task is not None else []
    except (TypeError, ValueError):
        return []


def result_of(job: Job, redaction: Redaction) -> str | None:
    """Return the result as text; what is no JSON is not shown."""
    if job.result is None:
        return None
    try:
        return pretty(redaction.of(json.loads(job.result)))
    except (ValueError, RecursionError):
        return f"not shown: no JSON, {len(job.result)} characters"


def pretty(value: Any) -> str:
    """Return *value* as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, indent=1 if len(str(value)) > 60 else None)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … {len(text) - LONGEST:,} characters more"


# --- words


def at(moment: datetime | None) -> str:
    """Return a moment in UTC, to the second."""
    return "" if moment is None else moment.astimezone(timezone.utc).isoformat(" ", "seconds")[:19]


def age(seconds: float | None) -> str:
    """Return a time in the largest unit that fits."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{1 if unit == 's' and seconds < 10 else 0}f} {unit}"
    return f"{seconds / 86400:.0f} d"


# --- pictures


@dataclass(frozen=True)
class Span:
    """A part of a job's life, in percent of it."""

    name: str
    seconds: float
    begin: float
    width: float


def timeline(job: Job, now: datetime) -> list[Span]:
    """Return how long *job* waited, was held and ran."""
    until = job.ended_at or (now if job.state not in (State.SCHEDULED, State.RETRYABLE) else None)
    due = max((one for one in (job.inserted_at, job.available_at) if one is not None), default=None)
    if job.claimed_at is not None and due is not None and due > job.claimed_at:
        due = job.inserted_at
    moments = [
        ("waits for its time", job.inserted_at),
        ("waits for a worker", due),
        ("is held by a worker" if job.started_at is not None else "is with a worker", job.claimed_at),
        ("runs", job.started_at),
        ("", until),
    ]
    known = [(name, moment) for name, moment in moments if moment is not None]
    if len(known) < 2 or until is None:
        return []
    first, whole = known[0][1], max((until - known[0][1]).total_seconds(), 1e-6)
    spans = []
    for (name, begin), (_, end) in pairwise(known):
        seconds = (end - begin).total_seconds()
        if seconds > 0:
            left = 100 * (begin - first).total_seconds() / whole
            spans.append(Span(name, seconds, left, max(100 * seconds / whole, 0.4)))
    return spans


@dataclass(frozen=True)
class Spot:
    """A job in the picture of its workflow."""

    job: Job
    x: int
    y: int


@dataclass(frozen=True)
class Graph:
    """A workflow as a picture: each job right of the job that sent it."""

    spots: list[Spot]
    lines: list[tuple[int, int, int, int]]
    width: int
    height: int


#: Size of a job in the picture, and of the gaps.
WIDTH, HEIGHT, RIGHT, BELOW = 190, 38, 50, 12


def graph(found: Sequence[Job]) -> Graph:
    """Return the picture of the jobs of a workflow."""
    jobs = {job.id: job for job in sorted(found, key=lambda job: (job.inserted_at is None, job.inserted_at, job.seq))}
    depths: dict[str, int] = {}
    for job in jobs.values():
        depth, one, seen = 0, job, {job.id}
        while (parent := jobs.get(one.parent_id or "")) is not None and parent.id not in seen:
            if parent.id in depths:
                depth += depths[parent.id] + 1
                break
            depth, one = depth + 1, parent
            seen.add(one.id)
        depths[job.id] = depth
    rows: dict[int, int] = {}
    spots = {}
    for name, job in jobs.items():
        row = rows.get(depths[name], 0)
        rows[depths[name]] = row + 1
        spots[name] = Spot(job, depths[name] * (WIDTH + RIGHT), row * (HEIGHT + BELOW))
    middle = HEIGHT // 2
    lines = [
        (spots[one.parent_id].x + WIDTH, spots[one.parent_id].y + middle, spots[name].x, spots[name].y + middle)
        for name, one in jobs.items()
        if one.parent_id in spots and one.parent_id != name
    ]
    width = (max(depths.values(), default=0) + 1) * (WIDTH + RIGHT) - RIGHT
    return Graph(list(spots.values()), lines, width, max(rows.values(), default=1) * (HEIGHT + BELOW))


def curve(values: Sequence[tuple[float, float]], span: float, width: int = 240, height: int = 40) -> str:
    """Return the points of a line through *values*, which are seconds before now (negative) and heights.

    *span*: the seconds that an SVG of that size shows.
    """
    top = max([1.0, *(value for _, value in values)])
    points = [(width * (1 + at / span), height - 1 - (height - 2) * value / top) for at, value in values]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
