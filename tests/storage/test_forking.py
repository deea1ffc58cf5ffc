"""A forked child uses the parent's storage, while another thread of the parent is in the middle of its writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: Forks while a thread writes; each child looks, writes, claims and forks once more.
SCRIPT = """
import os
import sys
import threading
from contextlib import closing
from pathlib import Path

from sqlalchemy import text

from kathikon_celery.settings import Settings
from kathikon_celery.storage import Storage
from tests.storage.actors import Worker, new_job

CHILDREN = 8

def wait_for(pid):
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}"

def fork(function):
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)

def open_files():
    folder = Path("/proc/self/fd")
    names = [os.readlink(entry) for entry in folder.iterdir() if entry.exists()] if folder.exists() else []
    return [name for name in names if "kathikon.db" in name]

def connection_of(storage):
    with storage.database.read() as connection:
        return connection.execute(text("SELECT pg_backend_pid()")).scalar() if postgresql else None

def work(name):
    assert open_files() == [], open_files()
    if postgresql:
        assert connection_of(storage) not in parents
    storage.insert(new_job(name))
    assert storage.fetch(name)
    worker = Worker(storage)
    assert worker.complete(worker.claim_one()) == 1
    with storage.database.write() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1

def child(number):
    work(f"child-{number}")
    wait_for(fork(lambda: work(f"grandchild-{number}")))
    work(f"child-{number}-again")
    storage.close()

def write():
    try:
        while not stop.is_set():
            written.append(None)
            storage.insert(new_job(f"parent-{len(written)}", body="x" * 10000))
            with storage.database.write() as connection:
                connection.execute(text("UPDATE kathikon_groups SET result = ''"))
                under_way.set()
            storage.counts()
    except BaseException as error:
        failed.append(error)
        raise

with closing(Storage(sys.argv[1], Settings())) as storage:
    storage.setup()
    postgresql = storage.database.dialect.name == "postgresql"
    stop, under_way, written, failed = threading.Event(), threading.Event(), [], []
    threads = [threading.Thread(target=write)]
    storage.insert_many([new_job(f"first-{number}") for number in range(3 * CHILDREN)])
    for thread in threads:
        thread.start()
    children = []
    for number in range(CHILDREN):
        under_way.clear()
        assert under_way.wait(30)
        parents = {connection_of(storage) for _ in range(3)}
        children.append(fork(lambda: child(number)))
        assert storage.fetch("first-0")
    for pid in children:
        wait_for(pid)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failed, failed
    expected = len(written) + 3 * CHILDREN * 2
    assert len(storage.all()) == expected, (len(storage.all()), expected)
    assert sum(number for (_, state), number in storage.counts().items() if state == "completed") == 3 * CHILDREN
    if not postgresql:
        with storage.database.read() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
print("all is well")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_child_uses_its_parents_storage(database_url: str) -> None:
    # From Python 3.12 on, fork() warns of threads: that they are no matter here is what is tested.
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", SCRIPT, database_url]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("all is well\n", "", 0)
