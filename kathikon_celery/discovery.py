"""Makes ``kathikon+postgresql://…`` known to kombu in a process that does not import this package.

Kombu's transports are a table in its code, without entry points. But kombu's module of serializers, which each Celery
app imports before it connects, loads the entry points ``kombu.serializers``. Ours names this module. Importing it
imports `kathikon_celery`, which adds the transport to kombu's table.
"""

from __future__ import annotations

#: Arguments of kombu's `register` for a serializer without encoder and decoder, which cannot be used.
SERIALIZER = (None, None, "application/x-kathikon")
