"""Coming and going: the first account, logging in and out, and who is not let in."""

from __future__ import annotations

from playwright.sync_api import Browser, expect

from tests.dashboard.conftest import (
    PASSWORD,
    Person,
    Server,
    check_everywhere,
    complaints_of,
    watched,
)


def test_whoever_is_not_logged_in_is_led_to_the_login_and_back(ada: Person) -> None:
    browser = ada.context.browser
    assert browser is not None
    with browser.new_context() as context:
        page = watched(context.new_page())
        page.goto(ada.server.page_url("/keys"))
        expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        check_everywhere(page)
        page.get_by_label("E-mail address").fill(ada.email)
        page.get_by_label("Password").fill("not it at all, no")
        page.get_by_role("button", name="Log in").click()
        refused = page.get_by_role("alert")
        expect(refused).to_contain_text("password")
        expect(refused).to_contain_text("Request rq")
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Log in").click()
        expect(page).to_have_url(ada.server.page_url("/keys"))
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        assert not complaints_of(page)


def test_an_invitation_makes_an_account(ada: Person, server: Server, browser: Browser) -> None:
    url = ada.ask("POST", "/admin/invitations", {}, 201)["url"]
    with browser.new_context() as context:
        page = watched(context.new_page())
        page.goto(server.page_url("/signup"))
        expect(page.get_by_text("An account is made with an invitation")).to_be_visible()
        page.goto("about:blank")
        page.goto(url)
        page.get_by_label("Name", exact=True).fill("Grace")
        page.get_by_label("E-mail address").fill("grace@example.org")
        page.get_by_label("Password").fill(PASSWORD)
        check_everywhere(page)
        page.get_by_role("button", name="Sign up").click()
        expect(page.get_by_role("heading", name="Sandboxes", exact=True)).to_be_visible()
        expect(page.get_by_role("heading", name="No sandboxes yet")).to_be_visible()
        check_everywhere(page)
        assert not complaints_of(page)
