"""Processes and ports of a sandbox in the browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.dashboard.conftest import PATIENCE_MS, Person, check_everywhere

PORT = 8123


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Programs in VMs under emulation start when they can."""
    expect.set_options(timeout=PATIENCE_MS)
    yield
    expect.set_options(timeout=None)


@pytest.fixture
def server_tag(ada: Person, sandbox_id: str) -> Iterator[str]:
    """A server in the sandbox, by its tag."""
    body = {
        "cmd": "python3",
        "args": ["-u", "-m", "http.server", str(PORT), "--bind", "127.0.0.1"],
        "cwd": "/srv",
        "tag": "site",
    }
    ada.sh(sandbox_id, "echo '<h1>From the inside</h1>' > /srv/index.html")
    ada.ask("POST", f"/sandboxes/{sandbox_id}/exec", {**body, "background": True}, 202)
    yield "site"
    left = ada.ask("GET", f"/sandboxes/{sandbox_id}/processes")["processes"]
    if any(each["tag"] == "site" for each in left):
        ada.ask("DELETE", f"/sandboxes/{sandbox_id}/processes/site?signal=SIGKILL", expect=204)


def test_a_server_appears_and_is_visited(ada: Person, sandbox_id: str, server_tag: str) -> None:
    page = ada.open(f"/sandboxes/{sandbox_id}/ports")
    row = page.get_by_role("row").filter(has_text=str(PORT))
    expect(row).to_contain_text("127.0.0.1 (loopback)")
    check_everywhere(page)
    link = row.get_by_role("link")
    assert link.get_attribute("rel") == "noopener noreferrer"
    with ada.context.expect_page() as visited:
        link.click()
    expect(visited.value.get_by_role("heading", name="From the inside")).to_be_visible()
    assert visited.value.evaluate("window.opener") is None
    visited.value.close()
    page.get_by_label("Any port").fill(str(PORT))
    with ada.context.expect_page() as visited:
        page.get_by_role("button", name="Open").click()
    expect(visited.value.get_by_role("heading", name="From the inside")).to_be_visible()
    visited.value.close()
    ada.ask("DELETE", f"/sandboxes/{sandbox_id}/processes/{server_tag}?signal=SIGKILL", expect=204)
    expect(page.get_by_role("heading", name="Nothing listens")).to_be_visible()
    check_everywhere(page)


def test_a_process_is_ended(ada: Person, sandbox_id: str, server_tag: str) -> None:
    page = ada.open(f"/sandboxes/{sandbox_id}/processes")
    row = page.get_by_role("row").filter(has_text=server_tag)
    expect(row).to_contain_text("python3 -u -m http.server")
    check_everywhere(page)
    row.get_by_role("button", name="Terminate").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("http.server")
    dialog.get_by_role("button", name="Terminate process").click()
    expect(row).to_have_count(0)
    expect(page.get_by_role("heading", name="Nothing that was started by a call")).to_be_visible()
    check_everywhere(page)


def run(page: Page, line: str) -> None:
    page.get_by_label("Command line").fill(line)
    page.get_by_role("dialog").get_by_role("button", name="Run").click()


def test_a_command_is_run(ada: Person, sandbox_id: str) -> None:
    page = ada.open(f"/sandboxes/{sandbox_id}/processes")
    page.get_by_role("button", name="Run a command").click()
    dialog = page.get_by_role("dialog")
    output = dialog.get_by_label("Output")
    page.get_by_label("User").select_option("user")
    dialog.get_by_text("Standard input").click()
    dialog.get_by_label("Text").fill("one\ntwo\n")
    hostile = r"<b>bold</b>\033[31mred\033[0m\342\200\256\007"
    run(page, f"whoami; wc -l; printf '{hostile}\\n' >&2; exit 3")
    expect(output).to_have_text("user\n2\n<b>bold</b>red⟨U+202E⟩⟨U+0007⟩\n")
    expect(dialog.get_by_text("Exit code 3")).to_be_visible()
    check_everywhere(page)
    # More than is shown, and no end of it.
    run(page, "yes 0123456789")
    expect(dialog.get_by_text("Only the end of the output is shown")).to_be_visible()
    dialog.get_by_role("button", name="Kill").click()
    expect(dialog.get_by_text("Exit code 137")).to_be_visible()
    assert len(output.inner_text()) <= 128 * 1024
    dialog.get_by_role("button", name="Close").last.click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_private_ports_need_a_token(ada: Person) -> None:
    private = ada.create(public_traffic=False)
    page = ada.open(f"/sandboxes/{private}/ports")
    reach = page.get_by_role("region", name="Reaching ports")
    expect(reach).to_contain_text("E2b-Traffic-Access-Token")
    token = ada.ask("GET", f"/sandboxes/{private}/access")["traffic_token"]
    assert token not in page.content()
    reach.get_by_role("button", name="Show the token").click()
    expect(reach).to_contain_text(token)
    check_everywhere(page)
    ada.ask("DELETE", f"/sandboxes/{private}", expect=204)
