"""What is around every page: going about with the keyboard, in a narrow window, between teams."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.dashboard.conftest import NARROW, Person, check_everywhere

FOCUSED = "document.activeElement.id || document.activeElement.innerText.trim()"


def test_the_keyboard_reaches_everything(ada: Person) -> None:
    page = ada.open("/settings")
    expect(page.get_by_role("heading", name="Settings")).to_be_visible()
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to content"
    expect(page.get_by_role("link", name="Skip to content")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    assert page.url.endswith("/settings")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")

    page.reload()
    expect(page.get_by_role("heading", name="Settings")).to_be_visible()
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(focused(page))
        if page.evaluate("document.activeElement.closest('main') !== null"):
            break
    assert seen[:4] == ["Skip to content", "Sandmartin", "Sandboxes", "Templates"]
    assert {"Members", "Hosts", "theme-choice", "Log out"} <= set(seen)


def test_who_goes_to_a_page_is_at_its_beginning_and_told_of_it(ada: Person) -> None:
    page = ada.open("/settings")
    page.get_by_role("link", name="Hosts").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Hosts", exact=True)).to_be_visible()
    expect(page.get_by_role("main")).to_be_focused()
    expect(page.locator("p[aria-live]")).to_have_text("Hosts · Sandmartin")
    expect(page.get_by_role("link", name="Hosts")).to_have_attribute("aria-current", "page")


def test_in_a_narrow_window_the_navigation_opens_and_closes(ada: Person) -> None:
    page = ada.open("/settings")
    page.set_viewport_size(NARROW)
    hosts = page.get_by_role("link", name="Hosts")
    expect(hosts).to_be_hidden()
    page.get_by_role("button", name="Open navigation").click()
    expect(hosts).to_be_visible()
    check_everywhere(page)
    page.set_viewport_size(NARROW)
    page.keyboard.press("Escape")
    expect(hosts).to_be_hidden()
    toggle = page.get_by_role("button", name="Open navigation")
    expect(toggle).to_be_focused()
    expect(toggle).to_have_attribute("aria-expanded", "false")
    # The second time it is the page that is shown already.
    for _ in range(2):
        toggle.click()
        hosts.click()
        expect(page.get_by_role("heading", name="Hosts", exact=True)).to_be_visible()
        expect(hosts).to_be_hidden()


def test_pages_show_the_team_that_is_chosen(ada: Person, sandbox_id: str) -> None:
    team = ada.ask("POST", "/teams", {"name": "Side <b>bar</b>"}, 201)
    page = ada.open(f"/sandboxes/{sandbox_id}")
    expect(page.get_by_role("heading", name=sandbox_id)).to_be_visible()
    choice = page.get_by_role("combobox", name="Team")
    choice.select_option(label="Side <b>bar</b>")
    expect(page.get_by_role("heading", name="No sandboxes yet")).to_be_visible()
    assert ada.ask("GET", "/me")["team_id"] == team["id"]
    choice.select_option(value=ada.team_id)
    expect(page.get_by_role("link", name=sandbox_id)).to_be_visible()
    ada.ask("DELETE", f"/teams/{team['id']}", expect=204)


def focused(page: Page) -> str:
    return str(page.evaluate(FOCUSED))
