from __future__ import annotations

import inspect

import pytest

from kathikon_celery.job import Job, State
from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from kathikon_celery.storage.engine.database import Database
from kathikon_celery.testing.doubles import storage_double


def test_it_has_no_jobs_whatever_it_is_asked() -> None:
    double = storage_double()
    assert double.all(queue="default", state=State.DEAD) == double.claim("default", limit=3) == []
    assert double.prunable_jobs() == []
    assert double.fetch("1") is double.next_due() is double.insert(Job(id="1")) is None
    assert double.promote_scheduled() == double.discard_expired() == double.prune() == double.delete(["1"]) == 0
    assert double.counts() == {}


def test_every_verb_returns_what_the_true_one_may_return() -> None:
    double = storage_double()
    kinds = {"int": int, "list": list, "dict": dict}
    for name, verb in inspect.getmembers(Storage, inspect.isfunction):
        if not name.startswith("_"):
            declared = verb.__annotations__["return"]
            returned = getattr(double, name).return_value
            assert isinstance(returned, kinds.get(declared.partition("[")[0], type(None))), name


def test_it_is_as_strict_as_the_storage() -> None:
    double = storage_double()
    assert isinstance(double, Storage)
    assert isinstance(double.database, Database)
    with pytest.raises(AttributeError, match="claim_all"):
        double.claim_all  # noqa: B018
    with pytest.raises(TypeError, match="job_id"):
        double.fetch()  # type: ignore[call-arg]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATHIKON_LEASE", "3")
    assert storage_double().settings == Settings()
    assert storage_double(Settings(lease=5)).settings.lease == 5


def test_doubles_share_nothing() -> None:
    one, other = storage_double(), storage_double()
    one.all.return_value.append(Job(id="1"))  # type: ignore[attr-defined]
    one.promote_scheduled.return_value = 3  # type: ignore[attr-defined]
    assert (other.all(), other.promote_scheduled()) == ([], 0)
