"""Roles of PostgreSQL with no more rights than docs/postgresql.md grants them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from kombu.exceptions import OperationalError
from sqlalchemy import create_engine, make_url, text

from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from kathikon_celery.storage.errors import Forbidden
from tests.integration.conftest import client_of
from tests.storage.actors import new_job
from tests.support import apps
from tests.support.workers import ROOT, WorkerProcess

pytestmark = pytest.mark.postgresql

ROLES = ("owner", "worker", "producer", "reader")


def grants() -> dict[str, list[str]]:
    """By role the GRANTs of the documentation."""
    (block,) = re.findall(r"```sql\n(-- a worker.*?)```", (ROOT / "docs" / "postgresql.md").read_text(), re.DOTALL)
    statements = [one.strip() for one in re.sub(r"--.*", "", block).split(";") if one.strip()]
    return {role: [one for one in statements if one.endswith(f"TO {role}")] for role in ROLES[1:]}


class Roles:
    """New roles in a database whose schema ``public`` is closed to all but the owner of the tables."""

    def __init__(self, url: str) -> None:
        self._url, self._suffix = make_url(url), uuid.uuid4().hex[:8]
        self._run("REVOKE ALL ON SCHEMA public FROM public")
        for role in ROLES:
            self._run(f"CREATE ROLE {self._named(role)} LOGIN")
        self._run(f"GRANT USAGE, CREATE ON SCHEMA public TO {self._named('owner')}")

    def _named(self, role: str) -> str:
        return f"kathikon_{role}_{self._suffix}"

    def _run(self, statement: str) -> None:
        engine = create_engine(self._url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def url(self, role: str) -> str:
        return self._url.set(username=self._named(role)).render_as_string(hide_password=False)

    def grant(self, role: str) -> None:
        """Grant what the documentation says."""
        for statement in grants()[role]:
            self._run(re.sub(rf"{role}$", self._named(role), statement))

    def revoke(self, role: str, right: str) -> None:
        self._run(f"REVOKE {right} FROM {self._named(role)}")

    def drop(self) -> None:
        for role in ROLES:
            self._run(f"DROP OWNED BY {self._named(role)}")
            self._run(f"DROP ROLE {self._named(role)}")


@pytest.fixture
def roles(postgresql_url: str) -> Iterator[Roles]:
    """Roles whose rights are those of the documentation, after the owner has made the tables."""
    roles = Roles(postgresql_url)
    try:
        with closing(Storage(roles.url("owner"), Settings())) as storage:
            storage.setup()
        for role in ROLES[1:]:
            roles.grant(role)
        yield roles
    finally:
        roles.drop()


def test_each_role_does_its_work_and_no_more(roles: Roles, tmp_path: Path) -> None:
    with WorkerProcess(roles.url("worker"), directory=tmp_path, pool="threads").start() as worker:
        with client_of(roles.url("producer")) as app:
            assert apps.add.delay(1, 1).get(timeout=60) == 2
            assert apps.add.apply_async((1, 1), countdown=0.1).get(timeout=60) == 2
            assert chain(apps.add.s(1, 1), apps.add.s(1))().get(timeout=60) == 3
            saved = group(apps.add.s(n, 1) for n in range(3))()
            saved.save()
            assert app.GroupResult.restore(saved.id).get(timeout=60) == [1, 2, 3]
            saved.delete()
            assert chord((apps.add.s(n, 1) for n in range(3)), apps.total.s())().get(timeout=60) == 6
        with client_of(roles.url("worker")) as app:
            assert app.control.ping(timeout=10, limit=1) == [{worker.hostname: {"ok": "pong"}}]
        assert worker.stop() == 0
        assert "Traceback" not in worker.log
        assert "permission denied" not in worker.log
    with closing(Storage(roles.url("reader"), Settings())) as storage:
        storage.setup()
        assert sum(storage.counts().values()) == len(storage.all()) > 10
        with pytest.raises(Forbidden, match=r"permission denied for (table|sequence) kathikon_"):
            storage.insert(new_job())
    with closing(Storage(roles.url("producer"), Settings())) as storage:
        storage.setup()
        for forbidden in (lambda: storage.delete("job"), storage.clear_jobs):
            with pytest.raises(Forbidden, match="permission denied for table kathikon_"):
                forbidden()


@pytest.mark.parametrize(
    ("right", "words"),
    [
        ("USAGE ON SCHEMA public", "permission denied for schema public|no schema has been selected to create in"),
        ("SELECT ON kathikon_version", "permission denied for table kathikon_version"),
        ("INSERT ON kathikon_jobs", "permission denied for table kathikon_jobs"),
        ("UPDATE (waiting) ON kathikon_nodes", "permission denied for table kathikon_nodes"),
        ("USAGE ON SEQUENCE kathikon_jobs_seq_seq", "permission denied for sequence kathikon_jobs_seq_seq"),
    ],
)
def test_a_missing_right_is_named(roles: Roles, right: str, words: str) -> None:
    roles.revoke("producer", right)
    with client_of(roles.url("producer")), pytest.raises((Forbidden, OperationalError), match=words) as raised:
        apps.add.delay(1, 1)
    assert "docs/postgresql.md" in str(raised.value) or "kathikon_schema" in str(raised.value)


@pytest.mark.parametrize("schema", [None, "jobs"])
def test_a_producer_that_finds_no_tables_says_who_has_to_make_them(postgresql_url: str, schema: Any) -> None:
    roles = Roles(postgresql_url)
    try:
        storage = Storage(roles.url("producer"), Settings(schema=schema))
        with closing(storage), pytest.raises(Forbidden, match=r"celery -A proj kathikon schema|kathikon_schema"):
            storage.setup()
    finally:
        roles.drop()
