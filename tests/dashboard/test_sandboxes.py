"""The list of sandboxes: making one, and seeing what becomes of it without asking."""

from __future__ import annotations

from playwright.sync_api import Response, expect

from tests.dashboard.conftest import Person, check_everywhere


def test_a_sandbox_is_made_paused_woken_and_destroyed(ada: Person) -> None:
    page = ada.open()
    page.get_by_role("button", name="New sandbox").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Memory (MiB)").fill("256")
    dialog.get_by_text("Labels and environment").click()
    dialog.get_by_label("Labels").fill("purpose=<b>bold</b>\nturned=a\u202eb")
    check_everywhere(page)
    dialog.get_by_role("button", name="Create").click()
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("sb")
    sandbox_id = heading.inner_text().strip()
    expect(page.get_by_text("running", exact=True)).to_be_visible()

    listed = ada.open()
    row = listed.get_by_role("row").filter(has_text=sandbox_id)
    expect(row).to_contain_text("running")
    # What others wrote is text, and what would not be seen is shown.
    expect(row).to_contain_text("purpose=<b>bold</b>")
    expect(row).to_contain_text("turned=a⟨U+202E⟩b")
    check_everywhere(listed)
    page.get_by_role("button", name="Pause").click()
    expect(row).to_contain_text("paused")
    row.get_by_role("button", name="Resume").click()
    expect(row).to_contain_text("running")
    expect(page.get_by_role("button", name="Pause")).to_be_enabled()
    row.get_by_role("button", name="Destroy").click()
    asked = listed.get_by_role("dialog")
    expect(asked).to_contain_text(sandbox_id)
    asked.get_by_role("button", name="Destroy sandbox").click()
    expect(row).to_have_count(0)


def test_another_teams_sandbox_is_not_there(ada: Person, bob: Person, sandbox_id: str) -> None:
    page = bob.open(f"/sandboxes/{sandbox_id}")
    expect(page.get_by_role("heading", name="There is no such sandbox")).to_be_visible()
    check_everywhere(page)
    bob.ask("GET", f"/sandboxes/{sandbox_id}", expect=404)


def test_the_first_load_is_small(ada: Person) -> None:
    sizes: dict[str, int] = {}

    def note(response: Response) -> None:
        if response.request.resource_type == "script":
            assert response.headers["content-encoding"] == "gzip"
            sizes[response.url.rpartition("/")[2]] = int(response.headers["content-length"])

    page = ada.open("/settings")
    page.on("response", note)
    page.goto(ada.server.page_url("/sandboxes"))
    expect(page.get_by_role("heading", name="Sandboxes", exact=True)).to_be_visible()
    listed = page.get_by_role("table").or_(page.get_by_role("heading", name="No sandboxes yet"))
    expect(listed).to_be_visible()
    print(f"{sum(sizes.values())} bytes of script in {len(sizes)} files: {sizes}")
    assert 10_000 < sum(sizes.values()) < 300_000
    assert not [name for name in sizes if name.startswith(("xterm", "Terminal", "codemirror"))]
