"""What is used of other packages beyond their public names is there, and where it is not, its user is left out."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from kathikon_celery import internals
from kathikon_celery.internals import PARTS, Part, is_met, is_usable, missing

DOCS = Path(__file__).parents[2] / "docs" / "internals.md"


@pytest.mark.parametrize("need", [pytest.param(need, id=need) for part in PARTS for need in part.needs])
def test_it_is_there(need: str) -> None:
    assert is_met(need)


@pytest.mark.parametrize(
    "need",
    [
        "no_such_module:name",
        "json:no_such_name",
        "json:JSONEncoder.no_such_method",
        "json:JSONEncoder.encode(self, other)",  # it is called o
        "json:JSONEncoder.encode(self, o, more)",
        "json:JSONEncoder.encode(self)",  # o has no default
        "shutil:copyfile(src, dst, unknown=)",
        "json:JSONEncoder.__init__ > no_such_attribute",
    ],
)
def test_it_is_not_there(need: str) -> None:
    assert not is_met(need)


@pytest.mark.parametrize(
    "need",
    [
        "json:JSONEncoder.item_separator",
        "json:JSONEncoder.encode(self, o)",
        "json:dumps(obj, indent=)",
        "json:JSONEncoder.__init__ > skipkeys",
        "math:hypot(anything)",  # its signature is not known
    ],
)
def test_other_ways_to_say_it(need: str) -> None:
    assert is_met(need)


def test_a_part_that_is_left_out_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    part = Part("the brake", "the car rolls on", ("json:dumps", "json:gone", "json:loads(x)"))
    assert missing(part) == ["json:gone", "json:loads(x)"]
    with caplog.at_level(logging.WARNING):
        assert [is_usable(part), is_usable(part)] == [False, False]
    [record] = caplog.records
    assert record.getMessage() == (
        "Kathikon leaves out the brake, since this version of what it builds on has no json:gone, no json:loads(x)"
        " (as Kathikon knows it): the car rolls on"
    )


def test_a_part_that_has_all_it_needs_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    assert all(map(is_usable, PARTS))
    assert not caplog.records


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_docs_list_it(part: Part) -> None:
    section = DOCS.read_text().partition(f"## {part.name[0].upper()}{part.name[1:]}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^- `(.*)`$", section, re.MULTILINE) == list(part.needs)
    assert part.instead in " ".join(section.split())


def test_every_part_of_the_module_is_in_the_list() -> None:
    assert [one for one in vars(internals).values() if isinstance(one, Part)] == list(PARTS)
