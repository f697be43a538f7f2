"""API keys: shown once, good for the API until they are revoked."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
from playwright.sync_api import expect

from tests.dashboard.conftest import Person, attentive, check_accessible, check_everywhere

HOSTILE = "<img src=x onerror=alert(1)>"


def status(person: Person, key: str) -> int:
    """What the API answers whoever has this key."""
    headers = {"X-API-Key": key}
    return httpx.get(f"{person.server.url}/v1/sandboxes", headers=headers).status_code


def test_a_key_is_shown_once_and_works_until_it_is_revoked(
    people: Callable[[str], Person],
) -> None:
    olga = people("olga")
    with attentive(olga.context):
        page = olga.open("/keys")
        expect(page.get_by_role("heading", name="No keys yet")).to_be_visible()
        check_everywhere(page)
        page.get_by_role("button", name="New key").first.click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_text("administers the platform")).to_have_count(0)
        dialog.get_by_label("Name").fill("a\u202eb")
        dialog.get_by_role("button", name="Create").click()
        expect(dialog.get_by_role("alert")).to_contain_text("Request rq")
        dialog.get_by_label("Name").fill(HOSTILE)
        dialog.get_by_role("button", name="Create").click()
        expect(dialog).to_contain_text("It is shown this once")
        key = dialog.get_by_label("Key", exact=True).inner_text()
        assert re.fullmatch("e2b_[0-9a-f]{40}", key)
        expect(dialog).to_contain_text(f"export SANDMARTIN_API_KEY={key}")
        expect(dialog).to_contain_text(f"export E2B_SANDBOX_URL={olga.server.url}")
        check_accessible(page)
        assert status(olga, key) == 200
        dialog.get_by_role("button", name="Done").click()

        row = page.get_by_role("row").filter(has_text=HOSTILE)
        expect(row).to_contain_text("you")
        expect(row).to_contain_text(key[:10])
        assert key not in page.content()
        expect(row).to_contain_text("never")
        page.reload()
        expect(row).not_to_contain_text("never")
        check_everywhere(page)
        row.get_by_role("button", name="Revoke").click()
        expect(dialog).to_contain_text(HOSTILE)
        dialog.get_by_role("button", name="Revoke key").click()
        expect(page.get_by_role("heading", name="No keys yet")).to_be_visible()
        assert status(olga, key) == 401


def test_a_key_of_an_administrator_may_administer(ada: Person) -> None:
    page = ada.open("/keys")
    page.get_by_role("button", name="New key").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("platform")
    dialog.get_by_label("It administers the platform").check()
    dialog.get_by_role("button", name="Create").click()
    key = dialog.get_by_label("Key", exact=True).inner_text()
    headers = {"X-API-Key": key}
    found = httpx.get(f"{ada.server.url}/v1/admin/users", headers=headers)
    assert found.status_code == 200
    dialog.get_by_role("button", name="Done").click()
    row = page.get_by_role("row").filter(has=page.get_by_role("button", name="Revoke platform"))
    expect(row).to_contain_text("administers the platform")
    row.get_by_role("button", name="Revoke platform").click()
    dialog.get_by_role("button", name="Revoke key").click()
    expect(row).to_have_count(0)
