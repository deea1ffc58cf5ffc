"""The pages that users read: short sentences, and no long page without a table or a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.readability import measure, sentences

ROOT = Path(__file__).parents[2]
#: For those who change Kathikon.
INTERNAL = {"architecture.md", "internals.md"}
PAGES = [ROOT / "README.md", *(page for page in sorted(ROOT.glob("docs/*.md")) if page.name not in INTERNAL)]
SCREENS = 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    assert measure(page.read_text("utf-8")).mean <= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_long_page_has_a_table_or_a_picture(page: Path) -> None:
    text = page.read_text("utf-8")
    assert len(text.splitlines()) <= SCREENS or "\n| --- |" in text or "![" in text


def test_what_is_counted() -> None:
    text = """# Title

One `two` three. It is sent now.

```python
x = 1. Y
```

| a | b |

- an [item](x.md#y)
  of two lines
"""
    assert sentences(text) == ["One Datum three.", "It is sent now.", "an item of two lines"]
    found = measure(text)
    assert (found.sentences, found.words, found.longest) == (3, 12, 5)
    assert found.passive == pytest.approx(1 / 3)
