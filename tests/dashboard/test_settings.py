"""One's own account: its name, its password, its theme, and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.dashboard.conftest import (
    PASSWORD,
    Person,
    Server,
    attentive,
    check_everywhere,
    complaints_of,
    watched,
)

NEW = "a quite different one"


@pytest.fixture
def erin(people: Callable[[str], Person]) -> Iterator[Person]:
    """Somebody whose account is changed, and deleted at last."""
    with attentive(people("erin").context):
        yield people("erin")


def log_in(page: Page, server: Server, email: str, password: str) -> None:
    page.goto(server.page_url("/login"))
    page.get_by_label("E-mail address").fill(email)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Sandboxes", exact=True)).to_be_visible()


def test_name_and_theme(erin: Person) -> None:
    page = erin.open("/settings")
    expect(page.get_by_text(erin.email)).to_be_visible()
    expect(page.get_by_text(f"sandmartin login {erin.server.url}")).to_be_visible()
    check_everywhere(page)
    name = page.get_by_label("Name", exact=True)
    name.fill("<i>Erin</i>")
    page.get_by_role("button", name="Save name").click()
    expect(page.get_by_role("region", name="Account", exact=True)).to_contain_text("<i>Erin</i>")
    assert erin.ask("GET", "/me")["name"] == "<i>Erin</i>"
    page.get_by_role("radio", name="Dark").check()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.get_by_role("radio", name="Dark")).to_be_checked()
    page.get_by_role("radio", name="As the system has it").check()


def test_whoever_could_not_connect_an_account_elsewhere_is_told(erin: Person) -> None:
    page = erin.open("/login?error=already_linked")
    expect(page.get_by_role("heading", name="Settings")).to_be_visible()
    expect(page.get_by_text("belongs to somebody else here")).to_be_visible()


def test_a_new_password_ends_other_sessions(erin: Person, server: Server) -> None:
    browser = erin.context.browser
    assert browser is not None
    page = erin.open("/settings")
    with browser.new_context() as elsewhere:
        other = watched(elsewhere.new_page())
        log_in(other, server, erin.email, PASSWORD)
        page.get_by_label("Current password").fill("not it at all, no")
        page.get_by_label("New password", exact=True).fill(NEW)
        page.get_by_label("New password again").fill(f"{NEW}!")
        expect(page.get_by_text("It is not the same")).to_be_visible()
        page.get_by_label("New password again").fill(NEW)
        page.get_by_role("button", name="Change password").click()
        expect(page.get_by_role("alert")).to_contain_text("the current password is wrong")
        page.get_by_label("Current password").fill(PASSWORD)
        page.get_by_role("button", name="Change password").click()
        expect(page.get_by_text("Your password is changed")).to_be_visible()
        expect(other.get_by_role("heading", name="Log in")).to_be_visible()
        log_in(other, server, erin.email, NEW)
        assert not complaints_of(other)


def test_an_account_is_deleted_by_its_address(erin: Person) -> None:
    page = erin.open("/settings")
    page.get_by_role("button", name="Delete account").click()
    asked = page.get_by_role("dialog")
    remove = asked.get_by_role("button", name="Delete account")
    expect(remove).to_be_disabled()
    asked.get_by_label("Type its name to confirm").fill(erin.email)
    remove.click()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    login = {"email": erin.email, "password": NEW}
    erin.ask("POST", "/auth/login", login, 401)


def test_the_last_administrator_stays(ada: Person) -> None:
    page = ada.open("/settings")
    page.get_by_role("button", name="Delete account").click()
    asked = page.get_by_role("dialog")
    asked.get_by_label("Type its name to confirm").fill(ada.email)
    asked.get_by_role("button", name="Delete account").click()
    expect(asked.get_by_role("alert")).to_contain_text("administrator")
