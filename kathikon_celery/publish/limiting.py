"""What a call is marked with: its unique key, and the limits it counts for.

The limits are those of its task and its queue, and Celery's ``rate_limit`` if that is the fleet's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kombu import serialization
from kombu.compression import decompress

from kathikon_celery.job import Job, Use
from kathikon_celery.limits import Limit, LimitError, arguments_of, limits_of, signature_of
from kathikon_celery.settings import Settings
from kathikon_celery.storage.limits import OF_QUEUE, TURNS
from kathikon_celery.unique import Unique, unique_of

if TYPE_CHECKING:
    from celery import Celery

#: Where an app keeps its `AppLimits`, which name the app: a dictionary of apps would keep each of them for ever.
_ATTRIBUTE = "_kathikon_limits"


class AppLimits:
    """The limits of one app's calls."""

    def __init__(self, app: Celery, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._of_queues = {
            queue.name: Limit(
                f"{OF_QUEUE}{queue.name}".replace("{", "{{").replace("}", "}}"),
                concurrency=queue.fleet,
                rate=queue.rate,
            )
            for queue in settings.queues.values()
            if queue.fleet is not None or queue.rate is not None
        }
        self._of_tasks: dict[str, tuple[Any, tuple[Limit, ...]]] = {}

    @classmethod
    def of(cls, app: Celery) -> AppLimits:
        """Return those of *app*, whose settings are read once."""
        found: AppLimits | None = vars(app).get(_ATTRIBUTE)
        if found is None:
            found = cls(app, Settings.load(app.conf))
            setattr(app, _ATTRIBUTE, found)
        return found

    def all(self) -> list[Limit]:
        """Return every limit of the app. Raises `LimitError` and `UniqueError` for a wrong one."""
        names = list(self._app.tasks)
        for name in names:
            self.unique_of(name)
        found = [limit for name in names for limit in self.of_task(name)]
        return [*found, *self._of_queues.values()]

    def of_task(self, name: str) -> tuple[Limit, ...]:
        """Return the limits of the task called *name*."""
        task = self._app.tasks.get(name)
        if task is None:
            return ()
        known = self._of_tasks.get(name)
        if known is None or known[0] is not task:
            found = limits_of(task)
            if self._settings.rate_limits == "fleet" and (rate := rate_limit_of(self._app, task)) is not None:
                found += (Limit(name_for(name), rate=rate),)
            known = self._of_tasks[name] = task, found
        return known[1]

    def of_call(self, name: str, queue: str | None) -> tuple[Limit, ...]:
        """Return the limits of calls of a task that go to *queue*."""
        of_queue = self._of_queues.get(queue or "")
        return self.of_task(name) + ((of_queue,) if of_queue is not None else ())

    def unique_of(self, name: str) -> Unique | None:
        """Return the option ``unique`` of the task called *name*. Raises `UniqueError` for a wrong one."""
        task = self._app.tasks.get(name)
        if task is None or getattr(task, "unique", None) is None:
            return None
        return unique_of(task, signature_of(task))

    def is_marked(self, name: str, queue: str | None) -> bool:
        """Whether calls of a task that go to *queue* have limits or a unique key."""
        return bool(self.of_call(name, queue)) or self.unique_of(name) is not None

    def mark(self, job: Job, args: Any, kwargs: Any) -> None:
        """Note on *job* what it takes of which limits, and its unique key. Raises `LimitError` and `UniqueError`."""
        job.limits = self.uses(job, args, kwargs)
        if (found := self.unique_of(job.task)) is None:
            return
        key = found.key_of(job.task, signature_of(self._app.tasks[job.task]), tuple(args or ()), kwargs or {})
        if found.on_conflict == "after":
            job.limits = (Use(f"unique:{key}", TURNS, concurrency=1), *job.limits)
        else:
            job.unique = found.of(key)

    def uses(self, job: Job, args: Any, kwargs: Any) -> tuple[Use, ...]:
        """Return what a run of *job* takes of its limits. Raises `LimitError` if the call lacks a field."""
        limits = self.of_call(job.task, job.queue)
        if not limits:
            return ()
        args, arguments = tuple(args or ()), dict(kwargs or {})
        task = self._app.tasks.get(job.task)
        if task is not None and any(limit.fields for limit in limits):
            try:
                arguments = arguments_of(signature_of(task), args, kwargs or {})
            except TypeError as error:
                raise LimitError(f"task {job.task}: its limits need its arguments: {error}") from None
        found = (limit.use(args, kwargs or {}, arguments) for limit in limits)
        return tuple({use.key: use for use in found if use is not None}.values())


def rate_limit_of(app: Celery, task: Any) -> Any:
    """Return Celery's rate limit of a task; `None`: it has none."""
    return task.rate_limit if task.rate_limit is not None else app.conf.task_default_rate_limit


def name_for(task: str) -> str:
    """Return the name of the limit that stands for the ``rate_limit`` of the task called *task*."""
    return f"task:{task}".replace("{", "{{").replace("}", "}}")


def mark(app: Celery, job: Job, message: Mapping[str, Any]) -> None:
    """Note on *job*, which was made of *message*, what it takes of its limits, and its unique key."""
    limits = AppLimits.of(app)
    if not limits.is_marked(job.task, job.queue):
        return
    try:
        body, how = message["body"], (message.get("headers") or {}).get("compression")
        payload = serialization.loads(
            decompress(body, how) if how else body,
            message.get("content-type"),
            message.get("content-encoding"),
            accept=_accepted(app),
        )
    except (serialization.ContentDisallowed, serialization.DecodeError) as error:
        raise LimitError(
            f"task {job.task}: its limits and its unique key need its arguments, which cannot be read: {error}"
        ) from error
    if isinstance(payload, Mapping):  # protocol 1
        args, kwargs = payload.get("args"), payload.get("kwargs")
    else:
        args, kwargs = payload[0], payload[1]
    limits.mark(job, args, kwargs)


def _accepted(app: Celery) -> Any:
    return serialization.prepare_accept_content(app.conf.accept_content)
