"""The overview of a sandbox: its facts and terms, its charts, and what was done to it."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

from tests.dashboard.conftest import PATIENCE_MS, Person, check_everywhere


def overview(person: Person, sandbox_id: str) -> Page:
    """The overview of a sandbox, once it is there."""
    page = person.open(f"/sandboxes/{sandbox_id}")
    heading = page.get_by_role("heading", name="Timeline")
    expect(heading).to_be_visible(timeout=PATIENCE_MS)
    return page


def operation(page: Page, title: str) -> Locator:
    """The newest operation of this title in the timeline."""
    timeline = page.get_by_role("region", name="Timeline")
    return timeline.get_by_role("listitem").filter(has_text=re.compile(f"^\\s*{title}")).first


def test_the_timeline_tells_what_a_create_took(ada: Person, sandbox_id: str) -> None:
    page = overview(ada, sandbox_id)
    create = operation(page, "Create")
    for phase in ("Until work begins", "Network slot taken", "Memory restored", "Guest answered"):
        row = create.get_by_role("listitem").filter(has_text=phase)
        expect(row).to_contain_text(re.compile(r"\d (ms|s)"))
    expect(create).to_contain_text("from template base")
    facts = page.get_by_role("region", name="Facts")
    expect(facts).to_contain_text("256 MiB memory")
    expect(facts).to_contain_text("made-for=tests")
    check_everywhere(page)


def test_what_is_done_elsewhere_appears_in_the_timeline(ada: Person, sandbox_id: str) -> None:
    page = overview(ada, sandbox_id)
    expect(operation(page, "Create")).to_be_visible()
    expect(operation(page, "Pause")).to_have_count(0)
    ada.ask("POST", f"/sandboxes/{sandbox_id}/pause")
    expect(operation(page, "Pause")).to_contain_text("Memory written")
    ada.ask("POST", f"/sandboxes/{sandbox_id}/resume")
    expect(operation(page, "Resume")).to_contain_text("Memory restored")


def test_a_chart_moves(ada: Person, sandbox_id: str) -> None:
    page = overview(ada, sandbox_id)
    cpu = page.get_by_role("figure", name="CPU")
    # The first sample waits for what the guest says of its memory.
    expect(cpu).to_contain_text(re.compile(r"latest \d %"), timeout=PATIENCE_MS)
    expect(page.get_by_role("figure", name="Memory")).to_contain_text("MiB")
    busy = {"cmd": "sh", "args": ["-c", "while :; do :; done"], "background": True}
    pid = ada.ask("POST", f"/sandboxes/{sandbox_id}/exec", busy, 202)["pid"]
    expect(cpu).to_contain_text(re.compile(r"latest (1[5-9]|[2-9]\d|1\d\d) %"), timeout=PATIENCE_MS)
    ada.ask("DELETE", f"/sandboxes/{sandbox_id}/processes/{pid}", expect=204)
    page.get_by_label("The last").select_option(label="2 hours")
    expect(cpu).to_contain_text("latest")


def test_its_terms_are_changed(ada: Person, sandbox_id: str) -> None:
    page = overview(ada, sandbox_id)
    page.get_by_role("button", name="Change idle limit").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Idle limit (minutes)").fill("7.5")
    check_everywhere(page)
    dialog.get_by_role("button", name="Change").click()
    expect(page.get_by_role("region", name="Facts")).to_contain_text(
        "7 min 30 s, then it is paused"
    )
    assert ada.ask("GET", f"/sandboxes/{sandbox_id}")["timeout_sec"] == 450

    page.get_by_role("button", name="Change policy").click()
    dialog.get_by_label("It reaches the Internet").uncheck()
    dialog.get_by_label("Allowed").fill("pypi.org\n*.example.org\n")
    dialog.get_by_label("Denied").fill("not an address")
    dialog.get_by_role("button", name="Change").click()
    # Why it is refused is told, and nothing is lost of what was typed.
    expect(dialog.get_by_role("alert")).to_contain_text("not an address")
    dialog.get_by_label("Denied").fill("203.0.113.0/24")
    dialog.get_by_role("button", name="Change").click()
    network = page.get_by_role("region", name="Network")
    expect(network).to_contain_text("*.example.org")
    assert ada.ask("GET", f"/sandboxes/{sandbox_id}/network") == {
        "allow_internet_access": False,
        "allow_out": ["pypi.org", "*.example.org"],
        "deny_out": ["203.0.113.0/24"],
    }
    expect(operation(page, "Network policy changed")).to_contain_text("with 3 rules")
    expect(operation(page, "Idle limit changed")).to_contain_text("to 7 min 30 s")


def test_what_others_wrote_is_text_and_what_is_not_there_is_said(ada: Person) -> None:
    labels = {"<img src=x onerror=alert(1)>": "a\u202eb", "long": "x" * 200}
    sandbox_id = ada.create(metadata=labels)
    ada.ask("POST", f"/sandboxes/{sandbox_id}/pause")
    page = overview(ada, sandbox_id)
    facts = page.get_by_role("region", name="Facts")
    expect(facts).to_contain_text("<img src=x onerror=alert(1)>=a⟨U+202E⟩b")
    check_everywhere(page)
    # The phases of what came before stay to be looked at.
    expect(operation(page, "Create").get_by_text("Guest answered")).to_be_hidden()
    operation(page, "Create").locator("summary").click()
    expect(operation(page, "Create").get_by_text("Guest answered")).to_be_visible()
    ada.ask("DELETE", f"/sandboxes/{sandbox_id}", expect=204)
    expect(page.get_by_text("stopped", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Change policy")).to_be_disabled()
    expect(operation(page, "Destroy")).to_be_visible()


#: Of `--line`, and what finds it in a drawing once the page is painted.
LINES = {"light": [221, 213, 199], "dark": [58, 54, 47]}
DRAWN_IN = """async (canvas, colour) => {
    for (const _ of [1, 2]) await new Promise(requestAnimationFrame);
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    for (let at = 0; at < data.length; at += 4)
        if (colour.every((value, channel) => data[at + channel] === value)) return true;
    return false;
}"""


def test_charts_take_the_colours_of_the_theme(ada: Person, sandbox_id: str) -> None:
    page = overview(ada, sandbox_id)
    canvas = page.get_by_role("figure", name="Disk").locator("canvas")
    expect(canvas).to_be_visible()
    for scheme, other in (("light", "dark"), ("dark", "light"), ("light", "dark")):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert canvas.evaluate(DRAWN_IN, LINES[scheme])
        assert not canvas.evaluate(DRAWN_IN, LINES[other])
