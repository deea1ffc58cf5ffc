"""The dashboard's doors: who gets in, forged requests, and mounted in FastAPI, Flask and Django."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape as html_escape
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import urlencode

import pytest
from celery import Celery

from kathikon_celery import Kathikon
from kathikon_celery.job import Job, State, Use
from kathikon_celery.storage import limits
from tests.integration.conftest import on_one_database
from tests.support import apps
from tests.support.dashboards import Dashboard
from tests.support.projects import MANAGE, Project, django_database
from tests.support.waiting import wait_until

httpx = pytest.importorskip("httpx")
web = pytest.importorskip("kathikon_celery.web")
pytestmark = [on_one_database]


def form_token(page: Any) -> str:
    return str(page.text.partition('name="token" value="')[2].partition('"')[0])


def check_doors(root: str, client: Celery, **options: Any) -> None:
    """What holds of every dashboard at *root*, for those who may act."""
    operator = Kathikon(client)
    job = apps.add.delay(1, 1)
    with httpx.Client(follow_redirects=True, timeout=60, **options) as browser:
        page = browser.get(f"{root}/job?id={job.id}")
        assert (page.status_code, job.id in page.text) == (200, True)
        for name in ("content-security-policy", "x-frame-options", "x-content-type-options"):
            assert name in page.headers
        assert "unsafe" not in page.headers["content-security-policy"]
        assert browser.get(f"{root}/static/style.css").status_code == 200
        assert browser.get(f"{root}/jobs?state=available").status_code == 200
        form = {"id": job.id, "verb": "cancel", "reason": "as asked"}
        forged = [
            browser.post(f"{root}/act/job", data=form),
            browser.post(f"{root}/act/job", data={**form, "token": "x" * 32}),
            browser.post(
                f"{root}/act/job", data={**form, "token": form_token(page)}, headers={"Sec-Fetch-Site": "cross-site"}
            ),
        ]
        assert [answer.status_code for answer in forged] == [403] * 3
        assert operator.job(job.id).state is State.AVAILABLE
        done = browser.post(f"{root}/act/job", data={**form, "token": form_token(page)})
        assert (done.status_code, "The job was cancelled." in done.text) == (200, True)
        assert str(done.url) == f"{root}/job?id={job.id}"
        assert operator.job(job.id).state is State.CANCELLED
        assert "The job was cancelled." not in browser.get(f"{root}/job?id={job.id}").text  # said once
        figures = browser.get(f"{root}/metrics")
        assert (figures.status_code, "celery_queue_length" in figures.text) == (200, True)


def test_the_token_of_the_printed_address(database_url: str, client: Celery, tmp_path: Path) -> None:
    with Dashboard(database_url, directory=tmp_path) as dashboard:
        for path in ("/", "/jobs", "/live?of=/", "/metrics", "/?token=wrong"):
            assert httpx.get(f"{dashboard.root}{path}").status_code == 401, path
        assert httpx.post(f"{dashboard.root}/act/job", data={"id": "x", "verb": "cancel"}).status_code == 401
        with httpx.Client(follow_redirects=True) as browser:
            page = browser.get(dashboard.address)
            assert (page.status_code, "token" in str(page.url)) == (200, False)
            cookies = browser.cookies
        check_doors(dashboard.root, client, cookies=cookies)


def test_names_and_passwords_of_a_file(database_url: str, client: Celery, tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text("# who\nada:se:cret\nbob:other:reader\n")
    path.chmod(0o600)
    with Dashboard(database_url, "--auth", f"file:{path}", directory=tmp_path) as dashboard:
        answer = httpx.get(dashboard.root + "/")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Basic realm="Kathikon"')
        for wrong in (("ada", "secret"), ("ada", ""), ("eve", "se:cret"), ("bob", "se:cret")):
            assert httpx.get(dashboard.root + "/", auth=wrong).status_code == 401
        assert httpx.get(dashboard.root + "/", headers={"Authorization": "Basic !"}).status_code == 401
        check_doors(dashboard.root, client, auth=("ada", "se:cret"))
        assert Kathikon(client).acts()[0].operator == "ada"
        job = apps.add.delay(1, 1)
        with httpx.Client(auth=("bob", "other")) as reader:
            page = reader.get(f"{dashboard.root}/job?id={job.id}")
            assert (page.status_code, "(read only)" in page.text, form_token(page)) == (200, True, "")
            token = next(value for name, value in reader.cookies.items() if name.startswith("kathikon_form"))
            form = {"id": job.id, "verb": "cancel", "token": token}
            assert reader.post(f"{dashboard.root}/act/job", data=form).status_code == 403


def test_nobody_is_asked_on_this_machine_only(database_url: str, client: Celery, tmp_path: Path) -> None:
    with Dashboard(database_url, "--auth", "none", directory=tmp_path) as dashboard:
        check_doors(dashboard.root, client)
        rebound = httpx.get(dashboard.root + "/", headers={"Host": "evil.example"})
        assert rebound.status_code == 403


@contextmanager
def served(application: Any) -> Iterator[str]:
    """An ASGI application on a real server."""
    import uvicorn

    config = uvicorn.Config(application, "127.0.0.1", 0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, what="the server")
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_mounted_in_fastapi(client: Celery) -> None:
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI()
    app.mount("/ops/jobs", web.create_app(client, auth=web.Basic({"ada": "secret"})))
    with served(app) as root:
        assert httpx.get(f"{root}/ops/jobs/").status_code == 401
        check_doors(f"{root}/ops/jobs", client, auth=("ada", "secret"))


def test_mounted_in_flask(client: Celery) -> None:
    flask = pytest.importorskip("flask")
    from werkzeug.middleware.dispatcher import DispatcherMiddleware
    from werkzeug.serving import make_server

    app = flask.Flask("shop")
    ours = web.create_wsgi_app(client, auth=web.Basic({"ada": "secret"}))
    server = make_server("127.0.0.1", 0, DispatcherMiddleware(app.wsgi_app, {"/ops/jobs": ours}), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    root = f"http://127.0.0.1:{server.server_port}/ops/jobs"
    assert httpx.get(f"{root}/").status_code == 401
    check_doors(root, client, auth=("ada", "secret"))
    server.shutdown()
    thread.join()
    server.server_close()


SETTINGS = """
    from kathikon_celery.django import *

    SECRET_KEY = "not needed"
    ALLOWED_HOSTS = ["*"]
    ROOT_URLCONF = "proj.urls"
    LOGIN_URL = "/login"
    INSTALLED_APPS = [
        "django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions",
        "kathikon_celery.django", "proj",
    ]
    MIDDLEWARE = [
        "django.contrib.sessions.middleware.SessionMiddleware", "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ]
    DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
    DATABASES = {{"default": {database}}}
    CELERY_KATHIKON_DATABASE_URL = {url!r}
"""
URLS = """
    from django.urls import include, path
    urlpatterns = [path("ops/jobs/", include("kathikon_celery.django.urls"))]
"""
CELERY = """
    from celery import Celery
    app = Celery("proj")
    app.config_from_object("django.conf:settings", namespace="CELERY")
"""
TRIED = """
    import django; django.setup()
    from django.contrib.auth.models import Permission, User
    from django.test import Client
    from urllib.parse import urlencode
    from celery import current_app
    from kathikon_celery import Kathikon

    odd = current_app.send_task("proj.x", task_id="ä日本")
    job = current_app.send_task("proj.x", (1, 2))
    def superuser():
        user, _ = User.objects.get_or_create(username="root", is_staff=True, is_superuser=True)
        browser = Client()
        browser.force_login(user)
        return browser
    def may(**fields):
        name = "".join(fields) + " <ü>"
        user = User.objects.create(username=name, **fields)
        if "is_staff" in fields and len(fields) == 2:
            user.is_active = True
            user.user_permissions.add(Permission.objects.get(codename="act", content_type__app_label="kathikon"))
        browser = Client(enforce_csrf_checks=True)
        browser.force_login(user)
        page = browser.get(f"/ops/jobs/job?id={job.id}")
        if page.status_code != 200:
            return [page.status_code, page.headers["Location"].partition("?")[0]]
        token = page.content.decode().partition('name="token" value="')[2].partition('"')[0]
        form = {"id": job.id, "verb": "rerun"}
        def post(fields):
            return browser.post("/ops/jobs/act/job", urlencode(fields), "application/x-www-form-urlencoded")
        forged, done = post(form), post({**form, "token": token})
        return [page.status_code, "(read only)" in page.content.decode(), forged.status_code, done.status_code]
    answer = {
        "live": superuser().get("/ops/jobs/live?of=/").status_code,
        "odd": [superuser().get(f"/ops/jobs/job?id={one}").status_code for one in ("ä日本", "ä")],
        "stranger": Client().get("/ops/jobs/").status_code,
        "user": may(),
        "staff": may(is_staff=True),
        "allowed": may(is_staff=True, first_name="allowed"),
        "superuser": may(is_staff=True, is_superuser=True, first_name="x"),
        "by": [act.operator for act in Kathikon(current_app).acts()],
    }
"""


def test_in_django(tmp_path: Path, database_url: str) -> None:
    pytest.importorskip("django")
    project = Project(tmp_path)
    project.environment["DJANGO_SETTINGS_MODULE"] = "proj.settings"
    parts = django_database(f"sqlite:///{tmp_path}/django.db")
    settings = dedent(SETTINGS).format(database=parts, url=database_url)
    for name, text in {"settings": settings, "celery": CELERY, "urls": URLS}.items():
        project.write(f"proj/{name}.py", text)
    project.write("manage.py", MANAGE)
    project.call("manage.py", "migrate", "-v0")
    answer = project.run(TRIED)
    assert (answer["stranger"], answer["live"], answer["odd"]) == (302, 404, [200, 404])
    assert answer["user"] == [302, "/login"]
    assert answer["staff"] == [200, True, 403, 403]
    assert answer["allowed"] == [200, False, 403, 303]
    assert answer["superuser"] == [200, False, 403, 303]
    assert answer["by"] == ["is_staffis_superuserfirst_name <ü>", "is_stafffirst_name <ü>"]


def test_many_viewers_cost_one_look_a_second(client: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten open pages: their streams all tell of a change, and the tables are read once for all."""
    looks: list[None] = []
    status = Kathikon.status

    def counted(self: Kathikon) -> Any:
        looks.append(None)
        return status(self)

    monkeypatch.setattr(Kathikon, "status", counted)
    told: list[str] = []

    def watch(root: str) -> None:
        with (
            httpx.Client(auth=("ada", "secret"), timeout=60) as browser,
            browser.stream("GET", f"{root}/live", params={"of": "/queues"}) as stream,
        ):
            for line in stream.iter_lines():
                if "seen by all" in line:
                    told.append(line)
                    return

    with served(web.create_app(client, auth=web.Basic({"ada": "secret"}))) as root:
        threads = [threading.Thread(target=watch, args=(root,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(looks) >= 3, what="three looks")
        before = len(looks)
        client.send_task("proj.x", queue="seen by all")
        for thread in threads:
            thread.join(60)
        assert len(told) == 10
        assert len(looks) - before <= 5  # not one for each of the ten


def test_odd_ids_and_arguments_have_pages(client: Celery) -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    ids = ["a?b=1", "a#b", "a/b", "..", "a%20b", "日本", "<b>", "a'\"b"]
    for one in ids:
        client.send_task("proj.x", task_id=one)
    client.send_task("proj.x", ("\ud800", {"\udfff": 1}), task_id="surrogate")
    client.send_task("proj.x", (deep,), task_id="deep")
    with (
        served(web.create_app(client, auth=web.Basic({"ada": "secret"}))) as root,
        httpx.Client(auth=("ada", "secret"), timeout=60) as browser,
    ):
        for one in (*ids, "surrogate", "deep"):
            page = browser.get(f"{root}/job", params={"id": one})
            shown = html_escape(one).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
            assert (page.status_code, shown in page.text) == (200, True), one
        for of in ("/job?id=surrogate", f"/job?{urlencode({'id': 'a?b=1'})}"):
            with browser.stream("GET", f"{root}/live", params={"of": of}) as stream:
                assert "event: page" in next(stream.iter_lines())
        for of in ("//[", "http://[::1", "/nowhere", "", "?", "/live", "\0"):
            assert browser.get(f"{root}/live", params={"of": of}).status_code == 404
        wrong = ("since=0001-01-01T00:00%2B23:59", "until=9999-12-31T23:59-23:59", "after=none", "state=x")
        assert {browser.get(f"{root}/jobs?{one}").status_code for one in wrong} <= {400, 404}
        assert browser.get(f"{root}/queues/", follow_redirects=False).status_code == 404


def test_forms_that_are_wrong(client: Celery) -> None:
    with (
        served(web.create_app(client, auth=web.Basic({"ada": "secret"}))) as root,
        httpx.Client(auth=("ada", "secret"), timeout=60) as browser,
    ):
        token = form_token(browser.get(f"{root}/queues"))
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        huge = (b"x" * 100_000 for _ in range(50))  # without a Content-Length
        assert browser.post(f"{root}/act/job", content=huge, headers=kind).status_code == 413
        assert browser.post(f"{root}/act/job", files={"x": b"y"}).status_code == 413
        assert browser.post(f"{root}/act/job", content=b"a=\xff", headers=kind).status_code == 413
        for act, fields in (
            ("schedule", {"verb": "backfill", "name": "x"}),
            ("schedule", {"verb": "add", "name": "x", "task": "t", "when": "9999", "args": "[" * 10_000}),
            ("schedule", {"verb": "add", "name": "x", "task": "t", "when": "9999", "options": '{"queue": 5}'}),
            ("schedule", {"verb": "add", "name": "x" * 1000, "task": "t", "when": "9999"}),
            ("pause", {"kind": "queue", "name": "a\0b"}),
            ("pause", {"kind": "queue", "name": "x" * 6000}),
            ("pause", {"kind": "queue", "name": "x", "minutes": "nan"}),
            ("pause", {"kind": "nothing", "name": "x"}),
            ("job", {"verb": "explode", "id": "x"}),
            ("jobs", {"verb": "retry", "rate": "many"}),
        ):
            answer = browser.post(f"{root}/act/{act}", data={**fields, "token": token})
            assert answer.status_code == 400, (act, fields)
        odd = "\ud800".encode("utf-8", "surrogatepass")
        assert browser.post(f"{root}/act/job", data={"token": odd}).status_code == 403
        page = browser.get(f"{root}/jobs?queue=x&sure=yes&rate=1/s&reason=evil&token=y").text
        assert not any(word in page for word in ("sure", "evil", '"1/s"', 'value="y"'))
    assert Kathikon(client).acts() == []
    assert Kathikon(client).schedules.every() == []


def test_an_authentication_of_ones_own(client: Celery) -> None:
    """What is no user is refused everywhere; an async function is awaited; who is not let in any more sees no more."""
    answers: list[Any] = [None]

    def plain(request: Any) -> Any:
        return answers[0]

    async def later(request: Any) -> Any:
        return answers[0]

    for auth in (plain, later):
        with served(web.create_app(client, auth=auth)) as root:
            for wrong in (None, False, True, "ada", 1):
                answers[0] = wrong
                for path in ("/", "/jobs", "/live?of=/", "/metrics"):
                    assert httpx.get(f"{root}{path}").status_code == 403, (wrong, path)
                assert httpx.post(f"{root}/act/job").status_code == 403
            answers[0] = web.User("ada")
            assert httpx.get(f"{root}/metrics").status_code == 200
    with (
        served(web.create_app(client, auth=later)) as root,
        httpx.stream("GET", f"{root}/live", params={"of": "/queues"}, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines) == "event: page"
        answers[0] = None
        assert list(lines)[-1] == ""  # it ends


def test_what_a_reader_may_not_know(client: Celery) -> None:
    operator = Kathikon(client)
    operator.jobs("dead", argument="*s3cret*").retry()
    assert '"argument": "*s3cret*"' in operator.acts()[0].target
    users = web.Basic({"ada": "secret"}, readers={"bob": "other"})
    with served(web.create_app(client, auth=users)) as root:
        seen = {
            name: httpx.get(f"{root}/acts", auth=(name, word)).text
            for name, word in (("ada", "secret"), ("bob", "other"))
        }
        assert ("s3cret" in seen["ada"], "s3cret" in seen["bob"], "[hidden]" in seen["bob"]) == (True, False, True)


def test_secrets_in_a_canvas(client: Celery) -> None:
    @client.task(name="proj.login")
    def login(user: str, password: str | None = None) -> None:
        """Not called."""

    sent = [
        login.starmap([("bob", "s3cret")]).delay(),
        login.chunks([("bob", "s3cret")], 1).group().delay().children[0],
        login.map(["bob"]).delay(),
        client.send_task("proj.other", (login.s("bob", "s3cret"), {"Api-Key": "s3cret", "passwd": "s3cret"})),
        login.delay("bob", "s3cret"),
    ]
    with served(web.create_app(client, auth=web.Basic({"ada": "secret"}))) as root:
        for one in sent:
            page = httpx.get(f"{root}/job", params={"id": one.id}, auth=("ada", "secret"))
            assert (page.status_code, "s3cret" in page.text, "bob" in page.text) == (200, False, True)


def test_limits_are_seen_set_and_reset(client: Celery) -> None:
    testing = pytest.importorskip("starlette.testclient")
    operator = Kathikon(client)
    use = Use("account:7", "account:{account}", 1, 1, None, 1.0, 1)
    limits.define(operator.storage.database, [use])
    for number in range(3):
        operator.storage.insert(Job(id=str(number), queue="mail", task="proj.send", limits=(use,)))
    dashboard = web.create_app(client, auth=lambda request: web.User("ada"), live=False)
    browser = testing.TestClient(dashboard, base_url="https://testserver")
    page = browser.get("/limits?limit=account:{account}")
    assert page.status_code == 200
    assert "Keys of account:{account}" in page.text
    assert "1 at once" in page.text
    assert "account:7" in page.text
    assert ">2</a>" in browser.get("/queues").text
    assert "wait for limits" in browser.get("/").text
    assert browser.get("/jobs?state=blocked").text.count('<tr id="job-') == 2
    form = {"token": form_token(page), "verb": "set", "name": "account:{account}", "concurrency": "2", "rate": "60/m"}
    assert "account:{account}: 2 at once, 60/m." in browser.post("/act/limit", data=form).text
    assert (
        "a concurrency is a whole number from 0" in browser.post("/act/limit", data={**form, "concurrency": "x"}).text
    )
    assert operator.limits.get("account:{account}").operator == "ada"
    assert "was reset" in browser.post("/act/limit", data={**form, "verb": "reset"}).text
    assert "count already" in browser.post("/act/limit", data={**form, "verb": "reset"}).text
    assert browser.get("/limits?limit=none").status_code == 404
