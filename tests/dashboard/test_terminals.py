"""Terminals in the browser: shells that answer, outlive the page, and cannot harm it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.dashboard.conftest import (
    NARROW,
    PATIENCE_MS,
    WIDE,
    Person,
    check_everywhere,
    watched,
)

#: Gives a test the page's connections.
_SPY = """
window.sockets = [];
window.WebSocket = class extends WebSocket {
  constructor(...given) { super(...given); sockets.push(this); }
};
"""

#: Ends them; done when the page has seen it.
_CUT = """
new Promise((done) => {
  sockets[0].addEventListener("close", () => done());
  sockets[0].close();
})
"""


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Shells in VMs under emulation answer when they can."""
    expect.set_options(timeout=PATIENCE_MS)
    yield
    expect.set_options(timeout=None)


def opened(ada: Person, sandbox_id: str) -> Page:
    page = watched(ada.context.new_page())
    page.add_init_script(_SPY)
    page.goto(ada.server.page_url(f"/sandboxes/{sandbox_id}/terminal"))
    ready(page)
    return page


def ready(page: Page, user: str = "root") -> None:
    expect(page.get_by_text(f"Connected as {user}")).to_be_visible()
    expect(page.locator(".xterm-rows")).to_contain_text("#" if user == "root" else "$")


def enter(page: Page, line: str) -> Locator:
    """Types a line; what is shown."""
    page.get_by_label("Terminal input").focus()
    page.keyboard.insert_text(line)
    page.keyboard.press("Enter")
    return page.locator(".xterm-rows")


def close_all(page: Page) -> None:
    while page.get_by_role("tab").count():
        before = page.get_by_role("tab").count()
        page.get_by_role("button", name="Close terminal").click()
        page.get_by_role("dialog").get_by_role("button", name="Close terminal").click()
        expect(page.get_by_role("tab")).to_have_count(before - 1)


def tags(ada: Person, sandbox_id: str) -> list[str]:
    found = ada.ask("GET", f"/sandboxes/{sandbox_id}/processes")["processes"]
    return sorted(each["tag"] for each in found if each["tag"].startswith("terminal-"))


def test_terminals_side_by_side_until_they_are_closed(ada: Person, sandbox_id: str) -> None:
    page = opened(ada, sandbox_id)
    expect(enter(page, "echo is-$((6*7))")).to_contain_text("is-42")
    page.get_by_label("User", exact=True).select_option("user")
    page.get_by_role("button", name="New terminal").click()
    ready(page, "user")
    expect(enter(page, "echo i-am-$(whoami)")).to_contain_text("i-am-user")
    check_everywhere(page)
    page.get_by_role("tab", name="Terminal 2").press("ArrowLeft")
    shown = page.get_by_role("tabpanel", name="Terminal 1")
    expect(shown.locator(".xterm-rows")).to_contain_text("is-42")
    sizes = set()
    for size in (NARROW, WIDE):
        page.set_viewport_size(size)
        mark = f"at{size['width']}"
        rows = enter(page, f"clear; echo {mark}- $(stty size)")
        expect(rows).to_contain_text(re.compile(rf"{mark}- \d+ \d+"))
        found = re.search(rf"{mark}- (\d+ \d+)", rows.inner_text().replace("\xa0", " "))
        assert found
        sizes.add(found[1])
    assert len(sizes) == 2
    # The keyboard gets out again.
    page.get_by_label("Terminal input").focus()
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Close terminal")).to_be_focused()
    page.get_by_role("link", name="Skip the terminal").press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Close terminal")).to_be_focused()
    assert len(tags(ada, sandbox_id)) == 2
    close_all(page)
    expect(page.get_by_role("heading", name="No terminal is open")).to_be_visible()
    check_everywhere(page)
    assert not tags(ada, sandbox_id)


def test_a_shell_goes_on_where_it_was(ada: Person, sandbox_id: str) -> None:
    page = opened(ada, sandbox_id)
    expect(enter(page, "secret=$((40+1)); echo set-$secret")).to_contain_text("set-41")
    page.evaluate(_CUT)
    expect(page.get_by_text("Connected as root")).to_be_visible()
    assert page.evaluate("sockets.length") == 2
    expect(enter(page, "echo lost-$secret")).to_contain_text("lost-41")
    # To another tab of the page, and back.
    page.get_by_role("link", name="Ports").click()
    page.get_by_role("link", name="Terminal", exact=True).click()
    expect(page.locator(".xterm-rows")).to_contain_text("lost-41")
    assert page.evaluate("sockets.length") == 2
    expect(enter(page, "echo back-$secret")).to_contain_text("back-41")
    # Away from the sandbox nothing is listened to.
    page.get_by_role("navigation", name="Main").get_by_role(
        "link", name="Sandboxes", exact=True
    ).click()
    expect(page.get_by_role("heading", name="Sandboxes")).to_be_visible()
    assert page.evaluate("sockets.every((each) => each.readyState > WebSocket.OPEN)")
    page.go_back()
    ready(page)
    page.reload()
    ready(page)
    expect(page.get_by_role("tab")).to_have_count(1)
    expect(enter(page, "echo again-$secret")).to_contain_text("again-41")
    enter(page, "exit 7")
    expect(page.get_by_text("Ended with exit code 7")).to_be_visible()
    page.get_by_role("button", name="Close terminal").click()
    expect(page.get_by_role("tab")).to_have_count(0)


def test_a_terminal_waits_while_the_sandbox_sleeps(ada: Person, sandbox_id: str) -> None:
    page = opened(ada, sandbox_id)
    expect(enter(page, "secret=$((40+2)); echo set-$secret")).to_contain_text("set-42")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_text("The sandbox is paused; the terminal goes on")).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_text("Connected as root")).to_be_visible()
    expect(enter(page, "echo awake-$secret")).to_contain_text("awake-42")
    close_all(page)


def test_an_image_without_bash_has_a_shell(ada: Person, sandbox_id: str) -> None:
    ada.sh(sandbox_id, "mv /bin/bash /bin/elsewhere")
    page = opened(ada, sandbox_id)
    expect(enter(page, "echo shell-$0")).to_contain_text("shell-/bin/sh")
    close_all(page)
    ada.sh(sandbox_id, "mv /bin/elsewhere /bin/bash")


def test_a_terminal_is_heard(ada: Person, sandbox_id: str) -> None:
    page = opened(ada, sandbox_id)
    page.get_by_label("Screen reader mode").check()
    page.get_by_label("Terminal input").focus()
    page.keyboard.type("echo heard-$((1+1))\n")
    line = page.get_by_role("tabpanel").get_by_role("listitem").filter(has_text="heard-2")
    expect(line.first).to_be_attached()
    check_everywhere(page)
    close_all(page)


def test_what_programs_print_does_nothing(ada: Person, sandbox_id: str) -> None:
    page = opened(ada, sandbox_id)
    before = ada.context.pages
    hostile = [
        r"<img src=x onerror=alert(1)><script>alert(1)</script>",
        r"\033]0;</title><b>bold</b>\342\200\256evil\007",
        # The clipboard, set and asked for; the page's colours; a link whose text hides it.
        r"\033]52;c;aGFja2Vk\007\033]52;c;?\007\033]11;#ff0000\007\033]10;?\007",
        r"\033]8;;javascript:alert(1)\007click\033]8;;\007",
        # The title, asked for; settings, asked for; a colour of its own; wide characters.
        r"\033[21t\033P$qm\033\\\\\033[38;2;10;200;30mtrue\033[48;2;1;2;3mcolour\033[0m",
        r"\360\237\230\200 \344\270\226",
    ]
    rows = enter(page, f"clear; printf '{''.join(hostile)}\\n'; sleep 0; echo over-$((1+1))")
    expect(rows).to_contain_text("over-2")
    expect(rows).to_contain_text("<script>alert(1)</script>")
    status = page.get_by_text("Connected as root")
    expect(status).to_contain_text("</title><b>bold</b>⟨U+202E⟩evil")
    assert page.title().startswith(sandbox_id)
    colour = "getComputedStyle([...document.querySelectorAll('.xterm-rows span')]"
    assert page.evaluate(f"{colour}.find((each) => each.textContent === 'colour')).backgroundColor")
    # None of it was answered into the shell.
    expect(enter(page, "echo typed-$((2+2))")).to_contain_text("typed-4")
    assert "rgb:" not in rows.inner_text()
    assert ada.context.pages == before
    close_all(page)
