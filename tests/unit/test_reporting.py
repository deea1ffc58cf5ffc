"""What becomes of a report that the database refuses."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DataError, OperationalError

from kathikon_celery.consume.delivery import CRASHED, Delivery, Outcome, Verdict
from kathikon_celery.consume.reporting import Reports, write_one
from kathikon_celery.job import Cause, Job, State
from kathikon_celery.storage.names import printable

FAILED = Outcome(
    Verdict.ENDED, State.DEAD, Cause.RAISED, "ValueError('\N{HIRAGANA LETTER A}')", "FAILURE", "a traceback"
)


def written(refusals: int) -> tuple[Outcome | None, list[Outcome], list[str | None]]:
    """Write FAILED; the database refuses so often. Return what was accepted, each attempt, and its text."""
    attempts: list[Outcome] = []
    texts = []

    def write(reports: Reports) -> None:
        ((_, outcome),) = reports
        attempts.append(outcome)
        texts.append(printable(outcome.reason))
        if len(attempts) <= refusals:
            raise DataError("UPDATE", {}, Exception("no such letter"))

    return write_one(write, Delivery(Job(id="job"), "default", 0.0), FAILED), attempts, texts


def test_an_accepted_report_is_written_once() -> None:
    accepted, attempts, texts = written(0)
    assert accepted is FAILED
    assert (attempts, texts) == ([FAILED], [FAILED.reason])


def test_a_refused_report_is_escaped_then_brief_then_a_crash_then_nothing() -> None:
    accepted, _, texts = written(1)
    assert accepted == FAILED
    assert accepted is not FAILED
    assert texts[1] == r"ValueError('\u3042')"
    brief, _, texts = written(2)
    reason = "the database cannot store how the task ended: no such letter"
    assert brief == Outcome(Verdict.ENDED, State.DEAD, Cause.REFUSED, reason, "FAILURE")
    assert written(3)[0] is CRASHED
    assert written(4)[0] is None


def test_a_lost_database_refuses_nothing() -> None:
    def write(reports: Reports) -> None:
        raise OperationalError("UPDATE", {}, Exception("gone"))

    with pytest.raises(OperationalError):
        write_one(write, Delivery(Job(id="job"), "default", 0.0), FAILED)
