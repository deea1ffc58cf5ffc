"""Random canvases, as plain values that can be printed, shrunk and built as often as one likes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from celery import VERSION, Signature, chain, chord, group
from hypothesis import strategies as st

from tests.support.apps import echo, hand_over, note


@dataclass(frozen=True)
class Task:
    """A task that returns all that it is given. With *linked* so many tasks follow it that note what it returned."""

    label: int
    immutable: bool = False
    linked: int = 0

    def build(self, journal: str) -> Signature:
        signature = echo.si(self.label) if self.immutable else echo.s(self.label)
        for number in range(self.linked):
            signature.link(note.s(journal, f"{self.label} {number}"))
        return signature


@dataclass(frozen=True)
class Map:
    """The same task for each of several arguments, one after the other."""

    kind: str
    size: int

    def build(self, journal: str) -> Signature:
        if self.kind == "map":
            return echo.map(list(range(self.size)))
        pairs = [(number, str(number)) for number in range(self.size)]
        return echo.starmap(pairs) if self.kind == "starmap" else echo.chunks(pairs, 2).group()


@dataclass(frozen=True)
class Chain:
    links: list[Any]

    def build(self, journal: str) -> Signature:
        return chain(*[one.build(journal) for one in self.links])


@dataclass(frozen=True)
class Group:
    members: list[Any]

    def build(self, journal: str) -> Signature:
        return group([one.build(journal) for one in self.members])


@dataclass(frozen=True)
class Chord:
    header: list[Any]
    body: Any

    def build(self, journal: str) -> Signature:
        return chord([one.build(journal) for one in self.header], self.body.build(journal))


@dataclass(frozen=True)
class Replaced:
    """A task that leaves its work to a canvas."""

    by: Any

    def build(self, journal: str) -> Signature:
        return hand_over.si(self.by.build(journal))


tasks = st.builds(Task, st.integers(0, 9), st.booleans(), st.sampled_from([0, 0, 0, 1, 2]))
maps = st.builds(Map, st.sampled_from(["map", "starmap", "chunks"]), st.integers(3, 5))


def is_group(canvas: Any) -> bool:
    """Whether Celery takes it for a group, whose members become those of a group that it is in."""
    return isinstance(canvas, Group) or (isinstance(canvas, Map) and canvas.kind == "chunks")


def _ends_with_group(canvas: Any) -> bool:
    last = canvas.links[-1] if isinstance(canvas, Chain) else canvas.body if isinstance(canvas, Chord) else None
    return is_group(canvas) if last is None else _ends_with_group(last)


def _begins_with_header(canvas: Any) -> bool:
    if isinstance(canvas, Chain):
        return _begins_with_header(canvas.links[0])
    return is_group(canvas) or isinstance(canvas, Chord)


def _has_no_groups_in_line(links: list[Any]) -> bool:
    return not any(_ends_with_group(one) and _begins_with_header(other) for one, other in pairwise(links))


def _can_replace(canvas: Any) -> bool:
    return is_group(canvas) or not _ends_with_group(canvas)


def canvases(depth: int) -> st.SearchStrategy[Any]:
    """Canvases that are nested so deep at the most, and of which Celery's eager mode and its brokers say the same.

    What they do not agree on, seen with Redis as well:

    - a group of one: `maybe_unroll_group` puts its member in its place, in eager mode not everywhere;
    - a group as a member of a group or of a header: `group._freeze_unroll` turns its members round;
    - a group or a header after a group in a chain: what follows is sent by each member of the group before it, under
      the same ids, with the value of that member alone;
    - a task that is replaced by a chord with a group at its end: nothing ever ends under the task's own id;
    - before Celery 5.7, a chord without a header and with a group as its body, in a group: none of its members ends.
    """
    if not depth:
        return tasks | maps
    inner = canvases(depth - 1)
    members = inner.filter(lambda canvas: not is_group(canvas))
    return (
        inner
        | st.builds(Replaced, inner.filter(_can_replace))
        | st.builds(Chain, st.lists(inner, min_size=2, max_size=3).filter(_has_no_groups_in_line))
        | st.builds(Group, st.lists(members, min_size=2, max_size=3))
        | st.builds(Chord, st.lists(members, min_size=0 if VERSION >= (5, 7) else 1, max_size=3), inner)
    )
