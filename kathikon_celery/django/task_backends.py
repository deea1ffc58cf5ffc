"""`TasksBackend`: runs the tasks of ``django.tasks``, or of the package django-tasks, as jobs of the Celery app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import import_module
from traceback import format_exception
from typing import Any
from uuid import uuid4

from celery import current_app, shared_task
from celery.app.task import Context
from django.apps import apps
from django.conf import settings
from django.core import checks
from django.utils import timezone
from django.utils.module_loading import import_string

from kathikon_celery import frameworks
from kathikon_celery.job import TERMINAL, Job, State
from kathikon_celery.publish import callers
from kathikon_celery.results.backend import KathikonBackend, error_of
from kathikon_celery.results.unattended import request_of
from kathikon_celery.settings import SettingError, Settings
from kathikon_celery.settings.brokers import broker_of, is_kathikon
from kathikon_celery.storage import Storage

try:
    import django.tasks as api

    normalize_json = import_module("django.utils.json").normalize_json
except ImportError:  # before Django 6
    import django_tasks as api

    normalize_json = import_module("django_tasks.utils").normalize_json

_base, _signals = import_module(f"{api.__name__}.base"), import_module(f"{api.__name__}.signals")
_exceptions = import_module(f"{api.__name__}.exceptions")
_Base: Any = import_module(f"{api.__name__}.backends.base").BaseTaskBackend

#: The worker in `TaskResult.worker_ids` of a run whose process was lost.
LOST = "lost"


class TasksBackend(_Base):
    """Tasks of ``django.tasks`` as jobs: sent in Django's open transaction, run by ``celery -A proj worker``.

    >>> TASKS = {"default": {"BACKEND": "kathikon_celery.django.TasksBackend"}}

    A task's ``queue_name`` is the queue, ``priority`` the priority (higher runs first), ``run_after`` the due time, and
    the result's id the id of the job. The Celery app is the current one, as for a ``shared_task``.
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def enqueue(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Send *task* with the arguments *args* and *kwargs*; return its result, whose id is known at once.

        Raises the API's ``InvalidTask``, and `TypeError` or `ValueError` for arguments that are no JSON.
        """
        self.validate_task(task)
        result = self._result(task, str(uuid4()), args, kwargs, enqueued_at=timezone.now())
        run_after = task.run_after
        run_task.apply_async(
            (task.module_path, self.alias, result.args, result.kwargs),
            task_id=result.id,
            queue=task.queue_name,
            priority=int(task.priority),
            eta=timezone.make_aware(run_after) if run_after is not None and timezone.is_naive(run_after) else run_after,
            shadow=task.module_path,
        )
        _signals.task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> Any:
        """Return the result with that id as the job's row has it; also in the transaction that has sent the task.

        Raises the API's ``TaskResultDoesNotExist``.
        """
        job = callers.here(Storage.for_app(current_app)).fetch(str(result_id))
        request = request_of(job) if job is not None and job.task == run_task.name else None
        if job is None or request is None or request.args[1] != self.alias:
            raise _exceptions.TaskResultDoesNotExist(result_id)
        path, _, args, kwargs = request.args
        return self._result_of(job, request, self._task(path, job.priority, job.queue, request.eta), args, kwargs)

    def run(self, request: Context, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the task at *path* in a worker, for Celery's *request*; return what the task returns, as JSON has it."""
        result = self._begun(request, path, args, kwargs)
        _signals.task_started.send(type(self), task_result=result)
        task = result.task
        context = (api.TaskContext(task_result=result),) if task.takes_context else ()
        try:
            value = normalize_json(task.call(*context, *result.args, **result.kwargs))
        except Exception as error:
            path = f"{type(error).__module__}.{type(error).__qualname__}"
            text = "".join(format_exception(type(error), error, error.__traceback__))
            result.errors.append(_base.TaskError(exception_class_path=path, traceback=text))
            _set(result, status=api.TaskResultStatus.FAILED, finished_at=timezone.now())
            _signals.task_finished.send(type(self), task_result=result)
            raise
        _set(result, status=api.TaskResultStatus.SUCCESSFUL, finished_at=timezone.now(), _return_value=value)
        _signals.task_finished.send(type(self), task_result=result)
        return value

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        """Return what keeps tasks from being run, or results from being read."""
        where = f"TASKS[{self.alias!r}]"
        if not frameworks.has_app():
            hint = "Import the app in the project's __init__.py: from proj.celery import app as celery_app"
            return [checks.Error(f"{where} needs a Celery app, and none is made.", hint=hint, id="kathikon.E002")]
        app, found = current_app._get_current_object(), []
        try:
            kept = Settings.load(app.conf).result
        except SettingError as error:
            is_told = apps.is_installed("kathikon_celery.django")  # by a check of its own
            return [] if is_told else [checks.Error(error.message, id="kathikon.E001")]
        if not is_kathikon(broker_of(app.conf)):
            hint = "Begin the Celery part of the settings with: from kathikon_celery.django import *"
            found.append(
                checks.Error(f"{where} needs Kathikon as the broker of the app {app.main!r}.", hint=hint,
                             id="kathikon.E003")
            )  # fmt: skip
        elif not (isinstance(app.backend, KathikonBackend) and app.backend.supports_autoexpire):
            found.append(
                checks.Error(f"{where} reads results from the jobs, and they are stored elsewhere.",
                             hint="Set CELERY_RESULT_BACKEND = 'kathikon'.", id="kathikon.E004")
            )  # fmt: skip
        elif kept == "discard":
            found.append(
                checks.Warning(f"Results of {where} have no return value, since CELERY_KATHIKON_RESULT is 'discard'.",
                               id="kathikon.W002")
            )  # fmt: skip
        for queue in sorted(self.queues - set(app.amqp.queues)):
            consumed = ", ".join(sorted(map(repr, app.amqp.queues)))
            found.append(
                checks.Warning(f"No worker consumes the queue {queue!r} of {where}, unless by its option -Q.",
                               hint=f"Add {queue!r} to CELERY_KATHIKON_QUEUES; there are {consumed}.",
                               id="kathikon.W003")
            )  # fmt: skip
        return found

    def _task(self, path: str, priority: int, queue: str | None, eta: str | None) -> Any:
        """Return the task at *path* with the options of a job. Raises `ImportError` or `ValueError`: there is none."""
        task = import_string(path)
        if not isinstance(task, _base.Task):
            raise ValueError(f"{path} is {task!r}, and no task of {api.__name__}")
        run_after = _moment(datetime.fromisoformat(eta)) if eta else None
        return task.using(backend=self.alias, priority=priority, queue_name=queue, run_after=run_after)

    def _result(self, task: Any, task_id: str, args: Any, kwargs: Any, **known: Any) -> Any:
        nothing = dict.fromkeys(("enqueued_at", "started_at", "finished_at", "last_attempted_at"))
        given = {"status": api.TaskResultStatus.READY, "errors": [], "worker_ids": [], **nothing, **known}
        return api.TaskResult(task=task, id=task_id, args=args, kwargs=kwargs, backend=self.alias, **given)

    def _begun(self, request: Context, path: str, args: Any, kwargs: Any) -> Any:
        """Return the result of a run that begins, and have the worker's name kept with what the run leaves."""
        job = None if request.is_eager else callers.here(Storage.for_app(current_app)).fetch(request.id)
        info = request.delivery_info or {}
        priority, queue = (info.get("priority"), info.get("routing_key")) if job is None else (job.priority, job.queue)
        task = self._task(path, priority or 0, queue or api.DEFAULT_TASK_QUEUE_NAME, request.eta)
        known: list[str] = []
        if job is None:  # task_always_eager
            result = self._result(task, request.id, args, kwargs, enqueued_at=timezone.now())
        else:
            result = self._result_of(job, request, task, args, kwargs)
            known = _workers(current_app.backend._value(job.meta) or {}, request.retries or 0, job)
        begun = result.started_at or timezone.now()
        workers = [*known, request.hostname or ""]
        _set(result, status=api.TaskResultStatus.RUNNING, started_at=begun, last_attempted_at=begun, worker_ids=workers)
        request.kathikon_meta = {"worker_ids": workers}
        return result

    def _result_of(self, job: Job, request: Context, task: Any, args: Any, kwargs: Any) -> Any:
        backend = current_app.backend
        kept = backend._value(job.meta) or {}
        began = _moment(job.started_at or job.claimed_at)
        result = self._result(
            task, job.id, args, kwargs, status=_status(job), enqueued_at=_moment(job.inserted_at),
            started_at=began, last_attempted_at=began, finished_at=_moment(job.ended_at),
            worker_ids=kept.get("worker_ids") or _workers({}, request.retries or 0, job),
        )  # fmt: skip
        if job.state is State.COMPLETED:
            _set(result, _return_value=backend._value(job.result))
        elif job.state in TERMINAL:
            result.errors.append(_error(job, backend._value(job.result)))
        return result


@shared_task(name="kathikon_celery.django.run_task", bind=True, ignore_result=False)
def run_task(self: Any, path: str, alias: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run the task of ``django.tasks`` at *path* for the backend *alias*."""
    return api.task_backends[alias].run(self.request, path, args, kwargs)


def all_of_ours() -> list[TasksBackend]:
    """Return those of the project's task backends that are a `TasksBackend`."""
    return [one for one in api.task_backends.all() if isinstance(one, TasksBackend)]


def _set(result: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(result, name, value)  # a result is frozen


def _moment(value: datetime | None) -> datetime | None:
    """Return a time as Django has it: without a zone if USE_TZ is false."""
    return timezone.make_naive(value) if value is not None and not settings.USE_TZ else value


def _status(job: Job) -> Any:
    if job.state is State.COMPLETED:
        return api.TaskResultStatus.SUCCESSFUL
    if job.state in TERMINAL:
        return api.TaskResultStatus.FAILED
    is_running = job.state in (State.RUNNING, State.WAITING_FOR_CHILDREN)
    return api.TaskResultStatus.RUNNING if is_running else api.TaskResultStatus.READY


def _workers(kept: Mapping[str, Any], retries: int, job: Job | None) -> list[str]:
    """Return the workers of the runs that have ended. The name of a lost one is not known any more."""
    known = list(kept.get("worker_ids") or ())
    ended = retries + (job.crashes if job is not None else 0)
    return known + [LOST] * (ended - len(known))


def _error(job: Job, stored: Any) -> Any:
    if isinstance(stored, dict) and "exc_type" in stored:
        path = f"{stored.get('exc_module') or 'builtins'}.{stored['exc_type']}"
    else:
        error = stored if isinstance(stored, BaseException) else error_of(job)
        path = f"{type(error).__module__}.{type(error).__qualname__}"
    return _base.TaskError(exception_class_path=path, traceback=job.traceback or job.reason or job.state.value)
