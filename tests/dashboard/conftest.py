"""The dashboard in a real browser, against `sandmartin up` with real VMs.

One `up` and one browser serve all tests here. The first account, Ada's, administers the platform;
`people` makes more, each with a team of their own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    ViewportSize,
    sync_playwright,
)

from tests.e2e.conftest import new_place
from tests.e2e.test_up import Up, clear, up

AXE = Path(__file__).parents[2] / "dashboard/node_modules/axe-core/axe.min.js"
PASSWORD = "correct horse battery"
WIDE: ViewportSize = {"width": 1280, "height": 800}
NARROW: ViewportSize = {"width": 360, "height": 740}
#: Where a receiver of webhooks may be; what else is on loopback is refused to them.
RECEIVER = "127.0.0.9"
#: How long a page may wait for a VM under emulation.
PATIENCE_MS = 30_000


@dataclass
class Server:
    """A running `up`, whose first account is not made yet."""

    up: Up
    #: Where the first account is made.
    invitation_url: str

    @property
    def url(self) -> str:
        return self.up.url

    def page_url(self, path: str) -> str:
        return f"{self.url}/dashboard{path}"


@dataclass
class Person:
    """Somebody who is logged in, in browsers of their own."""

    server: Server
    context: BrowserContext
    email: str
    csrf_token: str = field(repr=False)
    team_id: str

    def ask(self, method: str, path: str, body: object = None, expect: int = 200) -> Any:
        """A call of the API with the session's cookie; its answer, read."""
        answer = self.context.request.fetch(
            f"{self.server.url}/v1{path}",
            method=method,
            data=body,
            headers={"X-CSRF-Token": self.csrf_token},
            timeout=60_000,
        )
        assert answer.status == expect, (method, path, answer.status, answer.text())
        return answer.json() if answer.body() else None

    def create(self, **body: object) -> str:
        """A new sandbox of theirs; its id."""
        made = self.ask("POST", "/sandboxes", {"memory_mb": 256, **body}, 201)
        assert made["status"] == "running"
        return str(made["id"])

    def sh(self, sandbox_id: str, script: str) -> str:
        """What a script says in a sandbox of theirs."""
        body = {"cmd": "sh", "args": ["-c", script]}
        said = self.ask("POST", f"/sandboxes/{sandbox_id}/exec", body)
        assert said["exit_code"] == 0, said
        return str(said["stdout"])

    def open(self, path: str = "/sandboxes") -> Page:
        """A page of the dashboard. Whatever it complains of fails the test, see `watched`."""
        page = watched(self.context.new_page())
        page.set_default_timeout(PATIENCE_MS)
        page.goto(self.server.page_url(path))
        return page


#: Of pages that are watched.
_complaints: WeakKeyDictionary[Page, list[str]] = WeakKeyDictionary()


def complaints_of(page: Page) -> list[str]:
    """What a page that is watched complained of so far."""
    return _complaints.get(page, [])


def watched(page: Page) -> Page:
    """Note what a page's console calls an error, and whatever its scripts throw."""
    complaints = _complaints[page] = []

    def note(message: ConsoleMessage) -> None:
        # That a request was refused is no fault of the page's, which shows it.
        if message.type == "error" and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return page


@contextmanager
def attentive(context: BrowserContext) -> Iterator[BrowserContext]:
    """Closes what was opened meanwhile; no page of it may have complained."""
    before = list(context.pages)
    yield context
    complaints: list[str] = []
    for page in context.pages:
        if page not in before:
            complaints += complaints_of(page)
            page.close()
    assert not complaints


@pytest.fixture(scope="session")
def server(private_host: None) -> Iterator[Server]:
    with new_place() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANDMARTIN_OUTGOING_ALLOW", f"{RECEIVER}/32")
        with up(place, "dashboard", "--on-exit", "kill") as running:
            found = re.search(r"first account is made at (\S+)", running.log.read_text())
            assert found
            yield Server(running, found[1])
        clear(place, "dashboard")


@pytest.fixture(scope="session")
def browser(server: Server) -> Iterator[Browser]:
    """Debian's Chromium. It ends before the server does, whose end needs a loop of its own."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium; scripts/test installs it")
    with sync_playwright() as playwright:
        # Its sandbox is not for root.
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def people(server: Server, browser: Browser) -> Iterator[Callable[[str], Person]]:
    """Makes the account `NAME@example.org`, or finds the one that it made."""
    known: dict[str, Person] = {}

    def sign_up(name: str) -> Person:
        if name not in known:
            if name != "ada":
                ada = sign_up("ada")
                invited = ada.ask("POST", "/admin/invitations", {}, 201)
                token = invited["token"]
            else:
                token = server.invitation_url.partition("#invitation=")[2]
            known[name] = person(server, browser, name, token)
        return known[name]

    yield sign_up
    for each in known.values():
        each.context.close()


def person(server: Server, browser: Browser, name: str, token: str) -> Person:
    """A new account, made as the page makes it."""
    context = browser.new_context(viewport=WIDE, reduced_motion="reduce")
    email = f"{name}@example.org"
    body = {"email": email, "name": name.title(), "password": PASSWORD, "invitation": token}
    answer = context.request.post(f"{server.url}/v1/auth/signup", data=body)
    assert answer.status == 201, answer.text()
    me = answer.json()
    return Person(server, context, email, me["csrf_token"], me["team_id"])


@pytest.fixture
def ada(people: Callable[[str], Person]) -> Iterator[Person]:
    """Who administers the platform."""
    with attentive(people("ada").context):
        yield people("ada")


@pytest.fixture
def bob(people: Callable[[str], Person]) -> Iterator[Person]:
    """Somebody else, of another team."""
    with attentive(people("bob").context):
        yield people("bob")


@pytest.fixture(scope="module")
def sandbox_id(people: Callable[[str], Person]) -> Iterator[str]:
    """A sandbox of Ada's that runs, for the tests of one module."""
    ada = people("ada")
    made = ada.create(metadata={"made-for": "tests"})
    yield made
    ada.ask("DELETE", f"/sandboxes/{made}", expect=204)


def check_accessible(page: Page) -> None:
    """Axe finds nothing serious on the page as it is."""
    page.evaluate(AXE.read_text())
    # Content whose painting is left out is there all the same.
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        (each["id"], each["help"], [node["html"][:200] for node in each["nodes"][:3]])
        for each in found["violations"]
        if each["impact"] in {"serious", "critical"}
    ]
    assert not serious
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0, f"the page is {overflow} px wider than its window"


def check_everywhere(page: Page) -> None:
    """`check_accessible`, wide and narrow, light and dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for viewport in (NARROW, WIDE):
            page.set_viewport_size(viewport)
            check_accessible(page)
