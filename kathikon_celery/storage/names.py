"""Makes names and texts of any length and alphabet fit for every database."""

from __future__ import annotations

import json
from hashlib import blake2b
from uuid import UUID

#: Longest key, in bytes of UTF-8: shorter than the longest index entry of every database.
MAX_KEY_BYTES = 190


def key(name: str | UUID) -> str:
    """Return *name* if it can be a key, else ``#`` and a digest. Raises `TypeError` if it is no text or UUID."""
    if not isinstance(name, str):
        if not isinstance(name, UUID):
            raise TypeError(f"{name!r} is no name: give a text or a UUID")
        name = str(name)
    if len(name) <= MAX_KEY_BYTES // 4 and name.isascii() and "\0" not in name:
        return name
    data = name.encode("utf-8", "surrogatepass")
    if len(data) <= MAX_KEY_BYTES and b"\0" not in data and b"\xed" not in data and not name.startswith("#"):
        return name
    return "#" + blake2b(data, digest_size=20).hexdigest()


def printable(text: str | None) -> str | None:
    """Return *text* with escapes for what some databases cannot store: NUL, and halves of surrogate pairs."""
    if text is None or (text.isascii() and "\0" not in text):
        return text
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def label(name: str) -> str:
    """Return *name* if every database can store it, else *name* as JSON; `name_of` undoes it."""
    return json.dumps(name) if name.startswith('"') or printable(name) != name else name


def name_of(label: str) -> str:
    """Return the name that `label` has encoded."""
    return str(json.loads(label)) if label.startswith('"') else label
