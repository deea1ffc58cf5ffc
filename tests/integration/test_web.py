"""The dashboard in a real browser: each page, each act, live, without script, by keyboard, on a phone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery, chain

from kathikon_celery import Kathikon
from kathikon_celery.job import State
from tests.integration.conftest import Jobs, Workers, on_one_database
from tests.support import apps
from tests.support.browsers import browser as real_browser
from tests.support.dashboards import Dashboard
from tests.support.waiting import wait_until

pytest.importorskip("playwright")
pytest.importorskip("starlette")

PAGES = ("/", "/queues", "/jobs", "/jobs?state=dead", "/workers", "/schedules", "/limits", "/acts")
#: Where the pictures of the docs are written, if they are wanted.
PICTURES = os.environ.get("KATHIKON_TEST_PICTURES")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with real_browser() as found:
        yield found


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page that must have no error and no dialog."""
    contexts, wrong = [], []

    def open_page(address: str, **options: Any) -> Any:
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # An open page whose server has ended says so.
    ends = ("ERR_INCOMPLETE_CHUNKED", "ERR_CONNECTION_REFUSED", "[object Event]")
    assert [one for one in wrong if not any(end in one for end in ends)] == []


@pytest.fixture
def operator(client: Celery) -> Kathikon:
    return Kathikon(client)


@pytest.fixture
def dashboard(database_url: str, client: Celery, operator: Kathikon, tmp_path: Path) -> Iterator[Dashboard]:
    with Dashboard(database_url, "--auth", "none", directory=tmp_path) as found:
        yield found


def said(page: Any) -> str:
    return str(page.get_by_role("status").inner_text())


@on_one_database
def test_each_act_on_jobs_and_queues(
    visit: Callable[..., Any], dashboard: Dashboard, operator: Kathikon, jobs: Jobs, workers: Workers, tmp_path: Path
) -> None:
    page = visit(dashboard.address)
    waiting = apps.add.delay(1, 1)
    page.goto(f"{dashboard.root}/queues")
    page.get_by_role("button", name="Pause queue default").click()
    assert said(page) == "Paused."
    assert [one.name for one in operator.pauses()] == ["default"]
    page.get_by_role("button", name="Resume queue default").click()
    assert operator.pauses() == []
    page.get_by_text("Pause something").click()
    page.get_by_label("What").select_option("task")
    page.get_by_label("Name").fill("tests.*")
    page.get_by_label("Minutes").fill("30")
    page.get_by_label("Reason").fill("a <b>bad</b> deploy")
    page.get_by_role("button", name="Pause", exact=True).click()
    (pause,) = operator.pauses()
    assert (pause.name, pause.reason, pause.until is None) == ("tests.*", "a <b>bad</b> deploy", False)
    page.get_by_role("button", name="Resume tests.*").click()
    assert operator.pauses() == []

    page.goto(f"{dashboard.root}/jobs")
    page.get_by_role("link", name=waiting.id).click()
    page.get_by_label("Reason").fill("not wanted")
    page.get_by_role("button", name="Cancel").click()
    assert said(page) == "The job was cancelled."
    assert jobs.of(waiting).state is State.CANCELLED
    page.get_by_role("button", name="Retry").click()
    assert said(page) == "The job was retried."
    workers(concurrency=2)
    assert jobs.wait(waiting, State.COMPLETED).attempts == 1
    page.get_by_role("button", name="Rerun").click()
    assert said(page) == "The job was rerun."
    assert waiting.id in page.content()  # the copy names its original
    page.goto(f"{dashboard.root}/job?id={waiting.id}")
    history = page.get_by_role("region", name="History").inner_text()
    assert all(word in history for word in ("cancel", "retry", "rerun", "not wanted"))

    gate = tmp_path / "gate"
    dead = [apps.fail_unless.delay(str(gate), number) for number in range(7)]
    for one in dead:
        jobs.wait(one, State.DEAD)
    gate.touch()
    page.goto(f"{dashboard.root}/jobs?state=dead")
    page.get_by_role("button", name="Retry …").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Retry 7 jobs?"
    assert all(jobs.of(one).state is State.DEAD for one in dead)  # nothing yet
    page.get_by_role("button", name="Retry 7 jobs").click()
    for one in dead:
        jobs.wait(one, State.COMPLETED)
    operators = {act.operator for act in operator.acts()}
    assert operators == {operator.operator}
    page.goto(f"{dashboard.root}/acts")
    retries = page.get_by_role("region", name="Acts").get_by_text("retry")
    wait_until(lambda: retries.count() >= 2, what="both retries are listed")


@on_one_database
def test_each_act_on_schedules(visit: Callable[..., Any], dashboard: Dashboard, operator: Kathikon) -> None:
    page = visit(f"{dashboard.root}/schedules")
    page.get_by_text("Add or change a schedule").click()
    form = page.locator("form").filter(has=page.get_by_role("button", name="Add"))
    form.get_by_label("Name").fill("nightly")
    form.get_by_label("Task", exact=True).fill("proj.nightly")
    form.get_by_label("When").fill("30 2 * * *")
    form.get_by_label("Time zone").fill("Europe/Berlin")
    form.get_by_label("Arguments, JSON", exact=True).fill('["daily"]')
    form.get_by_role("button", name="Add").click()
    assert said(page) == "nightly was added."
    row = operator.schedules.get("nightly")
    assert (row.zone, row.args) == ("Europe/Berlin", '["daily"]')
    page.get_by_role("button", name="Pause nightly").click()
    assert operator.schedules.get("nightly").paused
    page.get_by_role("button", name="Resume nightly").click()
    assert not operator.schedules.get("nightly").paused
    page.get_by_role("button", name="Run nightly now").click()
    assert said(page) == "Sent."
    assert page.get_by_role("heading", level=1).inner_text() == "proj.nightly"
    page.goto(f"{dashboard.root}/schedules")
    page.get_by_text("Send ticks of the past").click()
    form = page.locator("form").filter(has=page.get_by_role("button", name="Send"))
    form.get_by_label("Name").fill("nightly")
    form.get_by_label("After").fill("2026-01-01T12:00")
    form.get_by_label("Up to").fill("2026-01-04T12:00")
    form.get_by_role("button", name="Send").click()
    assert said(page) == "3 ticks were sent."
    page.get_by_role("button", name="Remove nightly").click()
    assert operator.schedules.every() == []


def test_pages_follow_the_table(
    visit: Callable[..., Any], dashboard: Dashboard, operator: Kathikon, workers: Workers
) -> None:
    page = visit(dashboard.address)
    card = page.get_by_role("link", name="ready")
    assert card.inner_text().split()[0] == "0"
    link = page.get_by_role("link", name="Workers").first
    link.focus()
    apps.add.delay(1, 1)
    wait_until(lambda: card.inner_text().split()[0] == "1", what="the new number")
    assert page.evaluate("document.activeElement.innerText") == "Workers"
    page.goto(f"{dashboard.root}/jobs")
    page.get_by_label("Queue").fill("half a na")
    result = apps.add.delay(2, 2)
    page.get_by_role("link", name=result.id).wait_for()
    workers(concurrency=1)
    wait_until(lambda: set(page.locator(".state").all_inner_texts()) == {"completed"}, what="the new states")
    assert page.get_by_label("Queue").input_value() == "half a na"  # what is being typed stays


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\"'`</pre></td>"


@on_one_database
def test_no_script_from_a_job(
    visit: Callable[..., Any], dashboard: Dashboard, client: Celery, operator: Kathikon, jobs: Jobs, workers: Workers
) -> None:
    """In each field that a stranger may have written."""
    failed = apps.fail.delay(EVIL)
    odd = client.send_task(EVIL, (EVIL, {EVIL: EVIL}), {EVIL[:40]: EVIL}, queue=EVIL, headers={EVIL: EVIL})
    strange = client.send_task("proj.x", task_id=EVIL, queue="nobody's")
    operator.schedules.add(EVIL, EVIL, 3600, (EVIL,), reason=EVIL)
    operator.pause_queue(EVIL, reason=EVIL)
    workers(concurrency=1)
    jobs.wait(failed, State.DEAD)
    operator.cancel(odd.id, reason=EVIL)
    page = visit(dashboard.address)
    paths = [f"/job?id={quote(one.id, safe='')}" for one in (failed, odd, strange)]
    searched = [f"/jobs?{name}={quote(EVIL)}" for name in ("task", "queue", "error", "root", "state", "since", "after")]
    for path in (*PAGES, *paths, *searched):
        answer = page.request.get(f"{dashboard.root}{path}")
        assert answer.status in (200, 400, 404), path
        assert EVIL not in answer.text(), path
        if answer.status == 200:
            page.goto(f"{dashboard.root}{path}")
        assert page.locator("main script, main img").count() == 0, path
    page.goto(f"{dashboard.root}{paths[0]}")
    assert EVIL in page.locator("main").inner_text()


@on_one_database
def test_secrets_are_hidden_and_no_pickle_is_loaded(
    visit: Callable[..., Any], dashboard: Dashboard, client: Celery, tmp_path: Path
) -> None:
    nested = {"deep": [{"API_KEY_of_ours": "s3cret"}]}
    plain = client.send_task("proj.x", (1, nested), {"user": 5, "password": "s3cret"})
    positional = client.send_task("tests.support.apps.note", ("shown", "path", "label"))
    page = visit(f"{dashboard.root}/job?id={plain.id}")
    text = page.locator("main").inner_text()
    assert ("s3cret" in page.content(), text.count("[hidden]"), '"user": 5' in text) == (False, 2, True)
    page.goto(f"{dashboard.root}/job?id={positional.id}")
    assert '"shown"' in page.locator("main").inner_text()
    pickled = client.send_task("proj.x", (Trap(tmp_path / "loaded"),), serializer="pickle")
    page.goto(f"{dashboard.root}/job?id={pickled.id}")
    assert "not shown: application/x-python-serialize" in page.locator("main").inner_text()
    assert not (tmp_path / "loaded").exists()


class Trap:
    """Writes a file when its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@on_one_database
def test_without_script_by_keyboard_and_on_a_phone(
    visit: Callable[..., Any], dashboard: Dashboard, operator: Kathikon
) -> None:
    operator.schedules.add("a schedule with a long name that goes on and on", "proj.x", 3600)
    chain(apps.add.si(1, 2), apps.add.s(3)).delay()
    plain = visit(dashboard.address, java_script_enabled=False)
    for name in ("Queues", "Jobs", "Dead letters", "Workers", "Schedules", "Acts", "Overview"):
        plain.get_by_role("navigation").get_by_role("link", name=name).click()
        assert plain.get_by_role("heading", level=1).inner_text() == name
    keyboard = visit(dashboard.address)
    keyboard.keyboard.press("Tab")
    assert keyboard.evaluate("document.activeElement.innerText") == "To the content"
    for _ in range(2):
        keyboard.keyboard.press("Tab")
    keyboard.keyboard.press("Enter")
    keyboard.wait_for_url("**/queues")
    phone = visit(dashboard.address, viewport={"width": 360, "height": 740}, color_scheme="dark")
    for path in (*PAGES, f"/job?id={operator.jobs().page(1)[0].id}"):
        phone.goto(f"{dashboard.root}{path}")
        assert phone.evaluate("document.scrollingElement.scrollWidth") <= 360, path
        fields = phone.locator("input:not([type=hidden]), select, button")
        has_name = "one => one.labels?.length || one.textContent || one.ariaLabel"
        unnamed = fields.evaluate_all(f"all => all.filter(one => !({has_name})(one)).map(one => one.outerHTML)")
        assert unnamed == [], path


@on_one_database
def test_who_may_only_read(visit: Callable[..., Any], database_url: str, client: Celery, tmp_path: Path) -> None:
    operator = Kathikon(client)
    job = apps.add.delay(1, 1)
    with Dashboard(database_url, "--auth", "none", "--read-only", directory=tmp_path) as dashboard:
        page = visit(dashboard.address)
        for path in (*PAGES, f"/job?id={job.id}", f"/jobs?argument={quote('*1*')}"):
            page.goto(f"{dashboard.root}{path}")
            assert page.locator("form[method=post]").count() == 0, path
        assert "(read only)" in page.content()
        forged = page.request.post(f"{dashboard.root}/act/job", form={"id": job.id, "verb": "cancel"})
        assert forged.status == 403
        assert operator.job(job.id).state is State.AVAILABLE


@on_one_database
def test_what_is_wrong_is_said(visit: Callable[..., Any], dashboard: Dashboard, chromium: Any) -> None:
    context = chromium.new_context()
    page = context.new_page()
    for path, status, text in (
        ("/jobs?state=sleepy", 400, "'sleepy'"),
        ("/jobs?since=soon", 400, "since = 'soon' is no moment such as 2026-01-31T12:00 (UTC)"),
        ("/job?id=none", 404, "there is no job 'none'"),
    ):
        answer = page.goto(f"{dashboard.root}{path}")
        assert answer.status == status
        assert text in page.get_by_role("alert").inner_text()
    page.goto(f"{dashboard.root}/schedules")
    page.get_by_text("Add or change a schedule").click()
    form = page.locator("form").filter(has=page.get_by_role("button", name="Add"))
    form.get_by_label("Name").fill("x")
    form.get_by_role("button", name="Add").click()
    assert "a schedule needs a name, a task, and when" in page.get_by_role("alert").inner_text()
    context.close()


@on_one_database
def test_pictures(
    visit: Callable[..., Any], database_url: str, client: Celery, jobs: Jobs, workers: Workers, tmp_path: Path
) -> None:
    """Those of docs/dashboard.md, where `PICTURES` says."""
    operator = Kathikon(client, operator="ada")
    users = tmp_path / "users"
    users.write_text("ada:secret")
    users.chmod(0o600)
    workers(concurrency=4)
    for number in range(40):
        apps.add.delay(number, 1)
    failed = [apps.fail.delay("the shop's API answered 503") for _ in range(4)]
    chained = chain(apps.add.s(1, 2), apps.add.s(3), apps.add.s(4)).delay()
    long = apps.sleep.delay(3600)
    apps.add.apply_async((1, 1), countdown=3600, queue="reports")
    operator.schedules.add("nightly report", "proj.report", 86400, zone="Europe/Berlin")
    operator.pause_queue("reports", reason="month's end")
    for one in failed:
        jobs.wait(one, State.DEAD)
    assert chained.get(timeout=60) == 10
    jobs.wait(long, State.RUNNING)
    folder = Path(PICTURES) if PICTURES else tmp_path
    with Dashboard(database_url, "--auth", f"file:{users}", directory=tmp_path) as dashboard:
        page = visit(
            dashboard.address,
            viewport={"width": 1100, "height": 700},
            http_credentials={"username": "ada", "password": "secret"},
        )
        for name, path in (
            ("overview", "/"), ("queues", "/queues"), ("jobs", "/jobs"), ("dead", "/jobs?state=dead"),
            ("job", f"/job?id={chained.id}"), ("workers", "/workers"), ("schedules", "/schedules"), ("acts", "/acts"),
        ):  # fmt: skip
            page.goto(f"{dashboard.root}{path}")
            page.screenshot(path=folder / f"{name}.png")
            assert (folder / f"{name}.png").stat().st_size > 10_000
