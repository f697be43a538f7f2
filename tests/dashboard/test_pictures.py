"""A picture of each page with something on it: light and dark, wide and narrow.

With `SANDMARTIN_PICTURES=DIRECTORY` they are kept there, as those of `docs/pictures` were made.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.dashboard.conftest import NARROW, WIDE, Person, attentive
from tests.dashboard.test_terminals import enter
from tests.dashboard.test_terminals import ready as terminal_ready

pytestmark = [pytest.mark.timeout(600), pytest.mark.full]

_SERVER = {
    "cmd": "python3",
    "args": ["-m", "http.server", "8000", "--directory", "/srv"],
    "tag": "site",
    "background": True,
}
_DOCKERFILE = """FROM base
WORKDIR /srv/atlas
RUN python3 -m venv --without-pip .venv
RUN echo 'print("atlas")' >main.py && python3 main.py
"""
_CROWD = "for n in 1 2 3; do head -c $((n * 40000)) /dev/urandom >/srv/part-$n.bin; done"


@pytest.fixture(scope="module")
def lived_in(people: Callable[[str], Person]) -> Iterator[tuple[Person, str]]:
    """Ada's team as it is after a day's work, and the sandbox that was worked in."""
    ada = people("ada")
    with attentive(ada.context):
        made = _work(ada)
        yield ada, made[0]
    for each in made:
        ada.ask("DELETE", f"/sandboxes/{each}", expect=204)
    for name in ("notebook", "atlas"):
        ada.ask("DELETE", f"/templates/{name}", expect=204)


def _work(ada: Person) -> list[str]:
    """Sandboxes of all kinds, and what else a team has; the ids of the sandboxes."""
    first = ada.create(metadata={"project": "atlas", "agent": "crawler"})
    ada.sh(first, f"mkdir -p /srv/data && cd /srv && {_CROWD} && echo '# Atlas' >README.md")
    ada.ask("POST", f"/sandboxes/{first}/exec", _SERVER, 202)
    ada.ask("POST", f"/sandboxes/{first}/checkpoints", {"comment": "before the upgrade"}, 201)
    forked = ada.ask("POST", f"/sandboxes/{first}/fork", {"count": 2}, 201)
    forks = [str(each["id"]) for each in forked["items"]]
    ada.ask("POST", "/snapshots", {"sandbox_id": first, "name": "notebook", "live": True}, 201)
    asleep = ada.create(metadata={"project": "archive"}, timeout_sec=600)
    ada.ask("POST", f"/sandboxes/{asleep}/pause")
    for name in ("continuous integration", "agents"):
        ada.ask("POST", "/api-keys", {"name": name}, 201)
    hook = {"name": "on call", "type": "webhook", "config": {"url": "https://example.org/hook"}}
    ada.ask("POST", "/channels", hook, 201)
    source = {"kind": "dockerfile", "text": _DOCKERFILE}
    ada.ask("POST", "/builds", {"name": "atlas", "source": source, "memory_mb": 256}, 202)
    return [first, *forks, asleep]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("SANDMARTIN_PICTURES")
    found = Path(kept) if kept else tmp_path_factory.mktemp("pictures")
    found.mkdir(parents=True, exist_ok=True)
    return found


#: A page's picture, its path, and what is on it when it is ready.
PAGES = [
    ("sandboxes", "/sandboxes", "text=archive"),
    ("overview", "/sandboxes/{id}", "text=Timeline"),
    ("terminal", "/sandboxes/{id}/terminal", ".xterm"),
    ("files", "/sandboxes/{id}/files?path=/srv", "text=part-2.bin"),
    ("processes", "/sandboxes/{id}/processes", "text=http.server"),
    ("ports", "/sandboxes/{id}/ports", "text=8000"),
    ("history", "/sandboxes/{id}/history", "text=before the upgrade"),
    ("templates", "/templates", "text=notebook"),
    ("builds", "/builds", "text=ready"),
    ("build", "/builds", "text=atlas"),
    ("keys", "/keys", "text=continuous integration"),
    ("members", "/team", "text=ada@example.org"),
    ("notifications", "/notifications", "text=on call"),
    ("usage", "/usage", "h1"),
    ("audit", "/audit", "text=sandbox"),
    ("settings", "/settings", "h1"),
    ("hosts", "/admin/hosts", "text=local"),
    ("all-sandboxes", "/admin/sandboxes", "td >> text=running"),
    ("platform-templates", "/admin/templates", "text=base"),
    ("all-teams", "/admin/teams", "h1"),
    ("all-users", "/admin/users", "text=ada@example.org"),
]


@pytest.mark.parametrize(("name", "path", "ready"), PAGES, ids=[each[0] for each in PAGES])
def test_a_page_has_its_picture(
    lived_in: tuple[Person, str], directory: Path, name: str, path: str, ready: str
) -> None:
    ada, sandbox_id = lived_in
    with attentive(ada.context):
        page = ada.open(path.format(id=sandbox_id))
        shown = page.locator(f"#content >> {ready} >> visible=true")
        expect(shown.first).to_be_visible(timeout=60_000)
        if name == "terminal":
            terminal_ready(page)
            enter(page, "cd /srv && ls -l && df -h /")
            expect(page.locator(".xterm-rows")).to_contain_text("Mounted on")
        if name == "build":
            page.get_by_role("link", name="atlas").first.click()
            expect(page.get_by_text("RUN echo").first).to_be_visible()
        take(page, directory, name)


def test_the_login_has_its_picture(lived_in: tuple[Person, str], directory: Path) -> None:
    browser = lived_in[0].context.browser
    assert browser is not None
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(lived_in[0].server.page_url("/login"))
        expect(page.get_by_label("Password")).to_be_visible()
        take(page, directory, "login")


def take(page: Page, directory: Path, name: str) -> None:
    """Four pictures of a page: wide and narrow, light and dark."""
    session = page.context.new_cdp_session(page)
    for width, viewport in (("narrow", NARROW), ("wide", WIDE)):
        page.set_viewport_size(viewport)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            # Charts and terminals are drawn anew with the frame after the change.
            page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            taken = session.send("Page.captureScreenshot", {"format": "webp", "quality": 82})
            picture = base64.b64decode(taken["data"])
            assert len(picture) > 2000
            (directory / f"{name}-{width}-{scheme}.webp").write_bytes(picture)
    session.detach()
