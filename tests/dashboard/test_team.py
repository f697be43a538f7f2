"""A team: whom it invites, who may do what, and how one comes and goes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.dashboard.conftest import Person, attentive, check_accessible, check_everywhere

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def pia(people: Callable[[str], Person]) -> Iterator[Person]:
    """The owner of a team."""
    with attentive(people("pia").context):
        yield people("pia")


@pytest.fixture
def rolf(people: Callable[[str], Person]) -> Iterator[Person]:
    """Whom she invites."""
    with attentive(people("rolf").context):
        yield people("rolf")


def invite(page: Page, email: str) -> str:
    """Makes an invitation in the page; its link."""
    page.get_by_role("button", name="Invite somebody").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("E-mail address").fill(email)
    dialog.get_by_role("button", name="Make invitation").click()
    link = dialog.get_by_label("Link", exact=True).inner_text()
    expect(dialog).to_contain_text("No mail is sent")
    check_accessible(page)
    dialog.get_by_role("button", name="Done").click()
    return link


def test_somebody_is_invited_joins_is_promoted_and_is_removed(pia: Person, rolf: Person) -> None:
    pia.ask("POST", "/api-keys", {"name": "of pia"}, 201)
    page = pia.open("/team")
    expect(page.get_by_text("Nobody is invited at present")).to_be_visible()
    link = invite(page, rolf.email)
    pending = page.get_by_role("row", name=rolf.email)
    expect(pending).to_contain_text("member")
    check_everywhere(page)

    joined = rolf.open("/team")
    joined.get_by_label("Join a team with an invitation").fill("not one at all")
    joined.get_by_role("button", name="Join").click()
    expect(joined.get_by_role("alert")).to_contain_text("the invitation is not valid")
    joined.get_by_label("Join a team with an invitation").fill(link)
    joined.get_by_role("button", name="Join").click()
    expect(joined.get_by_role("heading", level=1)).to_contain_text("Pia")
    # Told by an event, without asking.
    row = page.get_by_role("row").filter(has=page.get_by_label("Role of Rolf"))
    expect(row).to_contain_text(rolf.email)
    expect(page.get_by_text("Nobody is invited at present")).to_be_visible()

    check_member_sees_no_controls(rolf, joined)
    row.get_by_label("Role of Rolf").select_option("admin")
    expect(page.get_by_text("Rolf is admin now")).to_be_visible()
    joined.goto(joined.url.replace("/keys", "/team"))
    expect(joined.get_by_role("button", name="Invite somebody")).to_be_visible()
    # An admin does not act on owners.
    expect(joined.get_by_label("Role of Pia")).to_have_count(0)

    row.get_by_role("button", name="Remove Rolf").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(rolf.email)
    dialog.get_by_role("button", name="Remove member").click()
    expect(row).to_have_count(0)
    joined.reload()
    expect(joined.get_by_role("heading", name="Log in")).to_be_visible()


def check_member_sees_no_controls(person: Person, page: Page) -> None:
    """On all pages of a team whose member somebody is."""
    expect(page.get_by_role("row").filter(has_text=person.email)).to_contain_text("member")
    for name in ("Invite somebody", "Rename", "Delete team"):
        expect(page.get_by_role("button", name=name)).to_have_count(0)
    expect(page.get_by_role("combobox", name="Role of")).to_have_count(0)
    check_accessible(page)
    page.get_by_role("link", name="Notifications").click()
    expect(page.get_by_text("The team's owners and admins make them")).to_be_visible()
    expect(page.get_by_role("button", name="New channel")).to_have_count(0)
    page.get_by_role("link", name="API keys").click()
    expect(page.get_by_text("You may revoke the keys that you made")).to_be_visible()
    revoke = page.get_by_role("row", name="of pia").get_by_role("button", name="Revoke of pia")
    expect(revoke).to_be_disabled()
    expect(revoke).to_have_attribute("title", re.compile("Members revoke the keys that they made"))


def test_an_invitation_is_withdrawn(pia: Person) -> None:
    page = pia.open("/team")
    hostile = "<b>x</b>@example.org"
    page.get_by_role("button", name="Invite somebody").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("E-mail address").fill("a\u200fb@example.org")
    dialog.get_by_role("button", name="Make invitation").click()
    expect(dialog.get_by_role("alert")).to_contain_text("this is no e-mail address")
    dialog.get_by_role("button", name="Cancel").click()
    invite(page, hostile)
    row = page.get_by_role("row").filter(has_text=hostile)
    row.get_by_role("button", name="Withdraw").click()
    expect(dialog).to_contain_text(hostile)
    dialog.get_by_role("button", name="Withdraw invitation").click()
    expect(row).to_have_count(0)


def test_a_team_is_made_renamed_and_deleted(pia: Person) -> None:
    page = pia.open("/team")
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("Pia")
    expect(page.get_by_role("button", name="Leave team")).to_be_disabled()
    first = heading.inner_text()
    page.get_by_role("button", name="New team").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("Second")
    dialog.get_by_role("button", name="Create").click()
    expect(heading).to_have_text("Team Second")
    page.get_by_role("button", name="Rename").click()
    dialog.get_by_label("Name").fill("a\u202eb")
    dialog.get_by_role("button", name="Rename").click()
    expect(dialog.get_by_role("alert")).to_contain_text("not printable")
    dialog.get_by_label("Name").fill(HOSTILE)
    dialog.get_by_role("button", name="Rename").click()
    expect(heading).to_have_text(f"Team {HOSTILE}")
    expect(page.get_by_role("combobox", name="Team", exact=True)).to_contain_text(HOSTILE)

    page.get_by_role("button", name="Delete team").click()
    delete = dialog.get_by_role("button", name="Delete team")
    expect(delete).to_be_disabled()
    dialog.get_by_label("Type its name to confirm").fill(HOSTILE)
    delete.click()
    expect(heading).to_have_text(first)
    assert [each["name"] for each in pia.ask("GET", "/teams")] == [first.removeprefix("Team ")]


def test_whoever_leaves_acts_for_another_team(pia: Person, people: Callable[[str], Person]) -> None:
    with attentive(people("sara").context):
        sara = people("sara")
        path = f"/teams/{pia.team_id}/invitations"
        token = pia.ask("POST", path, {"role": "owner"}, 201)["token"]
        page = sara.open("/team")
        own = page.get_by_role("heading", level=1).inner_text()
        page.get_by_label("Join a team with an invitation").fill(token)
        page.get_by_role("button", name="Join").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("Pia")
        page.get_by_label("Role of Sara").select_option("member")
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button", name="Become member").click()
        expect(page.get_by_role("button", name="Invite somebody")).to_have_count(0)
        page.get_by_role("button", name="Leave team").click()
        expect(dialog).to_contain_text("Pia")
        dialog.get_by_role("button", name="Leave team").click()
        expect(page.get_by_role("heading", level=1)).to_have_text(own)
        members = pia.ask("GET", f"/teams/{pia.team_id}/members")
        assert [each["email"] for each in members] == [pia.email]
