"""How easily the pages of the documentation read: `python -m tests.support.readability docs README.md`.

Counts the prose of a page: paragraphs and list items. Code blocks, tables, headings and pictures are left out. Code
within a sentence counts as one word of two syllables. All measures are approximations:

- a sentence ends at `.`, `!`, `?` or `:` before a space and a capital letter, a backquote or a quote, and at the end of
  its paragraph or list item;
- a sentence is passive if a form of "to be" or "to get" comes before a participle, with at most two words between them;
  "is interested" counts, and "the job sent" does not;
- syllables are groups of vowels, without a silent "e" at the end. Flesch's reading ease is 206.835 - 1.015 * (words per
  sentence) - 84.6 * (syllables per word): 60 and more is plain English, below 50 is difficult.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

_IRREGULAR = (
    "been|begun|bound|broken|brought|built|bought|caught|chosen|cut|done|drawn|driven|fed|felt|found|forgotten|given|gone"
    "|got|gotten|grown|handed|heard|held|hidden|hit|kept|known|laid|led|left|lent|let|lost|made|meant|met|paid|put|read|run"
    "|said|seen|sent|set|shown|shut|sold|spent|split|spread|stood|stolen|taken|taught|thought|thrown|told|torn|understood"
    "|woken|won|worn|written|rewritten|rerun"
)
_PASSIVE = re.compile(
    rf"\b(?:is|are|was|were|be|been|being|gets?|got)\s+(?:\w+\s+){{0,2}}?(?:\w{{2,}}ed|{_IRREGULAR})\b", re.IGNORECASE
)
_END = re.compile(r"(?<=[.!?:])\)?\s+(?=[\"'“(]?[A-Z`\"])")


@dataclass(frozen=True)
class Measures:
    """What was counted in one page; `passive` is a share from 0 to 1."""

    lines: int
    words: int
    sentences: int
    mean: float
    longest: int
    passive: float
    ease: float


def sentences(text: str) -> list[str]:
    """Return the sentences of the prose of a page in Markdown."""
    text = re.sub(r"^( *)```.*?^\1```$", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", " ", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "Datum", text).replace("**", "").replace("…", "")
    pieces: list[list[str]] = [[]]
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("|", "#")):
            pieces.append([])
            continue
        item = re.match(r"(?:[-*]|\d+\.)\s+(.*)", stripped)
        if item:
            pieces.append([item[1]])
        else:
            pieces[-1].append(stripped)
    found = [part for piece in pieces for part in _END.split(" ".join(piece))]
    return [part for part in found if words(part)]


def words(sentence: str) -> list[str]:
    """Return the words of a sentence."""
    return re.findall(r"[A-Za-z0-9][\w'’.,-]*", sentence)


def syllables(word: str) -> int:
    """Return about how many syllables a word has."""
    plain = re.sub(r"[^a-z]", "", word.lower())
    return max(1, len(re.findall(r"[aeiouy]+", re.sub(r"(?<=[^aeiouyl])e$|(?<=[^aeiouytd])ed$", "", plain))))


def measure(text: str) -> Measures:
    """Return the measures of a page in Markdown."""
    found = sentences(text)
    counts = [len(words(sentence)) for sentence in found] or [0]
    total = sum(counts) or 1
    mean = total / len(counts)
    per_word = sum(syllables(word) for sentence in found for word in words(sentence)) / total
    passive = sum(bool(_PASSIVE.search(sentence)) for sentence in found) / len(counts)
    ease = 206.835 - 1.015 * mean - 84.6 * per_word
    return Measures(len(text.splitlines()), sum(counts), len(found), mean, max(counts), passive, ease)


def main(names: list[str]) -> None:
    """Print a table of the pages, with folders standing for their pages."""
    paths = [
        path for name in names for path in (sorted(Path(name).glob("*.md")) if Path(name).is_dir() else [Path(name)])
    ]
    print(f"{'page':38} lines  words  mean  longest  passive  ease")
    for path in paths:
        page = measure(path.read_text("utf-8"))
        print(
            f"{path.name:38} {page.lines:5d} {page.words:6d} {page.mean:5.1f} {page.longest:8d}"
            f" {page.passive:8.0%} {page.ease:5.0f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or ["docs", "README.md"])
