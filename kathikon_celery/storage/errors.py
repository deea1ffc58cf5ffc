"""Storage's errors. Their texts name the remedy."""

from __future__ import annotations

from click import ClickException
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout


class StorageError(ClickException):  # so Celery's command line shows it without a traceback
    """Base of the errors that storage raises itself."""


class Unavailable(StorageError):
    """The database cannot be reached, or cannot be used as it is; trying again later may help."""


class UnknownDatabase(StorageError, ValueError):
    """A URL names a kind of database that Kathikon does not support."""


class SchemaError(StorageError):
    """The tables do not fit this version of the code."""


class TablesInUse(StorageError):
    """Other transactions keep the tables from being upgraded."""


class Forbidden(StorageError):
    """The connected role has no privilege to do what is needed."""


class TransactionRefused(StorageError):
    """An open transaction of the caller's cannot take a job: nothing was sent, and the transaction may be over."""


class Refused(StorageError):
    """The database cannot carry out a statement; trying again does not help."""


class NotFound(StorageError):
    """There is no job with that id, or no schedule or limit with that name."""


class MovedOn(StorageError):
    """The job was claimed, given back or published since it was read."""


class NotUnique(StorageError):
    """A job with the same unique key is there; nothing was sent.

    >>> try:
    ...     sync.delay(7)
    ... except NotUnique as error:
    ...     print(error.job_id)

    Arguments:
        task: the name of the task that was called.
        job_id: the id of the job that is there.
    """

    def __init__(self, task: str, job_id: str) -> None:
        super().__init__(f"task {task}: job {job_id} has the same unique key")
        self.task, self.job_id = task, job_id

    def __reduce__(self) -> tuple[type[NotUnique], tuple[str, str]]:
        return NotUnique, (self.task, self.job_id)


#: Errors after which a call may succeed on a new connection.
LOST = (Unavailable, OperationalError, InterfaceError, DisconnectionError, PoolTimeout)


def is_lost(error: BaseException) -> bool:
    """Whether *error* says that the connection is gone or the database away, not that the statement is wrong."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, LOST)


def is_refusal(error: BaseException) -> bool:
    """Whether *error* says that the database, which can be reached, does not do what it was asked to do."""
    is_ours = isinstance(error, StorageError) and not isinstance(error, Refused)
    return isinstance(error, Exception) and not is_lost(error) and not is_ours


def in_words(error: BaseException) -> str:
    """Return the database's own message, without statement and parameters."""
    original = getattr(error, "orig", None)
    return " ".join(str(original or error).split())
