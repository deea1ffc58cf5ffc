"""The dashboard under a path of a Django project, for those who are logged in as staff.

>>> urlpatterns = [path("kathikon/", include("kathikon_celery.django.urls"))]

Staff with the permission ``kathikon.act`` (superusers have every permission) may act; other staff may read. Logging in
is Django's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from typing import Any
from urllib.parse import quote, unquote

from celery import current_app
from django.conf import settings
from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import re_path
from django.views.decorators.csrf import csrf_exempt
from starlette.requests import Request

from kathikon_celery.web import User, create_wsgi_app

#: Characters of a query string that need no escape, or are one.
_OF_A_QUERY = "%&=+;/?:@!$'()*,-._~"
#: Key of the WSGI environment: the user whom Django knows.
_USER = "HTTP_X_KATHIKON_DJANGO_USER"


def _auth(request: Request) -> User | None:
    name, _, may_act = request.headers["x-kathikon-django-user"].rpartition(":")
    return User(unquote(name), may_act == "1")


@lru_cache(maxsize=1)
def _dashboard() -> Any:
    options = {"redact": settings.KATHIKON_REDACT} if hasattr(settings, "KATHIKON_REDACT") else {}
    return create_wsgi_app(current_app._get_current_object(), auth=_auth, **options)


@csrf_exempt  # the forms have a token of their own
def dashboard(request: HttpRequest, path: str) -> HttpResponse | StreamingHttpResponse:
    """Answer a request for the dashboard, or send the visitor to Django's login."""
    user: Any = request.user
    if not (user.is_authenticated and user.is_active and user.is_staff):
        return redirect_to_login(request.get_full_path())
    whole = request.path
    base = whole[: len(whole) - len(path)].rstrip("/")
    environ = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": base.encode().decode("latin-1"),
        "PATH_INFO": f"/{path}".encode().decode("latin-1"),
        "QUERY_STRING": quote(request.META.get("QUERY_STRING", "").encode("latin-1", "replace"), _OF_A_QUERY),
        "SERVER_NAME": request.META.get("SERVER_NAME", "localhost"),
        "SERVER_PORT": str(request.META.get("SERVER_PORT", "80")),
        "SERVER_PROTOCOL": request.META.get("SERVER_PROTOCOL", "HTTP/1.1"),
        "REMOTE_ADDR": request.META.get("REMOTE_ADDR", ""),
        "CONTENT_TYPE": request.META.get("CONTENT_TYPE", ""),
        "CONTENT_LENGTH": str(len(request.body)),
        "wsgi.input": BytesIO(request.body),
        "wsgi.url_scheme": request.scheme,
        "wsgi.errors": BytesIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        **{name: value for name, value in request.META.items() if name.startswith("HTTP_")},
        _USER: f"{quote(user.get_username())}:{int(user.has_perm('kathikon.act'))}",
    }
    answered: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        answered[:] = [int(status.split(maxsplit=1)[0]), headers]

    parts: Iterator[bytes] = iter(_dashboard()(environ, start_response))
    first = next(parts, b"")
    status, headers = answered
    response = HttpResponse(b"".join([first, *parts]), status=status)
    for name, value in headers:
        if name.lower() == "set-cookie":
            response.cookies.load(value)
        else:
            response[name] = value
    return response


urlpatterns = [re_path(r"^(?P<path>.*)$", dashboard, name="kathikon")]
