"""The command's group: every ``celery …`` imports it, so its commands are imported when one is asked for."""

from __future__ import annotations

from importlib import import_module

import click

import kathikon_celery.hook  # noqa: F401 (adds our parts to a worker that imports this module)

#: Each adds its commands to the group.
_MODULES = ("acting", "jobs", "limits", "queues", "schedules", "tables", "web")


class _CommandsAtFirstUse(click.Group):
    _is_complete = False

    def _complete(self) -> None:
        if not self._is_complete:
            for name in _MODULES:
                import_module(f"kathikon_celery.cli.{name}")
            self._is_complete = True

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._complete()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        self._complete()
        return super().get_command(ctx, cmd_name)


@click.group(name="kathikon", cls=_CommandsAtFirstUse)
def kathikon() -> None:
    """Look after the jobs, and the tables that they live in."""
