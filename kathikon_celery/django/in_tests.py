"""Django's tests, whose transactions never commit: what a test has sent is gone when the test's transaction is.

A block within a test, whose savepoint is released, counts as committed: what was sent in the block, to another database
than the test's, goes there before anything else that the test sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType, ref

from django.db import connections, transaction

from kathikon_celery.publish.callers import Caller
from kathikon_celery.storage import Storage

#: Job id -> the block of a test in which the job was sent.
_blocks: dict[str, ReferenceType[Any]] = {}


class Once:
    """A call after a commit. In a test, whose commit never comes, `catch_up` makes the call."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


def call_on_commit(alias: str, call: Callable[[], None]) -> None:
    """Call *call* after the commit of the database *alias*, once."""
    transaction.on_commit(Once(call), using=alias)


def is_of_test(block: Any) -> bool:
    """Whether *block* is one in which `TestCase` runs a test or its class, and which is never committed."""
    return getattr(block, "_from_testcase", False)


def _blocks_of_tests() -> list[Any]:
    open_ones = connections.all(initialized_only=True)
    return [block for one in open_ones for block in getattr(one, "atomic_blocks", ()) if is_of_test(block)]


def catch_up() -> None:
    """Send what blocks within this test have sent; call this when none of these blocks is open."""
    for connection in connections.all(initialized_only=True):
        blocks = getattr(connection, "atomic_blocks", ())
        if blocks and all(map(is_of_test, blocks)):
            for _, call, *_ in list(connection.run_on_commit):
                if isinstance(call, Once):
                    call()


def note(ids: Iterable[str]) -> None:
    """Note that the jobs *ids* were sent within the present test, if one runs in a transaction."""
    blocks = _blocks_of_tests()
    if blocks:
        _blocks.update(dict.fromkeys(ids, ref(blocks[-1])))


def forget_gone() -> list[str]:
    """Return the ids of the jobs whose tests are over, once."""
    blocks = _blocks_of_tests()
    gone = [one for one, block in _blocks.items() if not any(block() is known for known in blocks)]
    for one in gone:
        del _blocks[one]
    return gone


class InTest(Caller):
    """A test without another transaction than its own: jobs are sent at once."""

    def __init__(self) -> None:
        super().__init__(lambda storage: None, None)

    def write(self, storage: Storage, step: Callable[[Storage], Any], ids: Iterable[str] = ()) -> None:
        """Run *step* on the storage, after what was sent before."""
        catch_up()
        step(storage)
        note(ids)


#: The only one.
IN_TEST = InTest()
