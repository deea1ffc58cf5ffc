"""Tasks that complete in a transaction of SQLAlchemy, on the database of the jobs. Each leaves a row in ``effects``."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import Celery, group
from celery.exceptions import Ignore, Reject
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker

from kathikon_celery import current_session
from kathikon_celery.storage.errors import TransactionRefused
from tests.support.crash_points import kill_before, lose_at

app = Celery("shop")
app.config_from_object("kathikon_celery.config")
engine = create_engine(os.environ.get("KATHIKON_DATABASE_URL", "sqlite://"))
Session = sessionmaker(engine)


def note(what: str) -> None:
    """Insert a row in the task's transaction."""
    current_session().execute(text("INSERT INTO effects (what) VALUES (:what)"), {"what": what})


@app.task
def same(value: Any) -> Any:
    """Return *value*; has no transaction."""
    return value


@app.task(bind=True, transaction=Session)
def done(self: Any, what: str) -> str:
    """Return, having sent a task."""
    assert self.session is current_session()
    note(what)
    same.apply_async((what,), task_id=f"sent by {what}")
    return what


@app.task(transaction=Session, ignore_result=True)
def silent(what: str) -> None:
    """Return, without a result."""
    note(what)


@app.task(transaction=Session)
def fails(what: str) -> None:
    """Raise, having sent a task."""
    note(what)
    same.apply_async((what,), task_id=f"sent by {what}")
    raise ValueError(what)


@app.task(bind=True, transaction=Session, max_retries=2)
def retries(self: Any, what: str) -> str:
    """Retry twice."""
    note(f"{what} {self.request.retries}")
    if self.request.retries < 2:
        raise self.retry(countdown=0.01)
    return what


@app.task(transaction=Session)
def ignores(what: str) -> None:
    """Raise Ignore."""
    note(what)
    raise Ignore


@app.task(transaction=Session)
def rejects(what: str) -> None:
    """Raise Reject."""
    note(what)
    raise Reject(what, requeue=False)


@app.task(bind=True, transaction=Session)
def replaces(self: Any, what: str) -> Any:
    """Replace itself by a group."""
    note(what)
    return self.replace(group(same.s(1), same.s(2)))


@app.task(transaction=Session)
def commits(what: str) -> None:
    """End the transaction by itself, which is an error."""
    note(what)
    current_session().commit()


@app.task(bind=True, transaction=Session)
def dies_once(self: Any, what: str) -> str:
    """Kill its own process in the first run."""
    note(f"{what} {bool(self.request.delivery_info['redelivered'])}")
    if not self.request.delivery_info["redelivered"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return what


@app.task(bind=True, transaction=Session)
def loses_claim(self: Any, what: str) -> str:
    """Lose its job, which is cancelled while the body runs."""
    statement = text("UPDATE kathikon_jobs SET state = 'cancelled', fence = fence + 1 WHERE id = :id")
    with engine.begin() as connection:
        connection.execute(statement, {"id": self.request.id})
    note(what)
    return what


@app.task(transaction=Session, time_limit=1)
def hangs(what: str) -> None:
    """Write, and go on for too long."""
    note(what)
    time.sleep(600)


@app.task(bind=True, transaction=Session)
def dies_at(self: Any, number: int) -> int:
    """Kill its own process in the first run, before the given statement of its transaction."""
    return _breaks(self, kill_before, number)


@app.task(bind=True, transaction=Session, autoretry_for=(OperationalError, TransactionRefused), default_retry_delay=0)
def loses_at(self: Any, number: int) -> int:
    """Lose its connection in the first run, at the given statement of its transaction."""
    return _breaks(self, lose_at, number)


def _breaks(self: Any, act: Any, number: int) -> int:
    if not self.request.delivery_info["redelivered"] and not self.request.retries:
        act(number, self.session.connection())
    note(f"{number}")
    same.apply_async((number,), task_id=f"sent by {number}")
    return number
