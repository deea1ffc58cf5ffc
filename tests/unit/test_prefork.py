"""The prefork pool's pipes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kathikon_celery.worker import celery_pool
from kathikon_celery.worker.prefork import pool as prefork


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    for fd in (reader, writer):
        os.close(fd)


class Reading:
    """Reads a pipe as the event loop would."""

    def __init__(self, reader: int) -> None:
        self.got: list[Any] = []
        self.registered: list[int] = []
        self.fail_at: object = None
        handler = SimpleNamespace(handle_event=None)
        receive = prefork.ResultHandler._recv_message
        self.step = receive(handler, lambda fd, *_: self.registered.append(fd), reader, self.call)

    def call(self, message: Any) -> None:
        self.got.append(message)
        if message == self.fail_at:
            raise ValueError(message)

    def is_cut_off(self) -> bool:
        return next(self.step, "complete") is None


def packed(message: Any) -> bytes:
    data = pickle.dumps(message)
    return len(data).to_bytes(4, "big") + data


def test_all_that_has_come_is_read_at_once(pipe: tuple[int, int]) -> None:
    reading = Reading(pipe[0])
    os.write(pipe[1], b"".join(packed(("task", number)) for number in range(20)))
    assert not reading.is_cut_off()
    assert reading.got == [("task", number) for number in range(20)]
    assert reading.registered == []


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 30, 4000])
def test_a_message_that_is_cut_off(pipe: tuple[int, int], cut: int) -> None:
    reading, whole = Reading(pipe[0]), packed("first") + packed("x" * 5000)
    first = len(packed("first"))
    os.write(pipe[1], whole[: first + cut])
    assert reading.is_cut_off()
    assert reading.got == ["first"]
    assert reading.is_cut_off()  # nothing new
    os.write(pipe[1], whole[first + cut :])
    assert not reading.is_cut_off()
    assert reading.got == ["first", "x" * 5000]
    assert reading.registered == [pipe[0]]


def test_a_large_message(pipe: tuple[int, int]) -> None:
    reading, data = Reading(pipe[0]), packed(b"x" * 1_000_000)
    os.set_blocking(pipe[1], False)
    while data:
        data = data[os.write(pipe[1], data) :]
        assert reading.is_cut_off() or not data
    assert [len(message) for message in reading.got] == [1_000_000]


def test_the_end_of_the_pipe() -> None:
    reader, writer = os.pipe()
    os.write(writer, packed("whole")[:5])
    os.close(writer)
    reading = Reading(reader)
    assert reading.is_cut_off()
    with pytest.raises(OSError, match="End of file during message"):
        next(reading.step)
    with pytest.raises(EOFError):
        next(Reading(reader).step)
    os.close(reader)


def test_an_error_keeps_no_message_from_being_told(pipe: tuple[int, int]) -> None:
    reading = Reading(pipe[0])
    reading.fail_at = 1
    os.write(pipe[1], packed(1) + b"\0\0\0\1." + packed(2))
    with pytest.raises(ValueError, match="1"):
        next(reading.step)
    assert reading.got == [1, 2]


def test_a_pool_that_has_ended_runs_nothing() -> None:
    """The intake may ask as the worker ends."""
    pool = prefork.TaskPool(2)  # as before its start, it has no processes
    assert celery_pool.processes(SimpleNamespace(controller=SimpleNamespace(autoscaler=None), pool=pool)) == 0
