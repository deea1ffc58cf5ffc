"""``make test-upstream``: Celery's and kombu's own tests, on Redis and on Kathikon, and what passes on Redis only.

pip fetches the source distributions of the installed versions into a temporary folder; nothing of them is kept. Each
suite runs on each broker, with the configuration that the suite has and, with ``--late-acks``, with the switches of
`kathikon_celery.config`. It takes hours in all, so choose::

    python -m tests.upstream --suite celery-smoke --broker sqlite --broker redis -- -k test_control

What comes after ``--`` is for pytest. Needed: ``redis-server``, and a PostgreSQL as for the other tests. Docker is
not needed: `tests.support.containers` runs the smoke suite's containers as processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree as ET

from kathikon_celery import config
from tests.conftest import SERVER_VARIABLE
from tests.support.containers import BROKER_VARIABLE, LATE_ACKS_VARIABLE, RedisServer
from tests.support.postgresql import PostgreSQLServer, new_database

SUITE_VARIABLE = "UPSTREAM_SUITE"
ROOT = Path(__file__).parents[1]
BROKERS = ("redis", "sqlite", "postgresql")
SUITES = {
    "celery-integration": ("celery", "t/integration"),
    "celery-smoke": ("celery", "t/smoke"),
    "kombu-integration": ("kombu", "t/integration/test_upstream.py"),
}
#: What the suites import beyond what the tests of this project need: some without what they need themselves, so that
#: no other pytest than the installed one is there.
PLUGINS = ["pytest-rerunfailures", "pytest-order", "pytest-subtests", "freezegun"]
LIBRARIES = ["pydantic", "cryptography", "requests"]
OUTCOMES = ("passed", "failed", "skipped")

#: kombu has no suite for any broker, but classes for one.
KOMBU_SUITE = """
import os
import kombu
import pytest
from .common import BaseEventLoop, BaseExchangeTypes, BaseMessage, BasicFunctionality
from .test_redis import test_RedisPriority as RedisPriority

REDIS = os.environ["TEST_BROKER"].startswith("redis")

@pytest.fixture
def connection():
    return kombu.Connection(os.environ["TEST_BROKER"])

@pytest.fixture
def invalid_connection():
    return kombu.Connection(os.environ["TEST_INVALID_BROKER"])

class test_functionality(BasicFunctionality): pass
class test_exchange_types(BaseExchangeTypes): pass
class test_priority(RedisPriority):
    PRIORITY_ORDER = "desc" if REDIS else "asc"

    @pytest.fixture(autouse=True)
    def order(self, request, monkeypatch):
        # Two tests have the order of Redis: 0 is the highest.
        publish = kombu.Producer.publish
        if not REDIS and "simple_queue" not in request.node.name and "simple_buffer" not in request.node.name:
            def turned(*args, priority, **options):
                return publish(*args, priority=9 - priority, **options)
            monkeypatch.setattr(kombu.Producer, "publish", turned)
class test_message(BaseMessage): pass
class test_event_loop(BaseEventLoop): pass
"""
INVALID = {
    "redis": "redis://127.0.0.1:1",
    "sqlite": "kathikon+sqlite:////nowhere/kathikon.db",
    "postgresql": "kathikon+postgresql+psycopg://postgres@127.0.0.1:1/postgres",
}

#: Where the suites ask for Redis though they need none, and where they know two brokers alone.
EDITS = {
    "t/integration/*.py": [
        ("app.conf.result_backend.startswith('redis')", "app.conf.result_backend.startswith(('redis', 'kathikon'))"),
        ('app.conf.result_backend.startswith("redis")', 'app.conf.result_backend.startswith(("redis", "kathikon"))'),
    ],
    "t/smoke/tests/test_worker.py": [
        ('pytest.fail(f"Unsupported broker: {type(broker).__name__}")', 'disconnect_cmd = ["disconnect"]'),
    ],
}
#: A task of the smoke suite leaves this file in its container; here the next run would find the file.
LEFT_BEHIND = Path("/tmp/kill_child_process_once")
#: These ask about Redis itself.
ABOUT_REDIS = "test_redis_backend.py"
#: These ask about Azure and Memcached.
DROPPED = ["celery/t/integration/test_backend.py", "celery/t/smoke/tests/test_memcached_backend.py"]


def unpack(folder: Path) -> None:
    """Put the suites of the installed Celery and kombu into *folder*, and what they import into its ``packages``."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "install", "--target", folder / "packages"]
    subprocess.run([*install, *LIBRARIES], check=True)
    subprocess.run([*install, "--no-deps", *PLUGINS], check=True)
    for package in ("celery", "kombu"):
        wanted = f"{package}=={version(package)}"
        subprocess.run([*pip, "download", "--no-deps", "--no-binary", package, "--dest", folder, wanted], check=True)
        (archive,) = folder.glob(f"{package}-*.tar.gz")
        target = folder / package
        target.mkdir()
        # Not the package itself: the installed one is the one to test.
        wildcards = ["--wildcards", "*/t/*", "*/pyproject.toml", "*/setup.cfg"]
        subprocess.run(["tar", "xf", archive, "-C", target, "--strip-components=1", *wildcards], check=True)
        for pattern, changes in EDITS.items():
            for file in target.glob(pattern):
                if file.name != ABOUT_REDIS:
                    text = file.read_text()
                    for old, new in changes:
                        text = text.replace(old, new)
                    file.write_text(text)
    for name in DROPPED:
        (folder / name).unlink()
    (folder / "kombu/t/integration/test_upstream.py").write_text(KOMBU_SUITE)
    (folder / "celery/conftest.py").write_text(f"""\
import os
pytest_plugins = ["tests.support.containers"] if os.environ["{SUITE_VARIABLE}"] == "celery-smoke" else []
""")


@contextmanager
def broker_urls(broker: str, postgresql: str, redis: RedisServer, folder: Path) -> Iterator[tuple[str, str]]:
    """The URLs of an empty broker and of its result backend."""
    with ExitStack() as stack:
        if broker == "redis":
            yield f"redis://127.0.0.1:{redis.port}/1", f"redis://127.0.0.1:{redis.port}/2"
        elif broker == "sqlite":
            database = stack.enter_context(tempfile.TemporaryDirectory(dir=folder)) + "/kathikon.db"
            yield f"kathikon+sqlite:///{database}", f"kathikon+sqlite:///{database}"
        else:
            url = stack.enter_context(new_database(postgresql))
            yield f"kathikon+{url}", f"kathikon+{url}"


def run(
    suite: str, broker: str, *, folder: Path, postgresql: str, late_acks: bool, arguments: list[str]
) -> dict[str, str]:
    """Run a suite on a broker. Returns the outcome of each test."""
    package, tests = SUITES[suite]
    LEFT_BEHIND.unlink(missing_ok=True)
    with RedisServer(folder) as redis, broker_urls(broker, postgresql, redis, folder) as (url, backend):
        overrides = {name: value for name in config.__all__ if isinstance(value := getattr(config, name), bool)}
        chosen = folder / "celery/integration-tests-config.json"  # which the suite reads
        chosen.write_text(json.dumps(overrides if late_acks else {}))
        report = folder / "report.xml"
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(folder / package), str(folder / "packages"), str(ROOT)]),
            "TEST_BROKER": url,
            "TEST_BACKEND": backend,
            "TEST_INVALID_BROKER": INVALID[broker],
            "REDIS_HOST": "127.0.0.1",  # some tasks of the suites note there that they ran
            "REDIS_PORT": str(redis.port),
            SERVER_VARIABLE: postgresql,
            SUITE_VARIABLE: suite,
            BROKER_VARIABLE: broker,
            LATE_ACKS_VARIABLE: "1" if late_acks else "",
        }
        pytest = [sys.executable, "-m", "pytest", "-q", "-rfEs", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        subprocess.run([*pytest, *(arguments or [tests])], cwd=folder / package, env=environment, check=False)
    return outcomes(report)


def outcomes(report: Path) -> dict[str, str]:
    """The outcome of each test in a JUnit report."""
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = max(outcome, found.get(name, ""), key=("", "skipped", "passed", "failed").index)
    return found


def table(results: dict[str, dict[str, str]]) -> Iterator[str]:
    """Lines for people: the counts of each broker, and the tests that pass on Redis alone."""
    yield f"{'':24}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)
    for name, found in results.items():
        counts = Counter(found.values())
        yield f"{name:24}" + "".join(f"{counts[outcome]:>9}" for outcome in OUTCOMES)
    for name, found in results.items():
        for test, outcome in found.items():
            if outcome != "passed" and results.get("redis", {}).get(test) == "passed":
                yield f"on Redis, not on {name}: {test} {outcome}"


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--suite", action="append", choices=SUITES, help="all of them, if none is named")
    options.add_argument("--broker", action="append", choices=BROKERS, help="all of them, if none is named")
    options.add_argument("--late-acks", action="store_true", help="with the switches of kathikon_celery.config")
    options.add_argument("--folder", type=Path, help="a folder that keeps what pip fetched, for the next time")
    options.add_argument("--json", type=Path, help="a file for the outcome of each test")
    own, _, for_pytest = " ".join(sys.argv[1:]).partition(" -- ")
    chosen = options.parse_args(own.split())
    everything: dict[str, dict[str, dict[str, str]]] = {}
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kathikon-upstream-")))
        if not (folder / "kombu").exists():
            unpack(folder)
        postgresql = os.environ.get(SERVER_VARIABLE) or stack.enter_context(PostgreSQLServer()).url
        for suite in chosen.suite or SUITES:
            results = everything[suite] = {}
            for broker in chosen.broker or BROKERS:
                results[broker] = run(
                    suite, broker, folder=folder, postgresql=postgresql,
                    late_acks=chosen.late_acks, arguments=for_pytest.split(),
                )  # fmt: skip
                if chosen.json:
                    chosen.json.write_text(json.dumps(everything, indent=1))
    for suite, results in everything.items():
        print(f"\n{suite}{' with late acks' if chosen.late_acks else ''}", *table(results), sep="\n")


if __name__ == "__main__":
    main()
