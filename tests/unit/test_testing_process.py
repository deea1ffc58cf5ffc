from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kathikon_celery.testing.process import ProcessContainer
from tests.support.waiting import wait_until

#: Starts a child of its own, says so, and waits; on SIGTERM it ends with what SIGTERM says.
PARENT = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"heard"))  # print() may be under way
print("hello", os.environ["GREETED"], sys.argv[1:], child.pid, "ready.", flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[ProcessContainer] = []

    def make(*command: str, prompt: str = "ready.") -> ProcessContainer:
        made.append(
            ProcessContainer(
                command or ("python", "parent.py", "name@%h"),
                directory=tmp_path / "box",
                content={"parent.py": PARENT.encode(), "package/data.txt": b"42"},
                environment={"GREETED": "in /app", "PYTHONPATH": "/app"},
                prompt=prompt,
            )
        )
        return made[-1]

    yield make
    for container in made:
        container.kill()


def test_life(make: Any, tmp_path: Path) -> None:
    container = make()
    assert (container.status, container.logs(), container.attrs["State"]["Pid"]) == ("created", b"", 0)
    container.start()
    assert container.status == "running"
    greeting = f"hello in {tmp_path / 'box'} ['name@{container.short_id}'] "
    assert container.logs().decode().startswith(greeting)
    assert f"GREETED=in {tmp_path / 'box'}" in container.attrs["Config"]["Env"]
    assert (tmp_path / "box/package/data.txt").read_bytes() == b"42"

    container.kill(signal.SIGUSR1)
    wait_until(lambda: b"heard" in container.logs(), what="the signal was heard")
    assert container.status == "running"

    container.restart()
    assert container.logs().decode().count("hello") == 2
    container.stop()
    assert container.status == "exited"


@pytest.mark.parametrize("name", [None, "SIGKILL", "KILL", signal.SIGKILL, 9])
def test_nothing_survives_a_kill(make: Any, name: Any) -> None:
    container = make()
    container.start()
    child = psutil.Process(int(container.logs().split()[-2]))
    container.kill(name)
    container.kill(name)
    assert container.status == "exited"
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, what="the child is gone")


def test_a_command_that_ends_or_is_too_slow(make: Any) -> None:
    with pytest.raises(RuntimeError, match=r"did not say 'ready.' but:\nsorry") as raised:
        make("python", "-c", "print('sorry')").start()
    assert "python -c" in str(raised.value)
    slow = make("python", "parent.py", prompt="never said")
    with pytest.raises(RuntimeError, match="'never said' but:"):
        slow.start(timeout=0.3)
    assert slow.status == "exited"


#: Says which signals it hears, in the order in which it hears them. Half of the time it is busy, and hears none.
LISTENER = """
import os, signal, time
def hear(number, frame):
    os.write(1, f"heard {signal.Signals(number).name}\\n".encode())
for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1):
    signal.signal(number, hear)
print("ready.", flush=True)
while True:
    sum(range(2_000_000))
    time.sleep(0.05)
"""


def test_signals_are_heard_one_by_one_and_in_their_order(make: Any) -> None:
    container = make("python", "-c", LISTENER)
    container.start()
    sent = ["SIGTERM", "SIGQUIT", "SIGQUIT", "SIGUSR1", "SIGTERM", "SIGTERM", "SIGQUIT"]
    for name in sent:
        container.kill(name)
    wait_until(lambda: container.logs().count(b"heard") >= len(sent), what="all signals were heard")
    assert container.logs().decode().split("heard ")[1:] == [f"{name}\n" for name in sent]


def test_a_stopped_process_goes_on(make: Any) -> None:
    container = make("python", "-c", LISTENER)
    container.start()
    for name in ("SIGSTOP", "SIGUSR1", "SIGCONT"):
        container.kill(name)
    wait_until(lambda: b"heard SIGUSR1" in container.logs(), what="it goes on")


@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", 143), ("os.kill(os.getpid(), 9)", 137)],
)
def test_exit_codes(make: Any, ending: str, code: int) -> None:
    container = make("python", "-c", f"import os, sys; print('ready.', flush=True); sys.stdin.read(); {ending}")
    assert container.attrs["State"] == {"Status": "created", "Running": False, "Pid": 0, "ExitCode": 0}
    container.start()
    wait_until(lambda: container.status == "exited", what="it has ended")
    assert container.attrs["State"] == {"Status": "exited", "Running": False, "Pid": 0, "ExitCode": code}


def test_the_exit_code_is_that_of_the_last_run(make: Any) -> None:
    container = make()
    container.start()
    assert container.attrs["State"]["Running"] is True
    container.kill()
    assert container.attrs["State"]["ExitCode"] == 137
    container.start()
    assert container.attrs["State"]["ExitCode"] == 0


def test_the_session_ends_with_the_command(make: Any) -> None:
    container = make()
    container.start()
    child = psutil.Process(int(container.logs().split()[-2]))
    os.kill(container.attrs["State"]["Pid"], signal.SIGTERM)
    wait_until(lambda: container.status == "exited", what="it has ended")
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, what="the child is gone")


def test_the_folder_is_created(tmp_path: Path) -> None:
    container = ProcessContainer(
        ["python", "-c", "print('ready.')"], directory=tmp_path / "a" / "b", content={}, environment={}, prompt="ready."
    )
    container.start()


def test_exec_run(make: Any) -> None:
    container = make()
    container.start()
    code, output = container.exec_run("python -c \"import os; print(os.getcwd(), os.environ['WORKER_PID'])\"")
    assert (code, output.decode().split()) == (0, [str(container._directory), str(container.attrs["State"]["Pid"])])
    code, output = container.exec_run([sys.executable, "-c", "import sys; sys.exit('no')"])
    assert (code, output) == (1, b"no\n")
    code, output = container.exec_run("no-such-command --now")
    assert code == 127
    assert b"no-such-command" in output


def test_the_processes_of_a_worker(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kathikon_celery.testing.worker_utils import get_running_processes_info

    container = make()
    container.start()
    monkeypatch.setenv("WORKER_PID", str(container.attrs["State"]["Pid"]))
    known = json.loads(get_running_processes_info(["pid"]))
    assert [process["pid"] for process in known] == [container.attrs["State"]["Pid"], int(container.logs().split()[-2])]
    assert os.getpid() not in [process["pid"] for process in json.loads(get_running_processes_info())]
