"""The dashboard: what the tables know, live, and all that an operator can do. Needs the extra ``[web]``.

>>> web = create_app(app, auth=Basic({"ada": "secret"}))   # ASGI: run it, or mount it in FastAPI or Starlette
>>> flask_app.wsgi_app = DispatcherMiddleware(flask_app.wsgi_app, {"/jobs": create_wsgi_app(app, auth=…)})

Django projects include ``kathikon_celery.django.urls``.
"""

from kathikon_celery.web.access import Auth, Basic, Nobody, User
from kathikon_celery.web.application import create_app, create_wsgi_app

__all__ = ["Auth", "Basic", "Nobody", "User", "create_app", "create_wsgi_app"]
