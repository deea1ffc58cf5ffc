"""Which databases a broker setting names."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from kathikon_celery.settings import SettingError
from kathikon_celery.settings.brokers import broker_of, databases_of, is_kathikon

A, B = "kathikon+postgresql+psycopg://app:secret@a/jobs", "kathikon+postgresql://app:secret@b/jobs?sslmode=require"
FILE = "kathikon+sqlite:///jobs.db"


@pytest.mark.parametrize(
    ("value", "databases"),
    [
        (None, ()),
        ("", ()),
        ("kathikon://", ()),
        (["kathikon://localhost//"], ()),
        ("amqp://guest@localhost//", ()),
        (FILE, ("sqlite:///jobs.db",)),
        ([FILE], ("sqlite:///jobs.db",)),
        (f"{FILE};{FILE}", ("sqlite:///jobs.db",)),
        (f"{FILE};", ("sqlite:///jobs.db",)),
        (A, ("postgresql+psycopg://app:secret@a/jobs",)),
        (
            (A, B),
            ("postgresql+psycopg://app:secret@a/jobs", "postgresql+psycopg://app:secret@b/jobs?sslmode=require"),
        ),
    ],
)
def test_databases(value: Any, databases: tuple[str, ...]) -> None:
    assert databases_of(value) == databases


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("kathikon+", "a SQLAlchemy URL"),
        ("kathikon://server/jobs", "allowed is kathikon:// for the database"),
        (f"{A};amqp://guest:secret@localhost//", "a list in which each broker is Kathikon's and names its database"),
        ([A, "kathikon://"], "a list in which each broker is Kathikon's and names its database"),
        ([FILE, "kathikon+sqlite:///other.db"], "several servers of PostgreSQL, which have the same data"),
        ([A, FILE], "several servers of PostgreSQL, which have the same data"),
        ([A, "redis://:secret@h/0"], "a list in which each broker is Kathikon's"),
        ([A, "postgresql://app:secret@b/jobs"], "a list in which each broker is Kathikon's"),
        ([A, "kathikon+oracle://b/jobs"], "a URL that begins with one of"),
    ],
)
def test_what_is_wrong_is_named_without_its_password(value: Any, said: str) -> None:
    with pytest.raises(SettingError) as raised:
        databases_of(value, "broker_read_url")
    assert raised.value.message.startswith("broker_read_url = ")
    assert said in raised.value.message
    assert "secret" not in raised.value.message


@pytest.mark.parametrize(
    ("settings", "broker"),
    [
        ({"broker_url": FILE}, FILE),
        ({"broker_read_url": A, "broker_write_url": B}, A),
        ({"broker_write_url": B, "broker_url": "memory://"}, B),
        ({"broker_read_url": B, "broker_url": "memory://"}, B),
        ({"broker_url": "memory://"}, "memory://"),
    ],
)
def test_the_broker_of_an_app(settings: dict[str, str], broker: str) -> None:
    app = Celery(set_as_current=False)
    app.conf.update(settings)
    assert broker_of(app.conf) == broker
    assert is_kathikon(broker_of(app.conf)) is broker.startswith("kathikon")
