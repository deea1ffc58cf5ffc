"""The transaction in which a task runs: the end of the task is written there too, and commits it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kombu.exceptions import EncodeError

from kathikon_celery.job import Hold, Job, State
from kathikon_celery.publish import outbox
from kathikon_celery.publish.callers import Caller
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import StorageError, TransactionRefused, in_words
from kathikon_celery.storage.settle import JobEnd, TaskEnd

logger = logging.getLogger(__name__)

#: The columns of an end without a result.
NOTHING = dict.fromkeys(("status", "result", "traceback", "meta"))
#: Beginnings of the SQLSTATEs after which the transaction may be run again: serialization, connection, operator.
AGAIN = ("40", "08", "57")


#: What psycopg and psycopg2 say of a connection that was closed here, and not lost: another run would close it again.
CLOSED = ("the connection is closed", "connection already closed")
_NOT_COMMITTED = "the task's transaction was not committed"


class CommitLost(BaseException):
    """The database asks to run the transaction again, or is gone: Celery must not record an end of the task."""


class CommitRefused(EncodeError):  # Celery records this error, at this moment, as the task's failure
    """The database has refused the commit, or the task's body has spoiled the transaction."""


class Completion:
    """The open transaction of one run.

    Arguments:
        hold: the claim of the run.
        caller: writes in the transaction.
        commit, abort: end the transaction.
        session: SQLAlchemy's session, if the task's transaction is one.
    """

    def __init__(
        self,
        storage: Storage,
        hold: Hold,
        caller: Caller,
        commit: Callable[[], None],
        abort: Callable[[], None],
        session: Any = None,
    ) -> None:
        self.caller, self.session = caller, session
        self._host, self._hold = storage, hold
        self._commit, self._undo = commit, abort
        self._is_open = True
        self._again: Job | None = None

    @property
    def storage(self) -> Storage:
        """The storage in the transaction. Raises `TransactionRefused` for another database."""
        guest = self.caller.guest(self._host)
        if guest is None:
            raise TransactionRefused(
                f"the task's transaction is not one of {self._host.database!r}, where its job is;"
                " name a transaction of that database, or leave the option transaction out"
            )
        return guest

    def check(self) -> None:
        """Raise `TransactionRefused` when the transaction is one of another database."""
        _ = self.storage

    def publish_own(self, job: Job) -> None:
        """Keep the job that the task publishes under its own id, a retry or by `self.replace`, until the body ends."""
        self._again = job

    def ignore(self, task_id: str, is_replaced: bool) -> None:
        """Commit, with the end of a task that has raised ``Ignore``."""
        with self.errors():
            there = self.storage
            if self._again is not None:
                is_ours = there.backend.insert(self._again, self._hold)
            elif is_replaced:
                with there.database.once() as connection:
                    is_ours = there.backend.replaced(connection, [self._hold]) > 0
            else:
                end = JobEnd(task_id=task_id, hold=self._hold, state=State.COMPLETED, written=NOTHING)
                is_ours = there.backend.settle(TaskEnd(ends=[end]), {})
        self.end(task_id, is_ours)

    def end(self, task_id: str, is_ours: bool) -> None:
        """Commit, or roll back if the run has lost its claim."""
        if is_ours:
            with self.errors():
                self._commit()
                self._is_open = False
            return
        self._abort()
        logger.warning(
            "Kathikon: job %s had ended, or had been given to others, before it ended here; its transaction was rolled"
            " back", task_id,
        )  # fmt: skip

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Roll back after an error. Raises `CommitLost` or `CommitRefused`."""
        try:
            yield
        except Exception as error:
            self._abort()
            said = error.message if isinstance(error, StorageError) else f"{_NOT_COMMITTED}: {in_words(error)}"
            raise (CommitLost if _may_run_again(error) else CommitRefused)(said) from error

    def _abort(self) -> None:
        if self._is_open:
            self._is_open = False
            try:
                self._undo()
            except Exception as error:  # the connection is lost, and with it the transaction
                logger.warning("Kathikon: the transaction of a task was lost: %s", in_words(error))

    def roll_back(self) -> Job | None:
        """Undo all that the body has done; return the job that the body wants to publish under its own id."""
        self._abort()
        return self._again


@contextmanager
def beginning() -> Iterator[None]:
    """Raise `CommitLost` instead of an error with which no transaction begins, but after which one may."""
    try:
        yield
    except Exception as error:
        if not _may_run_again(error):
            raise
        raise CommitLost(f"the task's transaction did not begin: {in_words(error)}") from error


def _may_run_again(error: BaseException | None) -> bool:
    """Whether another run of the transaction may succeed. The driver's error may be wrapped by SQLAlchemy or Django."""
    while error is not None:
        if any(said in str(error) for said in CLOSED):
            return False
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if state:
            return str(state).startswith(AGAIN)
        if type(error).__name__ in ("OperationalError", "InterfaceError") and error.__cause__ is None:
            return True
        error = getattr(error, "orig", None) or error.__cause__
    return False


def current_session() -> Any:
    """Return the session of SQLAlchemy in whose transaction the present task runs.

    >>> @app.task(transaction=Session)
    ... def ship(order_id):
    ...     current_session().get(Order, order_id).state = "shipped"

    Raises `RuntimeError` outside of a task with ``transaction=`` a sessionmaker, also when it is called as a function.
    """
    completion = outbox.scope().completion
    if completion is None or completion.session is None:
        raise RuntimeError("no task with transaction=<a sessionmaker> runs here, so there is no session; open your own")
    return completion.session
