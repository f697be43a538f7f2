"""Checkpoints of a sandbox, the way back to them, and the tree of its forks."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from tests.dashboard.conftest import Person, check_everywhere


def made_of(page: Page, sandbox_id: str) -> Locator:
    """What the tree shows below a sandbox."""
    return page.get_by_role("list", name=f"Made of {sandbox_id}", exact=True)


def test_a_sandbox_goes_back_to_a_checkpoint(ada: Person, sandbox_id: str) -> None:
    page = ada.open(f"/sandboxes/{sandbox_id}/history")
    expect(page.get_by_role("heading", name="No checkpoints yet")).to_be_visible()
    expect(page.get_by_text("There are no forks yet")).to_be_visible()
    check_everywhere(page)
    ada.sh(sandbox_id, "echo before >/root/state")
    page.get_by_role("button", name="New checkpoint").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Comment").fill("before <b>it</b>\u202e")
    check_everywhere(page)
    dialog.get_by_role("button", name="Make checkpoint").click()
    comment = "before <b>it</b>⟨U+202E⟩"
    row = page.get_by_role("row").filter(has_text=comment)
    expect(row).to_contain_text("MiB")
    expect(made_of(page, sandbox_id)).to_contain_text(comment)
    ada.sh(sandbox_id, "echo after >/root/state; touch /root/new")

    row.get_by_role("button", name="Roll back").click()
    expect(dialog).to_contain_text(comment)
    dialog.get_by_role("button", name="Roll back").click()
    expect(page.get_by_text("The sandbox is as it was at the checkpoint")).to_be_visible()
    assert ada.sh(sandbox_id, "cat /root/state; ls /root") == "before\nstate\n"
    expect(page.get_by_role("button", name="New checkpoint")).to_be_enabled()
    row.get_by_role("button", name="Delete checkpoint").click()
    dialog.get_by_role("button", name="Delete checkpoint").click()
    expect(row).to_have_count(0)
    expect(made_of(page, sandbox_id)).to_have_count(0)
    assert ada.ask("GET", f"/sandboxes/{sandbox_id}/checkpoints") == []


def test_forks_are_made_and_seen_in_the_tree(ada: Person, sandbox_id: str) -> None:
    page = ada.open(f"/sandboxes/{sandbox_id}/history")
    other = ada.open(f"/sandboxes/{sandbox_id}/history")
    expect(other.get_by_text("There are no forks yet")).to_be_visible()
    page.get_by_role("button", name="Make forks").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("How many")).to_have_value("1")
    dialog.get_by_role("button", name="Fork").click()
    expect(page.get_by_text("1 fork made")).to_be_visible()
    child = made_of(page, sandbox_id).get_by_role("link")
    expect(child).to_have_count(1)
    fork_id = child.inner_text()
    # Whoever looks sees it come, and what is kept of it.
    expect(made_of(other, sandbox_id)).to_contain_text(fork_id)
    expect(made_of(other, sandbox_id)).to_contain_text("running")
    ada.ask("POST", f"/sandboxes/{fork_id}/checkpoints", {"comment": "of the fork"}, 201)
    expect(made_of(other, fork_id)).to_contain_text("of the fork")
    check_everywhere(other)

    child.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(fork_id)
    tree = page.get_by_role("group", name="Family of this sandbox")
    expect(tree.locator("[aria-current=page]")).to_have_text(fork_id)
    expect(tree.get_by_role("link", name=sandbox_id)).to_be_visible()
    # What is over is known by what was made of it.
    asked = ada.ask("POST", f"/sandboxes/{fork_id}/fork", {"count": 1}, 201)
    last_id = asked["items"][0]["id"]
    made_of(page, fork_id).get_by_role("link", name=last_id).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(last_id)
    ada.ask("DELETE", f"/sandboxes/{fork_id}", expect=204)
    expect(tree).to_contain_text(f"{fork_id} over")
    expect(tree.get_by_role("link")).to_have_text([last_id])
    expect(made_of(other, sandbox_id)).to_have_count(0)
    ada.ask("DELETE", f"/sandboxes/{last_id}", expect=204)
