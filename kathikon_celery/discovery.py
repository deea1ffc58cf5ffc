"""Makes ``kathikon+postgresql://…`` a broker's URL in a process in which nobody has imported this package.

Kombu knows its transports by a table in its code. But when its module of serializers is first imported, which each
Celery app does before it connects, it loads all that the entry point group ``kombu.serializers`` names. Ours is this
module, and to import it is to import `kathikon_celery`, which enters the transport into kombu's table.
"""

from __future__ import annotations

#: The arguments with which kombu registers a serializer: one without an encoder and a decoder, which nobody can choose.
SERIALIZER = (None, None, "application/x-kathikon")
