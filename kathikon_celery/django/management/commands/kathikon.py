"""``manage.py kathikon …``: the same as ``celery -A proj kathikon …``."""

from __future__ import annotations

import sys
from argparse import REMAINDER
from contextlib import redirect_stdout
from typing import Any

from celery import current_app
from celery.bin.base import CLIContext
from click import ClickException
from django.core.management.base import BaseCommand, CommandError

from kathikon_celery.cli import kathikon


class Command(BaseCommand):
    """Delegates to the group of commands that Celery's command line has."""

    help = "Looks after the tables that the jobs live in: celery kathikon."
    requires_system_checks = ()

    def add_arguments(self, parser: Any) -> None:
        """Take all arguments as they are."""
        parser.add_argument("arguments", nargs=REMAINDER, help="a command and its options, as of celery kathikon")

    def run_from_argv(self, argv: list[str]) -> None:
        """Leave all options to the group of commands, also ``--help``; Django has taken its own."""
        parser = self.create_parser(argv[0], argv[1], add_help=False, allow_abbrev=False)
        options, others = parser.parse_known_args(argv[2:])
        try:
            self.execute(**{**vars(options), "arguments": [*others, *options.arguments]})
        except CommandError as error:
            self.stderr.write(f"{error.__class__.__name__}: {error}")
            sys.exit(error.returncode)

    def handle(self, *args: Any, arguments: list[str], **options: Any) -> None:
        """Run a command of the group."""
        context = CLIContext(app=current_app._get_current_object(), no_color=options["no_color"], workdir=None)
        self.stdout.ending = ""  # click ends its lines itself
        try:
            with redirect_stdout(self.stdout):
                kathikon.main(list(arguments), "manage.py kathikon", standalone_mode=False, obj=context)
        except ClickException as error:
            raise CommandError(error.format_message(), returncode=error.exit_code) from error
