"""The dashboard as an ASGI application, and as a WSGI application."""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from anyio import CapacityLimiter, to_thread
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from kathikon_celery.metrics.serving import exposition, registry_of
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.schedules import timetable
from kathikon_celery.settings import shown
from kathikon_celery.storage.errors import NotFound, StorageError, in_words
from kathikon_celery.storage.status import capped
from kathikon_celery.web import showing
from kathikon_celery.web.access import FORGERY, HEADERS, Auth, User, cookie_of, is_forged, name_of_cookie, set_cookie
from kathikon_celery.web.acts import ACTS, Act, address
from kathikon_celery.web.pages import KNOWN, PAGES, Page, Visit
from kathikon_celery.web.shared import FRESH, Shared
from kathikon_celery.web.showing import SECRETS, Redaction

if TYPE_CHECKING:
    from celery import Celery

    from kathikon_celery.storage import Storage

#: Cookie: what the last act has done.
SAID = "kathikon_said"
#: Samples of the overview's curves.
SAMPLES = 300
#: Seconds after which an open page hears from us although nothing has changed: proxies close silent connections.
SIGN_OF_LIFE = 15.0
#: Seconds after which an open page asks again who looks.
ASKED_AGAIN = 5.0
#: Bytes of a form at most.
LONGEST_FORM = 200_000
#: Threads that read the tables at once: a database that waits keeps no other part of the process waiting.
READERS = 10


class Dashboard:
    """The pages and acts for one app.

    Arguments: as of `create_app`.
    """

    def __init__(
        self, place: Celery | Storage, auth: Auth, read_only: bool, redact: Iterable[str], is_live: bool
    ) -> None:
        self._place, self._auth, self._read_only, self._is_live = place, auth, read_only, is_live
        #: Whether the server is about to end: open pages end then.
        self.is_ending: Callable[[], bool] = lambda: False
        self._redaction = Redaction(redact)
        self._samples: deque[tuple[float, dict[str, int]]] = deque(maxlen=SAMPLES)
        self._shared = Shared()
        self._limiter: CapacityLimiter | None = None
        self._templates = Environment(
            loader=PackageLoader("kathikon_celery.web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self._templates.filters |= {
            "at": showing.at, "number": capped, "age": showing.age, "quoted": partial(quote, safe=""),
        }  # fmt: skip
        self._templates.globals |= {"address": address, "in_words": timetable.in_words}
        pages = [Route(path, self._page_at(path)) for path in PAGES]
        acts = [Route(path, self._act_at(act), methods=["POST"]) for path, act in ACTS.items()]
        static = StaticFiles(directory=Path(__file__).with_name("static"))
        others = [Route("/live", self._live), Route("/metrics", self._metrics), Mount("/static", static)]
        self.routes = [*others, *acts, *pages]
        self._registry = registry_of(place)
        self._where = shown(Kathikon(place).storage.database.url)
        self._title = self._where.rpartition("/")[2]

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        if self._limiter is None:
            self._limiter = CapacityLimiter(READERS)
        return await to_thread.run_sync(call, *args, limiter=self._limiter)

    # --- who

    async def _user(self, request: Request) -> User | Response:
        found: Any = await self._in_thread(self._auth, request)
        if inspect.isawaitable(found):
            found = await found
        if isinstance(found, Response):
            found.headers.update(HEADERS)
            return found
        if not isinstance(found, User):
            return PlainTextResponse("You may not see this.\n", 403, HEADERS)
        return User(found.name, may_act=False) if self._read_only else found

    def _visit(self, user: User, query: Iterable[tuple[str, str]]) -> Visit:
        known = {name: value for name, value in query if name in KNOWN and value}
        return Visit(self._place, user, known, self._redaction, self._samples, self._shared)

    # --- pages

    def _page_at(self, path: str) -> Any:
        page, template = PAGES[path]

        async def show(request: Request) -> Response:
            user = await self._user(request)
            if isinstance(user, Response):
                return user
            visit = self._visit(user, request.query_params.multi_items())
            return await self._answer(request, visit, template, partial(self._data, path, page, visit), path)

        return show

    def _data(self, path: str, page: Page, visit: Visit) -> dict[str, Any]:
        key = (path, tuple(sorted(visit.query.items())), visit.user.may_act)
        found: dict[str, Any] = self._shared.get(key, partial(page, visit))
        return found

    async def _answer(self, request: Request, visit: Visit, template: str, read: Any, path: str) -> Response:
        status = 200
        try:
            data = await self._in_thread(read)
        except Exception as error:
            status, text = _explained(error)
            template, data = "problem.html", {"text": text}
        token = cookie_of(request, FORGERY) or secrets.token_urlsafe(24)
        said = cookie_of(request, SAID)
        look = {"frame": "frame.html", "path": path, "token": token, "said": unquote(said) if said else None}
        answer = HTMLResponse(self._render(request, visit, template, data, **look), status, HEADERS)
        set_cookie(request, answer, FORGERY, token)
        if said:
            answer.delete_cookie(name_of_cookie(request, SAID), path=request.scope.get("root_path") or "/")
        return answer

    def _render(self, request: Request, visit: Visit, template: str, data: dict[str, Any], **more: Any) -> bytes:
        """Return the page. *more*: its ``frame``, ``path``, ``token`` of its forms, and what the last act ``said``."""
        more["here"] = f"{more['path']}?{urlencode(visit.query)}" if visit.query else more["path"]
        more["base"] = request.scope.get("root_path", "")
        more["is_live"] = self._is_live and template not in ("sure.html", "problem.html")
        more |= {"title": self._title, "where": self._where, "user": visit.user}
        text = self._templates.get_template(template).render(**data, **more)
        return text.encode("utf-8", "backslashreplace")  # half of a surrogate pair, in an argument

    # --- acts

    def _act_at(self, act: Act) -> Any:
        async def do(request: Request) -> Response:
            user = await self._user(request)
            if isinstance(user, Response):
                return user
            if not user.may_act:
                return PlainTextResponse("You may only read.\n", 403, HEADERS)
            form = await _form(request)
            if form is None:
                return PlainTextResponse("That is no form, or it is too long.\n", 413, HEADERS)
            if is_forged(request, form.get("token", "")):
                text = "This form is not from here, or it is too old: open the page again.\n"
                return PlainTextResponse(text, 403, HEADERS)
            visit = self._visit(user, ())
            try:
                done = await self._in_thread(act, visit, form)
            except Exception as error:
                return await self._answer(request, visit, "problem.html", partial(_raise, error), "")
            self._shared.forget()
            if done.template is not None:
                return await self._answer(request, visit, done.template, lambda: done.data, "")
            answer = RedirectResponse(request.scope.get("root_path", "") + done.to, 303, HEADERS)
            set_cookie(request, answer, SAID, quote(done.text))
            return answer

        return do

    # --- figures, for Prometheus

    async def _metrics(self, request: Request) -> Response:
        user = await self._user(request)
        if isinstance(user, Response):
            return user
        try:
            kind, text = await self._in_thread(exposition, self._registry, request.headers.get("accept", ""))
        except Exception as error:
            status, words = _explained(error)
            return PlainTextResponse(f"{words}\n", status, HEADERS)
        return Response(text, media_type=kind, headers=HEADERS)

    # --- live

    async def _live(self, request: Request) -> Response:
        user = await self._user(request)
        if isinstance(user, Response):
            return user
        path, _, query = request.query_params.get("of", "").partition("?")
        if not self._is_live or path not in PAGES:
            return PlainTextResponse("There is no such page.\n", 404, HEADERS)
        visit = self._visit(user, parse_qsl(query))
        headers = {**HEADERS, "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(request, visit, path), media_type="text/event-stream", headers=headers)

    async def _stream(self, request: Request, visit: Visit, path: str) -> AsyncIterator[bytes]:
        page, template = PAGES[path]
        read = partial(self._data, path, page, visit)
        token, last, silent, asked = cookie_of(request, FORGERY), b"", 0.0, monotonic()
        while not self.is_ending() and not await request.is_disconnected():
            if monotonic() - asked > ASKED_AGAIN:
                if await self._user(request) != visit.user:
                    return
                asked = monotonic()
            try:
                data = await self._in_thread(read)
                text = self._render(request, visit, template, data, frame="live.html", path=path, token=token)
            except Exception as error:
                text = f'<p class="problem" role="alert">{escape(_explained(error)[1])}</p>'.encode()
            if text != last:
                yield b"event: page\n" + b"".join(b"data: " + line + b"\n" for line in text.splitlines()) + b"\n"
                last, silent = text, 0.0
            elif silent >= SIGN_OF_LIFE:
                yield b": here\n\n"
                silent = 0.0
            await asyncio.sleep(FRESH)
            silent += FRESH


async def _form(request: Request) -> dict[str, str] | None:
    """Return the fields of a form; `None`: it is none, or it is too long."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        return None
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_FORM:
            return None
    try:
        return dict(parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=100))
    except ValueError:
        return None


def _raise(error: Exception) -> Any:
    raise error


def _explained(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the words for *error*; anything unexpected is raised."""
    if isinstance(error, NotFound):
        return 404, str(error)
    if isinstance(error, KeyError):
        return 400, f"the form has no {error}"
    if isinstance(error, ValueError | TypeError | OverflowError | RecursionError):
        return 400, str(error)
    if isinstance(error, StorageError):
        return 503, in_words(error)
    if type(error).__module__.startswith("sqlalchemy."):
        return 503, f"the database cannot be read: {in_words(error)}"
    raise error


def create_app(
    app: Celery | Storage, *, auth: Auth, read_only: bool = False, redact: Iterable[str] = SECRETS, live: bool = True
) -> Starlette:
    """Return the dashboard of *app* as an ASGI application: to be run, or mounted in FastAPI or Starlette.

    >>> api = FastAPI()
    >>> api.mount("/jobs", create_app(celery_app, auth=Basic({"ada": "secret"})))

    Arguments:
        app: a Celery app whose broker is Kathikon, or a storage.
        auth: says who sent a request: `Basic`, or any callable, also an async one, that takes a Starlette request and
            returns a `User`, or `None` for nobody.
        read_only: nobody may act.
        redact: names of arguments and keys whose values are not shown, with ``*`` and ``?``, instead of `SECRETS`.
        live: pages follow the table by server-sent events.
    """
    dashboard = Dashboard(app, auth, read_only, redact, live)
    found = Starlette(routes=dashboard.routes)
    found.router.redirect_slashes = False  # to an address that the header Host names
    found.state.dashboard = dashboard
    return found


def create_wsgi_app(
    app: Celery | Storage, *, auth: Auth, read_only: bool = False, redact: Iterable[str] = SECRETS, live: bool = False
) -> Any:
    """Return the dashboard as a WSGI application: to be run, or mounted in Flask.

    >>> flask_app.wsgi_app = DispatcherMiddleware(
    ...     flask_app.wsgi_app, {"/jobs": create_wsgi_app(celery_app, auth=Basic({"ada": "secret"}))}
    ... )

    Arguments: *app*, *auth*, *read_only* and *redact* as of `create_app`.

    Live pages hold a thread of the server for each viewer: *live* is off here, unless asked for.
    """
    from a2wsgi import ASGIMiddleware

    return ASGIMiddleware(create_app(app, auth=auth, read_only=read_only, redact=redact, live=live))  # type: ignore[arg-type]
