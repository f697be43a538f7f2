"""The pages of whoever administers the platform: hosts, teams, users, sandboxes, templates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from sandmartin.agent.membership import new_key
from tests.dashboard.conftest import PASSWORD, Person, attentive, check_everywhere

HOSTILE = "<img src=x onerror=alert(1)> & co"


@pytest.fixture
def dora(people: Callable[[str], Person]) -> Iterator[Person]:
    """Somebody of a team of their own, to whom things may be done."""
    with attentive(people("dora").context):
        yield people("dora")


def host_of(ada: Person) -> Any:
    return next(each for each in ada.ask("GET", "/hosts") if each["status"] == "online")


def registration(token: str) -> dict[str, object]:
    """What an agent says with a token; it has no room, so that nothing is made there."""
    facts = {
        "cpus": 2,
        "memory_mb": 0,
        "memory_overhead_mb": 0,
        "disk_free_mb": 0,
        "cpu_overcommit": 1.0,
        "accel": "kvm",
        "vmm_version": "8",
        "agent_version": "0",
    }
    address = "https://127.0.0.1:9"
    return {"token": token, "request": new_key()[1], "address": address, "facts": facts}


def row_of(page: Page, text: str) -> Locator:
    return page.get_by_role("row").filter(has_text=text)


def choose(page: Page, menu: str, item: str) -> Locator:
    """What a menu's item asks."""
    page.get_by_role("button", name=menu).click()
    page.get_by_role("menuitem", name=item).click()
    return page.get_by_role("dialog")


def test_the_own_host_tells_what_it_has_and_is_drained(ada: Person) -> None:
    page = ada.open("/admin/hosts")
    host = host_of(ada)
    card = page.get_by_role("article", name=host["name"], exact=True)
    expect(card.get_by_text("online", exact=True)).to_be_visible()
    of = f"{host['cpus'] * host['cpu_overcommit']:,.10g}"
    vcpus = card.get_by_role("meter", name="vCPUs")
    expect(vcpus).to_have_attribute("aria-valuetext", f"{host['used_vcpus']} of {of}")
    expect(card.get_by_role("meter", name="Memory")).to_be_visible()
    word = {"tcg": "emulation", "kvm": "KVM"}[host["accel"]]
    expect(card.get_by_text(word)).to_be_visible()
    card.get_by_text("Details").click()
    expect(card.get_by_text(host["version"], exact=True)).to_be_visible()
    try:
        card.get_by_role("button", name="Drain").click()
        expect(card.get_by_text("It takes nothing new")).to_be_visible()
        assert host_of(ada)["draining"]
        check_everywhere(page)
        card.get_by_role("button", name="Undrain").click()
        expect(card.get_by_text("It takes nothing new")).to_have_count(0)
        assert not host_of(ada)["draining"]
    finally:
        ada.ask("POST", f"/hosts/{host['id']}/undrain")
    card.get_by_role("button", name="More").click()
    expect(page.get_by_role("menuitem", name="Delete host")).to_be_disabled()


def test_a_host_is_added_by_a_token_and_deleted(ada: Person) -> None:
    page = ada.open("/admin/hosts")
    page.get_by_role("button", name="Add host").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("rack-2")
    dialog.get_by_role("button", name="Add host").click()
    dialog = page.get_by_role("dialog", name="Token for rack-2")
    dialog.get_by_label("Address of that machine").fill("10.0.0.7")
    command = dialog.get_by_label("Command")
    expect(command).to_contain_text("SANDMARTIN_HOST_TOKEN=smr_")
    expect(command).to_contain_text(
        f"sandmartin agent --control {ada.server.url} --listen 10.0.0.7:7443"
    )
    expect(dialog.get_by_role("button", name="Copy command")).to_be_visible()
    expect(dialog.get_by_text("Waiting for rack-2 to register")).to_be_visible()
    check_everywhere(page)
    card = page.get_by_role("article", name="rack-2")
    expect(card).to_contain_text("has not registered yet")
    token = command.inner_text().split()[0].partition("=")[2]
    ada.ask("POST", "/hosts/register", registration(token), 201)
    expect(dialog.get_by_text("rack-2 is there: 2 processors")).to_be_visible()
    dialog.get_by_role("button", name="Done").click()
    expect(card).to_contain_text("online")

    asked = choose(page, "More for rack-2", "Delete host")
    expect(asked).to_contain_text("Nothing that is only there would be lost")
    remove = asked.get_by_role("button", name="Delete host")
    expect(remove).to_be_disabled()
    asked.get_by_label("Type its name to confirm").fill("rack-2")
    remove.click()
    # There is no agent at its address.
    expect(asked.get_by_role("alert")).to_contain_text("delete it with force")
    asked.get_by_label("even if its agent cannot be told").check()
    remove.click()
    expect(card).to_have_count(0)


def test_quotas_bound_what_a_team_makes(ada: Person, dora: Person) -> None:
    dora.ask("PATCH", f"/teams/{dora.team_id}", {"name": HOSTILE})
    page = ada.open("/admin/teams")
    row = row_of(page, HOSTILE)
    expect(row).to_contain_text("0 of 100")
    check_everywhere(page)
    row.get_by_role("button", name="Quotas").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Running sandboxes").fill("0")
    dialog.get_by_role("button", name="Save").click()
    expect(row).to_contain_text("0 of 0")

    theirs = dora.open()
    theirs.get_by_role("button", name="New sandbox").first.click()
    theirs.get_by_role("dialog").get_by_role("button", name="Create").click()
    refused = theirs.get_by_role("alert")
    expect(refused).to_contain_text("1 sandboxes, and may have 0")
    expect(refused).to_contain_text("ask for a higher quota")

    row.get_by_role("button", name="Quotas").click()
    dialog.get_by_label("Running sandboxes").fill("")
    dialog.get_by_role("button", name="Save").click()
    expect(row).to_contain_text("0 of 100")


def test_a_team_is_deleted_by_its_name(ada: Person) -> None:
    team_id = ada.ask("POST", "/teams", {"name": "Short lived"}, 201)["id"]
    page = ada.open("/admin/teams")
    page.get_by_label("Filter by name or id").fill("short")
    expect(page.get_by_role("row")).to_have_count(2)
    page.get_by_role("button", name="Delete Short lived").click()
    asked = page.get_by_role("dialog")
    expect(asked).to_contain_text("are destroyed")
    asked.get_by_label("Type its name to confirm").fill("Short lived")
    asked.get_by_role("button", name="Delete team").click()
    expect(page.get_by_role("heading", name="No team is like that")).to_be_visible()
    check_everywhere(page)
    ada.ask("GET", f"/teams/{team_id}", expect=404)


def test_whoever_is_disabled_is_led_to_the_login_until_they_are_enabled(
    ada: Person, dora: Person
) -> None:
    theirs = dora.open()
    expect(theirs.get_by_role("heading", name="No sandboxes yet")).to_be_visible()
    page = ada.open("/admin/users")
    row = row_of(page, dora.email)
    expect(row).to_contain_text("active")
    asked = choose(page, f"Change {dora.email}", "Disable")
    expect(asked).to_contain_text(dora.email)
    asked.get_by_role("button", name="Disable").click()
    expect(row).to_contain_text("disabled")
    # Nothing was done on their page.
    expect(theirs.get_by_role("heading", name="Log in")).to_be_visible()
    choose(page, f"Change {dora.email}", "Enable").get_by_role("button", name="Enable").click()
    expect(row).to_contain_text("active")
    login = {"email": dora.email, "password": PASSWORD}
    dora.csrf_token = dora.ask("POST", "/auth/login", login)["csrf_token"]


def test_nobody_locks_themselves_out(ada: Person) -> None:
    page = ada.open("/admin/users")
    asked = choose(page, f"Change {ada.email}", "Disable")
    expect(asked).to_contain_text("This is your own account")
    asked.get_by_role("button", name="Disable").click()
    expect(asked.get_by_role("alert")).to_contain_text("administrator")
    asked.get_by_role("button", name="Cancel").click()
    assert ada.ask("GET", "/me")["admin"]


def test_an_administrator_is_made_and_unmade(ada: Person, dora: Person) -> None:
    page = ada.open("/admin/users")
    row = row_of(page, dora.email)
    choose(page, f"Change {dora.email}", "Make administrator").get_by_role(
        "button", name="Make administrator"
    ).click()
    expect(row).to_contain_text("the platform")
    assert dora.ask("GET", "/me")["admin"]
    choose(page, f"Change {dora.email}", "Take administration away").get_by_role(
        "button", name="Take administration away"
    ).click()
    expect(row).not_to_contain_text("the platform")


def test_an_invitation_is_made_shown_once_and_withdrawn(ada: Person) -> None:
    page = ada.open("/admin/users")
    page.get_by_role("button", name="Invite").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("E-mail address").fill("hedy@example.org")
    dialog.get_by_role("button", name="Make invitation").click()
    expect(dialog.get_by_label("Link", exact=True)).to_contain_text("/dashboard/signup#invitation=")
    expect(dialog.get_by_role("button", name="Copy link")).to_be_visible()
    dialog.get_by_role("button", name="Done").click()
    row = row_of(page, "hedy@example.org")
    expect(row).to_be_visible()
    check_everywhere(page)
    row.get_by_role("button", name="Withdraw").click()
    page.get_by_role("dialog").get_by_role("button", name="Withdraw invitation").click()
    expect(row).to_have_count(0)


def test_sandboxes_of_all_teams_are_found_and_destroyed(
    ada: Person, dora: Person, sandbox_id: str
) -> None:
    team = dora.ask("GET", f"/teams/{dora.team_id}")["name"]
    theirs = dora.create(metadata={"purpose": HOSTILE})
    page = ada.open("/admin/sandboxes")
    row = row_of(page, theirs)
    expect(row).to_contain_text(team)
    expect(row).to_contain_text(host_of(ada)["name"])
    expect(row_of(page, sandbox_id)).to_contain_text("running")
    check_everywhere(page)
    page.get_by_label("Filter by id, team").fill("no such thing")
    expect(page.get_by_role("heading", name="No sandbox is like that")).to_be_visible()
    page.get_by_label("Filter by id, team").fill("")
    page.get_by_label("Filter by team").select_option(label=team)
    expect(row_of(page, sandbox_id)).to_have_count(0)
    row.get_by_role("button", name="Destroy").click()
    asked = page.get_by_role("dialog")
    expect(asked).to_contain_text(theirs)
    expect(asked).to_contain_text(team)
    asked.get_by_role("button", name="Destroy sandbox").click()
    expect(row).to_have_count(0)
    assert dora.ask("GET", f"/sandboxes/{theirs}")["status"] == "stopped"


def test_the_default_template_cannot_be_deleted(ada: Person) -> None:
    page = ada.open("/admin/templates")
    row = page.get_by_role("row").filter(has=page.get_by_text("base", exact=True))
    expect(row).to_contain_text("the default")
    expect(row.get_by_role("button")).to_have_count(0)
    check_everywhere(page)


@pytest.mark.parametrize("name", ["hosts", "teams", "users", "sandboxes", "templates"])
def test_nobody_else_is_let_in(bob: Person, name: str) -> None:
    page = bob.open(f"/admin/{name}")
    refused = page.get_by_role("alert").first
    expect(refused).to_contain_text("administrator")
    expect(refused).to_contain_text("Request rq")
    expect(page.get_by_role("link", name="Hosts")).to_have_count(0)
    if name == "hosts":
        check_everywhere(page)
