"""The sample app whose processes write their spans to the file of ``SPANS``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from celery.signals import worker_process_init
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from kathikon_celery import tracing
from tests.support.apps import app, append_line

__all__ = ["app"]


class ToFile(SpanExporter):
    """One line of JSON for each span."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write the spans."""
        for span in spans:
            attributes = dict(span.attributes or {})
            line = {
                "name": span.name,
                "id": span.get_span_context().span_id,
                "trace": span.get_span_context().trace_id,
                "parent": span.parent.span_id if span.parent else None,
                "begin": span.start_time,
                "end": span.end_time,
                "job": attributes.get("messaging.message.id"),
                "attributes": attributes,
            }
            append_line(os.environ["SPANS"], json.dumps(line, default=str))
        return SpanExportResult.SUCCESS


@worker_process_init.connect(weak=False)
def begin(**kwargs: Any) -> None:
    """Twice: the second call changes nothing."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ToFile()))
    tracing.instrument(provider)
    tracing.instrument(provider)
