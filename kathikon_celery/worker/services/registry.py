"""The services of a worker: a new service is one more entry in `SERVICES`, and a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import bootsteps

from kathikon_celery import beat
from kathikon_celery.results.unattended import tell
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from kathikon_celery.worker.services.lifeline import Lifeline
from kathikon_celery.worker.services.promoter import Promoter
from kathikon_celery.worker.services.pruner import Pruner
from kathikon_celery.worker.services.scheduler import Scheduler
from kathikon_celery.worker.services.service import Service

if TYPE_CHECKING:
    from celery import Celery


@dataclass(frozen=True)
class Entry:
    """A service that every worker runs.

    What the service asks with the idle query, and whether a call to all nodes ends its sleep, is said by its class: see
    `Service.questions` and `Service.heeds_calls`.
    """

    name: str
    #: Makes the service for one worker.
    make: Callable[[Celery, Storage], Service]
    #: Whether the workers of an app run it.
    is_wanted: Callable[[Celery], bool] = lambda app: True


#: All services.
SERVICES = (
    Entry("promoter", lambda app, storage: Promoter(storage=storage, interval=storage.settings.scheduler_interval)),
    Entry("pruner", lambda app, storage: Pruner(storage=storage, interval=storage.settings.prune_interval)),
    Entry(
        "scheduler",
        lambda app, storage: Scheduler(app=app, storage=storage),
        lambda app: app.conf.beat_scheduler == beat.NAME and not Settings.load(app.conf).in_tests,
    ),
    Entry("lifeline", lambda app, storage: Lifeline(storage=storage, tell=partial(tell, app, storage))),
)


class ServiceStep(bootsteps.StartStopStep):
    """Runs the service of one entry for the life of the worker."""

    abstract = True
    requires = ("celery.worker.components:Pool",)
    entry: Entry

    def include_if(self, parent: Any) -> bool:
        return self.entry.is_wanted(parent.app)

    def create(self, parent: Any) -> Service:
        service = self.entry.make(parent.app, Storage.for_app(parent.app, setup=False))
        vars(parent).setdefault("kathikon_services", []).append(service)
        return service


#: A step of the worker for each entry.
STEPS = [
    type(f"{entry.name.title()}Step", (ServiceStep,), {"entry": entry, "__module__": __name__}) for entry in SERVICES
]


def services_of(worker: Any) -> list[Service]:
    """The services that run in *worker*, Celery's `WorkController`."""
    return list(getattr(worker, "kathikon_services", ()))
