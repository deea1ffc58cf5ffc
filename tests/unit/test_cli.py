from __future__ import annotations

import sqlite3
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from kathikon_celery.cli import kathikon
from kathikon_celery.job import Job
from kathikon_celery.storage import Storage, nodes
from kathikon_celery.storage.schema import HEAD
from kathikon_celery.storage.tables import metadata


def invoke(app: Celery, *arguments: str) -> Result:
    context = CLIContext(app=app, no_color=True, workdir=None)
    return CliRunner().invoke(kathikon, arguments, obj=context)


def make_app(url: str, **conf: Any) -> Celery:
    app = Celery("proj", set_as_current=False)
    app.config_from_object("kathikon_celery.config")
    app.conf.update(kathikon_database_url=url, **conf)
    return app


def tables_in(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kathikon.db"


@pytest.fixture
def app(path: Path) -> Celery:
    return make_app(f"sqlite:///{path}")


def test_celery_finds_the_command() -> None:
    (found,) = entry_points(group="celery.commands", name="kathikon")
    assert found.load() is kathikon


def test_schema_makes_the_tables(app: Celery, path: Path) -> None:
    for _ in range(2):
        result = invoke(app, "schema")
        assert (result.exit_code, result.output) == (0, f"The schema of sqlite:///{path} has version {HEAD}.\n")
    assert set(metadata.tables) <= tables_in(path)


def test_the_sql_makes_the_same_tables(app: Celery, path: Path, tmp_path: Path) -> None:
    sql = invoke(app, "schema", "--sql").output
    assert not path.exists()
    own = tmp_path / "own.db"
    with closing(sqlite3.connect(own)) as connection:
        connection.executescript(sql)
    invoke(app, "schema")
    assert tables_in(own) == tables_in(path)
    storage = Storage(f"sqlite:///{own}")
    storage.setup()
    storage.insert(Job(id="1", task="proj.add"))
    assert storage.counts() == {("default", "available"): 1}
    storage.close()


def test_sql_is_for_the_database_of_the_app_which_need_not_be_there() -> None:
    result = invoke(make_app("postgresql://app:hunter2@db.invalid/jobs"), "schema", "--sql")
    assert result.exit_code == 0
    assert 'TEXT COLLATE "C"' in result.output
    assert "hunter2" not in result.output


def test_sql_since_a_version(app: Celery) -> None:
    assert invoke(app, "schema", "--sql", "--since", HEAD).output.strip() == ""
    unknown = invoke(app, "schema", "--sql", "--since", "0000")
    assert unknown.exit_code == 1
    *_, known = unknown.output.strip().partition("; known to this code: ")
    assert unknown.output.startswith("Error: the schema has no version '0000'; ")
    assert known.split(", ") == [f"{number:04}" for number in range(1, int(HEAD) + 1)]


def test_since_goes_with_sql(app: Celery, path: Path) -> None:
    result = invoke(app, "schema", "--since", HEAD)
    assert result.exit_code == 2
    assert "--since goes with --sql" in result.output
    assert not path.exists()


def test_counts(app: Celery) -> None:
    assert invoke(app, "counts").output == "There are no jobs.\n"
    storage = Storage.for_app(app)
    storage.insert_many([Job(id=str(number), queue="mail", task="proj.send") for number in range(1000)])
    storage.insert(Job(id="first", queue="default", task="proj.add"))
    storage.claim("default")
    counted = ["queue    state       jobs", "default  claimed        1", "mail     available  1,000"]
    result = invoke(app, "counts")
    assert result.stdout.splitlines() == counted
    assert result.stderr == "No worker consumes mail.\n"


def test_counts_names_only_queues_that_surely_have_no_worker(app: Celery) -> None:
    storage = Storage.for_app(app)
    storage.insert_many([Job(id=queue, queue=queue, task="proj.send") for queue in ("mail", "p\x00st")])
    living = [nodes.register(storage.database, name, "here", 1, 1.0, lease=60.0) for name in ("one", "flower")]
    assert invoke(app, "counts").stderr == ""  # a worker of an older version does not say what it consumes
    for node, queues in zip(living, (["mail"], []), strict=True):
        nodes.consume(storage.database, node.id, queues)
    assert invoke(app, "counts").stderr == "No worker consumes p\\x00st.\n"
    nodes.consume(storage.database, living[0].id, ["mail", "p\x00st"])
    assert invoke(app, "counts").stderr == ""
    nodes.renew(storage.database, living[0], lease=-1.0)
    assert invoke(app, "counts").stderr == "No worker consumes mail, p\\x00st.\n"


@pytest.mark.parametrize("command", ["schema", "counts"])
def test_an_app_with_another_broker(command: str) -> None:
    app = Celery("shop", broker="redis://:hunter2@localhost", set_as_current=False)
    result = invoke(app, command)
    assert result.exit_code == 1
    assert result.output.startswith("Error: the broker of 'shop' is 'redis://:***@localhost', not Kathikon;")


def test_a_database_that_is_away_is_one_line() -> None:
    result = invoke(make_app("postgresql://app:hunter2@127.0.0.1:1/jobs"), "counts")
    assert result.exit_code == 1
    assert result.output.startswith("Error: <Database postgresql+psycopg://app:***@127.0.0.1:1/jobs> is away:")
    assert len(result.output.splitlines()) == 1
