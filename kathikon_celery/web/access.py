"""Who may see, and who may act: authentication, the token against forged requests, and the headers of every answer."""

from __future__ import annotations

import re
import secrets
from base64 import b64decode
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from hmac import compare_digest
from typing import Protocol

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

#: Cookies: of the token in the printed address, and against forged requests.
TOKEN, FORGERY = "kathikon_token", "kathikon_form"
#: Headers of every answer: no script but ours, no frame, no address of a page to anybody else.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class User:
    """Who looks.

    >>> def auth(request):
    ...     session = sessions.get(request.cookies.get("session"))
    ...     return User(session.name, may_act=session.is_admin) if session else None

    Arguments:
        name: for the record of acts.
        may_act: false: the user may only read.
    """

    name: str
    may_act: bool = True


class Auth(Protocol):
    """Says who sent a request. Any callable that takes a Starlette request and returns a `User` or `None` is one.

    >>> async def auth(request):
    ...     name = await name_of(request.headers["authorization"])
    ...     return User(name) if name else None
    """

    def __call__(self, request: Request) -> User | Response | Awaitable[User | Response | None] | None:
        """Return who sent *request*; `None`: nobody who may see anything; a response: answer so."""


class Basic:
    """HTTP basic authentication.

    >>> Basic({"ada": "secret"}, readers={"bob": "other"})

    Arguments:
        users: name -> password, of those who may act.
        readers: the same of those who may only read.

    Raises `ValueError` without users, for a name that is empty or has a colon, and for an empty password.
    """

    def __init__(self, users: Mapping[str, str], readers: Mapping[str, str] | None = None) -> None:
        self._users = {name: (password, True) for name, password in users.items()}
        self._users |= {name: (password, False) for name, password in (readers or {}).items()}
        empty = [name for name, (password, _) in self._users.items() if not name or ":" in name or not password]
        if empty or not self._users:
            raise ValueError(f"names without a colon and passwords are needed; these have none: {empty}")

    def __call__(self, request: Request) -> User | Response:
        """Return the user whose name and password were sent, or ask for them."""
        kind, _, credentials = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                name, _, given = b64decode(credentials, validate=True).decode().partition(":")
            except ValueError:
                name = given = ""
            password, may_act = self._users.get(name, (secrets.token_hex(), False))
            if _same(password, given):
                return User(name, may_act)
        return PlainTextResponse("Say who you are.\n", 401, {"WWW-Authenticate": 'Basic realm="Kathikon"'})


class Token:
    """A secret in the address that the command prints; a cookie keeps it."""

    def __init__(self, operator: str) -> None:
        self.token = secrets.token_urlsafe(24)
        self._operator = operator

    def __call__(self, request: Request) -> User | Response:
        """Return the operator, if the token was sent."""
        if _same(request.query_params.get("token", ""), self.token):
            answer = RedirectResponse(f"{request.scope.get('root_path', '')}/", 303)
            set_cookie(request, answer, TOKEN, self.token)
            return answer
        if _same(cookie_of(request, TOKEN), self.token):
            return User(self._operator)
        return PlainTextResponse("Open the address that the command has printed: it has a token.\n", 401)


class Nobody:
    """No authentication: everybody who reaches the address may do everything. For the own machine only.

    >>> create_app(app, auth=Nobody("ada"))

    Arguments:
        operator: the name for the record of acts.
    """

    def __init__(self, operator: str) -> None:
        self._operator = operator

    def __call__(self, request: Request) -> User | None:
        """Return the operator, unless the request names another host: a stranger's page whose name leads here."""
        is_ours = re.fullmatch(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", request.headers.get("host", ""))
        return User(self._operator) if is_ours else None


def _same(one: str, other: str) -> bool:
    return compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


def name_of_cookie(request: Request, name: str) -> str:
    """Return the name of a cookie here: cookies do not mind ports, and each may have a dashboard of its own."""
    server = request.scope.get("server")
    return f"{name}_{server[1]}" if server and server[1] else name


def cookie_of(request: Request, name: str) -> str:
    """Return the value of a cookie, or nothing."""
    return request.cookies.get(name_of_cookie(request, name), "")


def set_cookie(request: Request, answer: Response, name: str, value: str) -> None:
    """Set a cookie that no script reads, and no other site sends."""
    path, name = request.scope.get("root_path") or "/", name_of_cookie(request, name)
    answer.set_cookie(name, value, path=path, secure=request.url.scheme == "https", httponly=True, samesite="strict")


def is_forged(request: Request, given: str) -> bool:
    """Whether a form was not sent by a page of ours: its token is *given*."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    known = cookie_of(request, FORGERY)
    return not known or not _same(known, given)
