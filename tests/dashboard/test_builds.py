"""Builds: asked for, watched while they run, and what they say when they fail."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.dashboard.conftest import PATIENCE_MS, Person, check_everywhere

pytestmark = pytest.mark.timeout(300)

HOSTILE = """\
FROM base
RUN echo '<b id=bold>bold</b>'; printf 'turned \\342\\200\\256around\\n\\033[31mred\\033[0m\\n'
RUN sleep 4; seq 300; echo slept
"""


def begin(person: Person, name: str, text: str) -> str:
    """A build by the API; its id."""
    source = {"kind": "dockerfile", "text": text}
    asked = {"name": name, "source": source, "memory_mb": 256}
    return str(person.ask("POST", "/builds", asked, 202)["id"])


def state_of(page: Page, state: str) -> Locator:
    """Beside the page's title."""
    return page.get_by_role("main").get_by_text(state, exact=True).first


def test_a_build_is_watched_to_its_template(ada: Person, bob: Person) -> None:
    page = ada.open("/builds")
    listed = ada.open("/builds")
    page.get_by_role("button", name="New build").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("shown")
    dialog.get_by_label("Memory (MiB)").fill("256")
    text = dialog.get_by_role("textbox", name="Dockerfile")
    text.fill("FROM base\nNOPE")
    dialog.get_by_role("button", name="Build").click()
    expect(dialog.get_by_role("alert")).to_contain_text("Dockerfile:2:1")
    check_everywhere(page)
    text.fill(HOSTILE)
    dialog.get_by_role("button", name="Build").click()

    expect(page.get_by_role("heading", name="Build of shown")).to_be_visible()
    log = page.get_by_role("log")
    expect(log.get_by_text("red", exact=True)).to_be_attached(timeout=PATIENCE_MS)
    expect(log.get_by_text("<b id=bold>bold</b>", exact=True)).to_be_attached()
    # Not over yet: what is said is seen as it is said.
    expect(state_of(page, "building")).to_be_visible()
    row = listed.get_by_role("row").filter(has_text="shown")
    expect(row).to_contain_text("building")
    expect(page.get_by_role("button", name="Launch shown")).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator("#bold")).to_have_count(0)
    assert not re.search("[\u202a-\u202e\x1b]", log.inner_text())
    expect(log).to_contain_text("slept")
    steps = page.get_by_role("region", name="Steps").get_by_role("listitem")
    expect(steps).to_have_count(2)
    expect(steps.nth(1)).to_contain_text(re.compile(r"seq 300.*\d s\s*done"))
    for told in ("ready", ada.email):
        expect(row).to_contain_text(told)

    # Where the log stays is its reader's to say.
    to_end = page.get_by_role("button", name="To the end")
    expect(to_end).to_have_count(0)
    steps.nth(0).get_by_role("button").click()
    expect(log.get_by_text("<b id=bold>bold</b>", exact=True)).to_be_in_viewport()
    to_end.click()
    expect(to_end).to_have_count(0)
    expect(log.get_by_text("template shown:default is ready")).to_be_in_viewport()

    page.get_by_role("button", name="Launch shown").click()
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("sb", timeout=PATIENCE_MS)
    ada.ask("DELETE", f"/sandboxes/{heading.inner_text().strip()}", expect=204)
    ada.ask("DELETE", "/templates/shown", expect=204)
    check_everywhere(listed)

    listed.get_by_role("link", name="shown").click()
    expect(listed.get_by_role("log")).to_contain_text("slept")
    other = bob.open(listed.url.removeprefix(bob.server.page_url("")))
    expect(other.get_by_role("heading", name="There is no such build")).to_be_visible()


def test_a_build_that_fails_says_why(ada: Person) -> None:
    build_id = begin(
        ada, "broken", "FROM base\nRUN echo first\nRUN echo '<i>why</i>' >&2; exit 3\n"
    )
    page = ada.open(f"/builds/{build_id}")
    failure = page.get_by_role("alert")
    expect(failure).to_contain_text("Step 2 failed", timeout=PATIENCE_MS)
    expect(failure).to_contain_text("exited with 3: <i>why</i>")
    expect(page.get_by_role("region", name="Steps").get_by_role("listitem").last).to_contain_text(
        "failed"
    )
    expect(page.get_by_role("button", name="Cancel build")).to_have_count(0)
    check_everywhere(page)


def test_a_log_goes_on_after_a_lost_connection_until_its_build_is_cancelled(ada: Person) -> None:
    counting = "echo begun; for n in $(seq 2000); do echo number $n; sleep 0.3; done"
    build_id = begin(ada, "endless", f"FROM base\nRUN {counting}\n")
    page = ada.open("/builds")
    broken: list[str] = []

    def break_off(route: Route) -> None:
        if len(broken) < 2 and "limit=" not in route.request.url:
            broken.append(route.request.url)
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route(f"**/v1/builds/{build_id}/logs*", break_off)
    page.get_by_role("link", name="endless").click()
    log = page.get_by_role("log")
    expect(log.get_by_text("begun", exact=True)).to_be_attached(timeout=PATIENCE_MS)
    lines = page.locator("[data-line]")
    before = lines.count()
    expect(lines.nth(before + 10)).to_be_attached(timeout=PATIENCE_MS)
    numbers = lines.evaluate_all("all => all.map(e => +e.dataset.line)")
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(broken) == 2

    page.get_by_role("button", name="Cancel build").click()
    asked = page.get_by_role("dialog")
    expect(asked).to_contain_text("endless")
    asked.get_by_role("button", name="Cancel build").click()
    expect(log).to_contain_text("it was cancelled", timeout=PATIENCE_MS)
    expect(state_of(page, "cancelled")).to_be_visible()


def test_whoever_has_no_builds_is_told_how_to_make_one(bob: Person) -> None:
    page = bob.open("/builds")
    expect(page.get_by_role("heading", name="No builds yet")).to_be_visible()
    expect(page.get_by_text("sandmartin template build")).to_be_visible()
    check_everywhere(page)
