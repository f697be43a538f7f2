"""Templates: made of a sandbox, listed as they come and go, started from, tagged, deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.dashboard.conftest import PATIENCE_MS, Person, check_accessible, check_everywhere


def row_of(page: Page, name: str) -> Locator:
    """The row of a template."""
    return page.get_by_role("row").filter(has=page.get_by_role("button", name=f"Launch {name}"))


def menu_of(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=f"More for {name}", exact=True)


@pytest.fixture(scope="module")
def frozen(people: Callable[[str], Person]) -> Iterator[str]:
    """A snapshot of Ada's; the sandbox that it is of is gone."""
    ada = people("ada")
    sandbox_id = ada.create()
    ada.ask("POST", "/snapshots", {"sandbox_id": sandbox_id, "name": "frozen", "live": True}, 201)
    ada.ask("DELETE", f"/sandboxes/{sandbox_id}", expect=204)
    yield "frozen"
    ada.ask("DELETE", "/templates/frozen", expect=204)


def test_a_snapshot_goes_on_where_its_sandbox_was(ada: Person, bob: Person) -> None:
    listed = ada.open("/templates")
    expect(listed.get_by_role("heading", name="Templates", exact=True)).to_be_visible()
    sandbox_id = ada.create()
    ada.sh(sandbox_id, "echo as it was > /dev/shm/here")
    page = ada.open(f"/sandboxes/{sandbox_id}")
    page.get_by_role("button", name="Snapshot").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("kept")
    dialog.get_by_role("button", name="Snapshot").click()
    expect(page.get_by_role("heading", name="Templates", exact=True)).to_be_visible(
        timeout=PATIENCE_MS
    )
    row = row_of(page, "kept")
    for told in ("Snapshot", "256 MiB", " MiB", ada.email, sandbox_id):
        expect(row).to_contain_text(told)
    # Nobody asked the other page to look again.
    expect(row_of(listed, "kept")).to_be_visible()
    for method, path in (("DELETE", "/templates/kept"), ("GET", "/templates/kept/tags")):
        bob.ask(method, path, expect=404)
    bob.ask("POST", "/sandboxes", {"template": "kept"}, 404)

    row.get_by_role("button", name="Launch kept").click()
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("sb", timeout=PATIENCE_MS)
    launched = heading.inner_text().strip()
    assert launched != sandbox_id
    expect(page.get_by_text("running", exact=True)).to_be_visible()
    assert ada.sh(launched, "cat /dev/shm/here") == "as it was\n"

    menu_of(listed, "kept").click()
    listed.get_by_role("menuitem", name="Delete").click()
    asked = listed.get_by_role("dialog")
    expect(asked).to_contain_text("kept")
    asked.get_by_role("button", name="Delete template").click()
    expect(asked.get_by_role("alert")).to_contain_text("template 'kept' is needed by")
    expect(asked.get_by_role("alert")).to_contain_text("destroy them first")
    for each in (sandbox_id, launched):
        ada.ask("DELETE", f"/sandboxes/{each}", expect=204)
    asked.get_by_role("button", name="Delete template").click()
    expect(row_of(listed, "kept")).to_have_count(0, timeout=PATIENCE_MS)
    ada.ask("GET", "/templates/kept/tags", expect=404)


def test_a_snapshot_is_started_with_options(ada: Person, frozen: str) -> None:
    page = ada.open("/templates")
    expect(row_of(page, frozen)).to_be_visible()
    check_everywhere(page)
    opener = menu_of(page, frozen)
    opener.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Launch with options")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    check_accessible(page)
    page.keyboard.press("Escape")
    expect(opener).to_be_focused()
    expect(page.get_by_role("menu")).to_have_count(0)
    opener.click()
    page.get_by_role("menuitem", name="Launch with options").click()
    dialog = page.get_by_role("dialog", name="New sandbox")
    expect(dialog.get_by_label("Template")).to_have_value(frozen)
    dialog.get_by_text("Labels and environment").click()
    dialog.get_by_label("Labels").fill("from=menu")
    dialog.get_by_role("button", name="Create").click()
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("sb", timeout=PATIENCE_MS)
    launched = heading.inner_text().strip()
    assert ada.ask("GET", f"/sandboxes/{launched}")["metadata"] == {"from": "menu"}
    ada.ask("DELETE", f"/sandboxes/{launched}", expect=204)


def test_tags_are_given_and_taken(ada: Person, frozen: str) -> None:
    page = ada.open("/templates")
    menu_of(page, frozen).click()
    page.get_by_role("menuitem", name="Tags").click()
    dialog = page.get_by_role("dialog", name="Tags of frozen")
    expect(dialog.get_by_role("listitem")).to_contain_text("default")
    dialog.get_by_label("New tag").fill("not <this>")
    dialog.get_by_role("button", name="Add tag").click()
    expect(dialog.get_by_role("alert")).to_contain_text("is not valid")
    dialog.get_by_label("New tag").fill("v1")
    dialog.get_by_role("button", name="Add tag").click()
    expect(dialog.get_by_role("listitem")).to_have_count(2)
    check_everywhere(page)
    expect(row_of(page, frozen)).to_contain_text("Also v1")
    dialog.get_by_role("button", name="Remove tag v1").click()
    asked = page.get_by_role("dialog", name="Remove tag?")
    expect(asked).to_contain_text("frozen:v1")
    asked.get_by_role("button", name="Remove tag").click()
    expect(dialog.get_by_role("listitem")).to_have_count(1)
    dialog.get_by_role("button", name="Remove tag default").click()
    expect(asked).to_contain_text("It is the last tag")
    asked.get_by_role("button", name="Cancel").click()
    dialog.get_by_role("button", name="Close").first.click()
    expect(row_of(page, frozen)).not_to_contain_text("Also")


def test_the_platforms_are_nobodys_to_delete(ada: Person, bob: Person, frozen: str) -> None:
    page = bob.open("/templates")
    expect(page.get_by_role("heading", name="No templates of your own yet")).to_be_visible()
    expect(row_of(page, "base")).to_contain_text("Platform")
    expect(row_of(page, frozen)).to_have_count(0)
    more = menu_of(page, "base")
    expect(more).to_be_disabled()
    expect(more).to_have_accessible_description("It belongs to the platform")
    more.click(force=True)
    expect(page.get_by_role("menu")).to_have_count(0)
    check_everywhere(page)
    for person in (ada, bob):
        refused = person.ask("DELETE", "/templates/base", expect=403)
        assert "belongs to the platform" in refused["error"]["message"]


def test_the_list_is_filtered(ada: Person, frozen: str) -> None:
    page = ada.open("/templates")
    page.get_by_label("Filter by owner").select_option("The team")
    expect(row_of(page, frozen)).to_be_visible()
    expect(row_of(page, "base")).to_have_count(0)
    page.get_by_label("Filter by type").select_option("Images")
    expect(page.get_by_role("heading", name="No template is like that")).to_be_visible()
    page.get_by_role("button", name="Show all").click()
    page.get_by_role("searchbox").fill("FROZ")
    expect(row_of(page, frozen)).to_be_visible()
    expect(row_of(page, "base")).to_have_count(0)
