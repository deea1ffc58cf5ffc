"""The page of the command line, made from the help of ``celery kathikon``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc

import click

from kathikon_celery.cli import kathikon

_HEAD = """# Commands

What `celery -A proj kathikon …` knows; `--help` behind each command prints it. [Look after your jobs](../operate.md)
says when to use which. In a Django project `manage.py kathikon …` is the same.
"""


def page() -> str:
    """Return the page, in Markdown."""
    return "\n".join([_HEAD, *_commands(kathikon, "kathikon")])


def _commands(group: click.Group, name: str) -> Iterator[str]:
    for command in group.commands.values():
        if not command.hidden:
            whole = f"{name} {command.name}"
            if isinstance(command, click.Group):
                yield f"## {whole}\n\n{_text(command)}\n"
                yield from _commands(command, whole)
            else:
                yield from _command(command, whole)


def _command(command: click.Command, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    yield f"{'#' * (name.count(' ') + 1)} {name}\n"
    yield f"```console\n$ celery -A proj {name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    yield f"{_text(command)}\n"
    for one in command.params:
        record = one.get_help_record(context) if isinstance(one, click.Option) else None
        if record is not None:
            names, said = record
            if choice := re.fullmatch(r"(.+) \[([\w|]+)\]", names):
                names, said = choice[1], f"one of {choice[2].replace('|', ', ')}. {said}"
            yield f"- `{names}`: {_escaped(said)}" if said else f"- `{names}`"
    yield ""


def _text(command: click.Command) -> str:
    return _escaped(cleandoc((command.help or "").replace("\b\n", "")))


def _escaped(text: str) -> str:
    """Return plain text as Markdown; names and examples in single quotes are code."""
    text = re.sub(r"'([^'\n]*[^'\w\s][^'\n]*)'(?!\w)", r"`\1`", text)
    text = re.sub(r"(?<![`\w])(--[a-z][\w-]*)(?![`\w])", r"`\1`", text)
    return re.sub(r"`[^`]*`|\*", lambda found: "\\*" if found[0] == "*" else found[0], text)
