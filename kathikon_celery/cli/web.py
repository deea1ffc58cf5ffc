"""The command ``web``: the dashboard on an address of its own."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from kombu.utils.imports import symbol_by_name

from kathikon_celery.cli.common import storage_of
from kathikon_celery.cli.group import kathikon
from kathikon_celery.operate.kathikon import Kathikon

if TYPE_CHECKING:
    from celery.bin.base import CLIContext

AUTH_HELP = (
    "file:PATH with a line name:password or name:password:reader for each user; none, on this machine only; or"
    " module:callable. Default: a token in the address that is printed."
)


@kathikon.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=5555, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--auth", help=AUTH_HELP)
@click.option("--read-only", is_flag=True, help="Nobody may act.")
@click.option("--redact", multiple=True, help="Names of arguments whose values are hidden; * and ? as in jobs --task.")
@click.option("--root-path", default="", help="The path that a proxy removes, such as /jobs.")
@click.pass_obj
def web(
    context: CLIContext,
    host: str,
    port: int,
    auth: str | None,
    read_only: bool,
    redact: tuple[str, ...],
    root_path: str,
) -> None:
    """Serve the dashboard: queues, jobs, workers, schedules, live, and all that these commands do."""
    try:
        import uvicorn

        from kathikon_celery.web import create_app
        from kathikon_celery.web.access import Token
        from kathikon_celery.web.showing import SECRETS
    except ImportError as error:
        raise click.ClickException(f"{error}; pip install 'kathikon-celery[web]'") from error
    if root_path and not (root_path.startswith("/") and not root_path.endswith("/")):
        raise click.UsageError(f"--root-path {root_path!r} must begin with a slash, and not end with one.")
    storage_of(context).setup()
    operator = Kathikon(context.app).operator
    chosen = _auth(auth, host, operator)
    app = create_app(context.app, auth=chosen, read_only=read_only, redact=redact or SECRETS)
    server = uvicorn.Server(
        uvicorn.Config(app, host, port, log_level=logging.WARNING, root_path=root_path, timeout_graceful_shutdown=1)
    )
    socket = server.config.bind_socket()
    socket.listen(100)  # whoever opens the address at once waits, and is not refused
    app.state.dashboard.is_ending = lambda: server.should_exit
    address = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}/"
    click.echo(f"{address}?token={chosen.token}" if isinstance(chosen, Token) else address)
    server.run(sockets=[socket])


def _auth(text: str | None, host: str, operator: str) -> Any:
    from kathikon_celery.web.access import Basic, Nobody, Token

    if text is None:
        return Token(operator)
    if text == "none":
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise click.UsageError(f"--auth none is for this machine only; {host!r} can be reached by others.")
        return Nobody(operator)
    try:
        if text.startswith("file:"):
            return Basic(*_users(Path(text.removeprefix("file:"))))
        found = symbol_by_name(text)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        raise click.UsageError(f"--auth {text}: {error}") from error
    if not callable(found):
        raise click.UsageError(f"--auth {text}: that is no callable")
    return found


def _users(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return those who may act, and those who may only read. Raises `ValueError` for a line that is wrong."""
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ValueError(f"others may read {path}: chmod 600 {path}")
    users: dict[str, str] = {}
    readers: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.strip().partition(":")
        password, is_reader = (rest.removesuffix(":reader"), rest.endswith(":reader"))
        if not name or not password:
            raise ValueError(f"line {number} of {path} is not name:password or name:password:reader")
        (readers if is_reader else users)[name] = password
    return users, readers
