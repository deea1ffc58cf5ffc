"""What becomes of a report that the database refuses."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DataError, OperationalError

from kathikon_celery.consume.delivery import CRASHED, Delivery, Outcome, Verdict
from kathikon_celery.consume.reporting import Reports, write_one
from kathikon_celery.job import Cause, Job, State

FAILED = Outcome(
    Verdict.ENDED, State.DEAD, Cause.RAISED, "ValueError('\N{HIRAGANA LETTER A}')", "FAILURE", "a traceback"
)


def written(refusals: int) -> tuple[Outcome | None, list[Outcome]]:
    """Write FAILED; the database refuses so often. Return what was accepted, and each attempt."""
    attempts: list[Outcome] = []

    def write(reports: Reports) -> None:
        ((_, outcome),) = reports
        attempts.append(outcome)
        if len(attempts) <= refusals:
            raise DataError("UPDATE", {}, Exception("no such letter"))

    return write_one(write, Delivery(Job(id="job"), "default", 0.0), FAILED), attempts


def test_an_accepted_report_is_written_once() -> None:
    accepted, attempts = written(0)
    assert accepted is FAILED
    assert attempts == [FAILED]


def test_a_refused_report_is_brief_then_a_crash_then_nothing() -> None:
    reason = "the database cannot store how the task ended: no such letter"
    assert written(1)[0] == Outcome(Verdict.ENDED, State.DEAD, Cause.REFUSED, reason, "FAILURE")
    assert written(2)[0] is CRASHED
    assert written(3)[0] is None


def test_a_lost_database_refuses_nothing() -> None:
    def write(reports: Reports) -> None:
        raise OperationalError("UPDATE", {}, Exception("gone"))

    with pytest.raises(OperationalError):
        write_one(write, Delivery(Job(id="job"), "default", 0.0), FAILED)
