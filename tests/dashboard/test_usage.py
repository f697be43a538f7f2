"""What a team holds and used, after a sandbox of its ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime

from playwright.sync_api import expect

from tests.dashboard.conftest import Person, attentive, check_everywhere


def test_what_a_sandbox_used_is_shown_and_saved(ada: Person, sandbox_id: str) -> None:
    page = ada.open("/usage")
    running = page.get_by_role("row", name="Running sandboxes")
    held = ada.ask("GET", "/sandboxes/stats")["current"]
    assert held["running"]
    expect(running).to_contain_text(str(held["running"]))
    expect(page.get_by_role("row", name=re.compile("^Memory"))).to_contain_text("MiB")
    for label in ("Sandboxes and vCPUs in the last hour", "Memory in the last hour"):
        chart = page.get_by_role("figure", name=label)
        expect(chart.locator("canvas")).to_be_visible()
        # For who does not see it.
        expect(chart).to_contain_text("at most")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    row = page.get_by_role("row").filter(has_text=today)
    expect(row).to_be_visible()
    check_everywhere(page)

    with page.expect_download() as downloading:
        page.get_by_role("button", name="CSV").click()
    lines = downloading.value.path().read_text().splitlines()
    assert lines[0] == "day,cpu_minutes,ram_mib_minutes"
    assert len(lines) == 31
    day, cpu, memory = lines[-1].split(",")
    assert day == today
    assert float(cpu) > 0
    assert float(memory) >= 256 * float(cpu) * 0.9

    page.get_by_label("In the last").select_option("30 days")
    expect(page.get_by_role("figure", name="Memory in the last 30 days")).to_be_visible()
    # Of last year nothing is known.
    page.get_by_label("Time").select_option(index=12)
    expect(page.get_by_role("heading", name="Nothing was used in this time")).to_be_visible()


def test_who_used_nothing_is_told_so(people: Callable[[str], Person]) -> None:
    with attentive(people("olga").context):
        page = people("olga").open("/usage")
        expect(page.get_by_role("heading", name="Nothing was used in this time")).to_be_visible()
        expect(page.get_by_role("row", name="Running sandboxes")).to_contain_text("100")
        check_everywhere(page)
