"""Traces: OpenTelemetry's spans of Celery, with what the table knows of each run. Needs the extra ``[traces]``.

>>> from celery.signals import worker_process_init
>>> @worker_process_init.connect(weak=False)   # exporters have threads, which a fork does not copy
... def begin(**kwargs):
...     trace.set_tracer_provider(...)
...     tracing.instrument()
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery.signals import task_prerun
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor

from kathikon_celery.settings.brokers import broker_of, is_kathikon
from kathikon_celery.storage import Storage


def instrument(tracer_provider: trace.TracerProvider | None = None) -> None:
    """Record spans for the messages that this process sends, and for the tasks that it runs. May be called twice.

    `opentelemetry.instrumentation.celery` makes the spans of publications and runs, and links them, also through a
    canvas; if it is in use already, its spans are not doubled. Each run of a job of Kathikon gets the attributes
    ``kathikon.queue_time`` (seconds from being ready to the claim), ``kathikon.attempt``, ``kathikon.fence`` and
    ``kathikon.priority``, and a span beside it for the wait in the queue. A run costs one more query.

    >>> @worker_process_init.connect(weak=False)
    ... def begin(**kwargs):
    ...     tracing.instrument()

    Arguments:
        tracer_provider: default: OpenTelemetry's global one.
    """
    contrib = CeleryInstrumentor()
    if not contrib.is_instrumented_by_opentelemetry:
        contrib.instrument(tracer_provider=tracer_provider)
    tracer = trace.get_tracer("kathikon_celery", tracer_provider=tracer_provider)

    def add(sender: Any, task_id: str, **kwargs: Any) -> None:
        if is_kathikon(broker_of(sender.app.conf)):
            _add(tracer, sender.app, task_id)

    task_prerun.connect(add, weak=False, dispatch_uid="kathikon-tracing")


def _add(tracer: trace.Tracer, app: Any, task_id: str) -> None:
    """Write what the row says of the present run."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    job = Storage.for_app(app).fetch(task_id)
    if job is None or job.claimed_at is None:
        return
    ready = max(filter(None, (job.inserted_at, job.available_at)), default=job.claimed_at)
    ready = min(ready, job.claimed_at)
    attributes = {
        "kathikon.queue_time": (job.claimed_at - ready).total_seconds(),
        "kathikon.attempt": job.attempts,
        "kathikon.fence": job.fence,
        "kathikon.priority": job.priority,
    }
    span.set_attributes(attributes)
    parent = getattr(span, "parent", None)
    context = trace.set_span_in_context(trace.NonRecordingSpan(parent)) if parent is not None else None
    wait = tracer.start_span(f"wait/{job.queue}", context=context, start_time=_nanoseconds(ready))
    wait.set_attribute("messaging.message.id", job.id)
    wait.end(_nanoseconds(job.claimed_at))


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1000
