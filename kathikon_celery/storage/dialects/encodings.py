r"""Texts in a PostgreSQL database whose encoding is not UTF-8: a character that it cannot hold becomes ``\U{65e5}``.

The connection replaces the characters when it sends a text, and puts them back when it reads one. So nothing is lost,
and names are compared as usual. Other characters, such as é in LATIN1, are stored as they are.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

#: What begins an escape; in a text that has it already, its backslash is escaped.
_BEGIN = "\\U{"
_ESCAPE = re.compile(r"\\U\{([0-9a-f]{1,6})\}")
#: Encodings that hold every text. SQL_ASCII holds bytes, and the client's encoding is always UTF-8.
_HOLD_ALL = ("UTF8", "SQL_ASCII")


def escaped(text: str, encoding: str) -> str:
    """Return *text* with escapes for what *encoding*, one of Python's, lacks; `unescaped` undoes it."""
    if _BEGIN in text:
        text = text.replace(_BEGIN, f"{_BEGIN}5c}}U{{")
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(one if _holds(encoding, one) else f"{_BEGIN}{ord(one):x}}}" for one in text)
    return text


def unescaped(text: str) -> str:
    """Undo `escaped`."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text) if _BEGIN in text else text


def _holds(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def adapt(connection: Any) -> Callable[[str], str]:
    """Make a *connection* of psycopg escape and unescape texts, if its database needs that; return what unescapes."""
    server = connection.info.parameter_status("server_encoding") or "UTF8"
    if server in _HOLD_ALL:
        return str
    from psycopg.adapt import Dumper, Loader, PyFormat

    encoding = _python_name(server)
    usual = connection.adapters.get_dumper(str, PyFormat.TEXT)  # an extension class, which has no subclasses

    class Escaping(Dumper):
        oid = usual.oid

        def dump(self, obj: str) -> Any:
            return usual(str, connection).dump(escaped(obj, encoding))

    class Unescaping(Loader):
        def load(self, data: Any) -> str:
            return unescaped(bytes(data).decode())

    connection.adapters.register_dumper(str, Escaping)
    for name in ("text", "varchar"):
        connection.adapters.register_loader(name, Unescaping)
    return unescaped


def _python_name(server: str) -> str:
    """Return Python's name of an encoding with one byte for each character; of all others we send ASCII alone."""
    if not re.fullmatch(r"LATIN\d+|ISO_8859_\d+|WIN\d+", server):
        return "ascii"
    try:
        return codecs.lookup(server.replace("WIN", "cp")).name
    except LookupError:
        return "ascii"
