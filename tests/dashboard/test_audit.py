"""The audit log: who did what, of a team and of the platform."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import expect

from tests.dashboard.conftest import Person, attentive, check_everywhere

HOSTILE = "<i>italic</i>"


def test_the_log_shows_what_was_just_done(people: Callable[[str], Person]) -> None:
    vera = people("vera")
    with attentive(vera.context):
        for number in range(25):
            made = vera.ask("POST", "/api-keys", {"name": f"{HOSTILE} {number}"}, 201)
            vera.ask("DELETE", f"/api-keys/{made['id']}", expect=204)
        page = vera.open("/audit")
        rows = page.get_by_role("row")
        expect(rows).to_have_count(51)
        newest = rows.nth(1)
        expect(newest).to_contain_text("key.revoked")
        expect(newest).to_contain_text(vera.email)
        expect(newest).to_contain_text("127.0.0.1")
        newest.get_by_role("button", name="Details of key.revoked").click()
        details = page.get_by_role("row").filter(has_text="Outcome")
        expect(details).to_contain_text(f"{HOSTILE} 24")
        expect(details).to_contain_text("success")
        check_everywhere(page)

        page.get_by_role("button", name="Older entries").click()
        expect(rows.filter(has_text="user.logged_in")).to_have_count(1)
        expect(page.get_by_text("There are no older entries")).to_be_visible()
        page.get_by_label("Kind of object").select_option("user")
        expect(rows.filter(has_text="key.")).to_have_count(0)
        expect(rows.filter(has_text="user.logged_in")).to_have_count(1)
        page.get_by_label("Kind of object").select_option("key")
        page.get_by_label("Action").fill("key.created")
        page.get_by_label("Action").press("Enter")
        expect(rows).to_have_count(26)
        page.get_by_label("Action").fill("no.such")
        page.get_by_label("Action").press("Enter")
        expect(page.get_by_role("heading", name="No entry is like that")).to_be_visible()
        check_everywhere(page)
        page.get_by_role("button", name="Show all").click()
        expect(rows.filter(has_text="key.revoked").first).to_be_visible()


def test_the_platforms_log_has_all_teams(ada: Person, bob: Person) -> None:
    made = bob.ask("POST", "/api-keys", {"name": "of bob"}, 201)
    bob.ask("DELETE", f"/api-keys/{made['id']}", expect=204)
    page = ada.open("/admin/audit")
    row = page.get_by_role("row").filter(has_text="key.revoked").filter(has_text=bob.email)
    expect(row.first).to_be_visible()
    page.get_by_role("textbox", name="Team", exact=True).fill(bob.team_id)
    page.get_by_role("textbox", name="Team", exact=True).press("Enter")
    expect(page.get_by_role("row").filter(has_text=ada.email)).to_have_count(0)
    row.first.get_by_role("button", name="Details").click()
    expect(page.get_by_role("row").filter(has_text="Outcome")).to_contain_text(bob.team_id)
    check_everywhere(page)
