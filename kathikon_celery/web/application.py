"""The dashboard as an ASGI application, and as a WSGI application."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles

from kathikon_celery.metrics.serving import exposition, registry_of
from kathikon_celery.operate.kathikon import Kathikon
from kathikon_celery.schedules import timetable
from kathikon_celery.settings import shown
from kathikon_celery.storage.errors import NotFound, StorageError, in_words
from kathikon_celery.web import showing
from kathikon_celery.web.access import FORGERY, HEADERS, Auth, User, is_forged, set_cookie
from kathikon_celery.web.acts import ACTS, Act, address
from kathikon_celery.web.pages import PAGES, Page, Visit
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
#: Characters of a form at most.
LONGEST_FORM = 1_000_000


class Dashboard:
    """The pages and acts for one app.

    Arguments: as of `create_app`.
    """

    def __init__(
        self, place: Celery | Storage, auth: Auth, read_only: bool, redact: Iterable[str], is_live: bool
    ) -> None:
        self._place, self._auth, self._read_only, self._is_live = place, auth, read_only, is_live
        self._redaction = Redaction(redact)
        self._samples: deque[tuple[float, dict[str, int]]] = deque(maxlen=SAMPLES)
        self._shared = Shared()
        self._templates = Environment(
            loader=PackageLoader("kathikon_celery.web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self._templates.filters |= {
            "at": showing.at, "number": showing.number, "age": showing.age, "quoted": partial(quote, safe=""),
        }  # fmt: skip
        self._templates.globals |= {"address": address, "in_words": timetable.in_words}
        self._pages = [Route(path, self._page_at(page, name)) for path, (page, name) in PAGES.items()]
        acts = [Route(path, self._act_at(act), methods=["POST"]) for path, act in ACTS.items()]
        static = StaticFiles(directory=Path(__file__).with_name("static"))
        self._registry = registry_of(place)
        others = [Route("/live", self._live), Route("/metrics", self._metrics), Mount("/static", static)]
        self.routes = [*others, *acts, *self._pages]
        database = Kathikon(place).storage.database
        self._where = shown(database.url)
        self._title = self._where.rpartition("/")[2]

    # --- who

    def _user(self, request: Request) -> User | Response:
        found = self._auth(request)
        if found is None:
            return PlainTextResponse("You may not see this.\n", 403)
        if isinstance(found, User) and self._read_only:
            return User(found.name, may_act=False)
        return found

    def _visit(self, request: Request, user: User, path: dict[str, str], query: dict[str, str]) -> Visit:
        return Visit(self._place, user, path, query, self._redaction, self._samples, self._shared)

    # --- pages

    def _page_at(self, page: Page, template: str) -> Any:
        async def show(request: Request) -> Response:
            user = await run_in_threadpool(self._user, request)
            if isinstance(user, Response):
                return user
            query = dict(request.query_params)
            visit = self._visit(request, user, request.path_params, query)
            here = _path(request)
            return await self._answer(request, user, template, partial(self._data, here, page, visit))

        return show

    def _data(self, path: str, page: Page, visit: Visit) -> dict[str, Any]:
        key = (path, tuple(sorted(visit.query.items())), visit.user.may_act)
        found: dict[str, Any] = self._shared.get(key, partial(page, visit))
        return found

    async def _answer(self, request: Request, user: User, template: str, read: Any, status: int = 200) -> Response:
        try:
            data = await run_in_threadpool(read)
        except Exception as error:
            status, text = _explained(error)
            template, data = "problem.html", {"text": text}
        token = request.cookies.get(FORGERY) or secrets.token_urlsafe(24)
        said = unquote(request.cookies[SAID]) if SAID in request.cookies else None
        look = {"frame": "frame.html", "path": _path(request), "token": token, "said": said}
        text = self._render(request, user, template, data, **look)
        answer = HTMLResponse(text, status, HEADERS)
        set_cookie(request, answer, FORGERY, token)
        if SAID in request.cookies:
            answer.delete_cookie(SAID, path=request.scope.get("root_path") or "/")
        return answer

    def _render(self, request: Request, user: User, template: str, data: dict[str, Any], **more: Any) -> str:
        """Return the page. *more*: its ``frame``, ``path``, ``token`` of its forms, and what the last act ``said``."""
        more["here"] = f"{more['path']}?{request.url.query}" if request.url.query else more["path"]
        more["base"] = request.scope.get("root_path", "")
        more["is_live"] = self._is_live and template not in ("sure.html", "problem.html")
        return self._templates.get_template(template).render(
            **data, **more, user=user, title=self._title, where=self._where
        )

    # --- acts

    def _act_at(self, act: Act) -> Any:
        async def do(request: Request) -> Response:
            user = await run_in_threadpool(self._user, request)
            if isinstance(user, Response):
                return user
            if int(request.headers.get("content-length") or 0) > LONGEST_FORM:
                return PlainTextResponse("The form is too long.\n", 413, HEADERS)
            form = {name: value for name, value in (await request.form()).items() if isinstance(value, str)}
            if not user.may_act:
                return PlainTextResponse("You may only read.\n", 403, HEADERS)
            if is_forged(request, form.get("token")):
                text = "This form is not from here, or it is too old: open the page again.\n"
                return PlainTextResponse(text, 403, HEADERS)
            visit = self._visit(request, user, {}, {})
            try:
                done = await run_in_threadpool(act, visit, form)
            except Exception as error:
                return await self._answer(request, user, "problem.html", partial(_raise, error))
            self._shared.forget()
            if done.template is not None:
                return await self._answer(request, user, done.template, lambda: done.data)
            answer = RedirectResponse(request.scope.get("root_path", "") + done.to, 303, HEADERS)
            set_cookie(request, answer, SAID, quote(done.text))
            return answer

        return do

    # --- figures, for Prometheus

    async def _metrics(self, request: Request) -> Response:
        user = await run_in_threadpool(self._user, request)
        if isinstance(user, Response):
            return user
        try:
            kind, text = await run_in_threadpool(exposition, self._registry, request.headers.get("accept", ""))
        except Exception as error:
            status, words = _explained(error)
            return PlainTextResponse(f"{words}\n", status, HEADERS)
        return Response(text, media_type=kind, headers=HEADERS)

    # --- live

    async def _live(self, request: Request) -> Response:
        user = await run_in_threadpool(self._user, request)
        if isinstance(user, Response):
            return user
        of = urlsplit(request.query_params.get("of", ""))
        scope = {"type": "http", "method": "GET", "path": of.path, "root_path": "", "headers": []}
        for route in self._pages:
            match, found = route.matches(scope)
            if match is Match.FULL:
                page, template = PAGES[route.path]
                visit = self._visit(request, user, found["path_params"], dict(parse_qsl(of.query)))
                stream = self._stream(request, user, template, partial(self._data, of.path, page, visit), of.path)
                headers = {**HEADERS, "X-Accel-Buffering": "no"}
                return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        return PlainTextResponse("There is no such page.\n", 404, HEADERS)

    async def _stream(self, request: Request, user: User, template: str, read: Any, path: str) -> AsyncIterator[str]:
        token, last, silent = request.cookies.get(FORGERY, ""), "", 0.0
        while not await request.is_disconnected():
            try:
                data = await run_in_threadpool(read)
                text = self._render(request, user, template, data, frame="live.html", path=path, token=token)
            except Exception as error:
                text = f'<p class="problem" role="alert">{escape(_explained(error)[1])}</p>'
            if text != last:
                yield "event: page\n" + "".join(f"data: {line}\n" for line in text.splitlines()) + "\n"
                last, silent = text, 0.0
            elif silent >= SIGN_OF_LIFE:
                yield ": here\n\n"
                silent = 0.0
            await asyncio.sleep(FRESH)
            silent += FRESH


def _raise(error: Exception) -> Any:
    raise error


def _explained(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the words for *error*; anything unexpected is raised."""
    if isinstance(error, NotFound):
        return 404, str(error)
    if isinstance(error, ValueError | TypeError | OverflowError):
        return 400, str(error)
    if isinstance(error, StorageError):
        return 503, in_words(error)
    if type(error).__module__.startswith("sqlalchemy."):
        return 503, f"the database cannot be read: {in_words(error)}"
    raise error


def _path(request: Request) -> str:
    """Return the path of a page of ours, wherever the dashboard is mounted."""
    return str(request.scope["path"]).removeprefix(request.scope.get("root_path", "")) or "/"


def create_app(
    app: Celery | Storage, *, auth: Auth, read_only: bool = False, redact: Iterable[str] = SECRETS, live: bool = True
) -> Starlette:
    """Return the dashboard of *app* as an ASGI application: to be run, or mounted in FastAPI or Starlette.

    >>> api = FastAPI()
    >>> api.mount("/jobs", create_app(celery_app, auth=Basic({"ada": "secret"})))

    Arguments:
        auth: says who sent a request: `Basic`, or any callable that takes a Starlette request and returns a `User`, or
            `None` for nobody.
        read_only: nobody may act.
        redact: names of arguments and keys whose values are not shown, with ``*`` and ``?``.
        live: pages follow the table by server-sent events.
    """
    return Starlette(routes=Dashboard(app, auth, read_only, redact, live).routes)


def create_wsgi_app(
    app: Celery | Storage, *, auth: Auth, read_only: bool = False, redact: Iterable[str] = SECRETS, live: bool = False
) -> Any:
    """Return the dashboard as a WSGI application, as `create_app` does.

    Live pages hold a thread of the server for each viewer: *live* is off here, unless asked for.
    """
    from a2wsgi import ASGIMiddleware

    return ASGIMiddleware(create_app(app, auth=auth, read_only=read_only, redact=redact, live=live))  # type: ignore[arg-type]
