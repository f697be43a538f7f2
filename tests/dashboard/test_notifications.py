"""Channels: made, tested and followed in the page, with a real receiver."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import Page, expect

from sandmartin.control.notifications import sign
from tests.dashboard.conftest import (
    RECEIVER,
    Person,
    attentive,
    check_accessible,
    check_everywhere,
)

HOSTILE = "<b>\u202eevil</b>"


class Receiver(ThreadingHTTPServer):
    """A web server that keeps what it was sent, and answers as it is told."""

    received: list[tuple[str, str, bytes]]
    status = 204

    @property
    def url(self) -> str:
        return f"http://{RECEIVER}:{self.server_port}/hook"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        told = self.headers
        self.server.received.append(
            (told["x-sandmartin-timestamp"], told["x-sandmartin-signature"], body)
        )
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running_receiver() -> Iterator[Receiver]:
    with Receiver((RECEIVER, 0), _Handler) as receiver:
        receiver.received = []
        thread = threading.Thread(target=receiver.serve_forever)
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


@pytest.fixture
def tina(people: Callable[[str], Person]) -> Iterator[Person]:
    """The owner of a team."""
    with attentive(people("tina").context):
        yield people("tina")


def add_channel(page: Page, name: str, url: str) -> str:
    """A webhook for events of members, made in the page; its secret."""
    page.get_by_role("button", name="New channel").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill(name)
    dialog.get_by_label("Address").fill(url)
    dialog.get_by_label("These alone").check()
    dialog.get_by_label("Members").check()
    dialog.get_by_label("Single kinds").fill("sandbox.paused")
    check_accessible(page)
    dialog.get_by_role("button", name="Create").click()
    secret = dialog.get_by_label("Secret", exact=True).inner_text()
    check_accessible(page)
    dialog.get_by_role("button", name="Done").click()
    return secret


def test_a_webhook_is_made_tested_and_told(tina: Person, people: Callable[[str], Person]) -> None:
    page = tina.open("/notifications")
    expect(page.get_by_role("heading", name="No channels yet")).to_be_visible()
    check_everywhere(page)
    with running_receiver() as receiver:
        secret = add_channel(page, HOSTILE, receiver.url)
        assert re.fullmatch("whsec_[0-9a-f]{64}", secret)
        channel = page.get_by_role("article")
        # What would turn the line around is shown.
        expect(channel).to_contain_text("<b>⟨U+202E⟩evil</b>")
        expect(channel).to_contain_text("member.*, sandbox.paused")
        expect(channel).to_contain_text("active")
        channel.get_by_role("button", name="Send a test").click()
        expect(channel).to_contain_text("The test message arrived")
        timestamp, signature, body = receiver.received[0]
        assert json.loads(body)["kind"] == "channel.test"
        assert signature == sign(secret, timestamp, body)
        receiver.status = 500
        channel.get_by_role("button", name="Send a test").click()
        expect(channel.get_by_role("alert")).to_contain_text("500")
        expect(channel.get_by_role("alert")).to_contain_text("Request rq")

        receiver.status = 204
        channel.get_by_role("button", name="Deliveries").click()
        expect(channel).to_contain_text("Nothing was sent yet")
        join(tina, people("ulli"))
        row = channel.get_by_role("row").filter(has_text="member.joined")
        # Told by the event, without asking.
        expect(row).to_contain_text("delivered")
        check_everywhere(page)


@pytest.mark.full
def test_a_channel_that_leads_nowhere_says_so_and_is_changed(tina: Person) -> None:
    page = tina.open("/notifications")
    add_channel(page, "loopback", "http://127.0.0.1:9/hook")
    channel = page.get_by_role("article").filter(has_text="loopback")
    channel.get_by_role("button", name="Send a test").click()
    refused = channel.get_by_role("alert")
    expect(refused).to_contain_text("on a network that may not be reached")
    expect(refused).to_contain_text("an operator can allow it")
    check_accessible(page)
    dialog = page.get_by_role("dialog")
    channel.get_by_role("button", name="Edit").click()
    dialog.get_by_label("Name").fill("renamed")
    dialog.get_by_label("Members").uncheck()
    dialog.get_by_role("button", name="Save").click()
    channel = page.get_by_role("article").filter(has_text="renamed")
    expect(channel).not_to_contain_text("member.*")
    with running_receiver() as receiver:
        channel.get_by_role("button", name="Another address").click()
        expect(dialog.get_by_label("Address")).to_have_value("")
        dialog.get_by_label("Address").fill(receiver.url)
        dialog.get_by_role("button", name="Save").click()
        secret = dialog.get_by_label("Secret", exact=True).inner_text()
        dialog.get_by_role("button", name="Done").click()
        channel.get_by_role("button", name="Send a test").click()
        expect(channel).to_contain_text("The test message arrived")
        timestamp, signature, body = receiver.received[0]
        assert signature == sign(secret, timestamp, body)
    channel.get_by_role("button", name="Disable").click()
    dialog.get_by_role("button", name="Disable channel").click()
    expect(channel).to_contain_text("disabled")
    channel.get_by_role("button", name="Enable").click()
    expect(channel).to_contain_text("active")
    channel.get_by_role("button", name="Delete").click()
    expect(dialog).to_contain_text("renamed")
    dialog.get_by_role("button", name="Delete channel").click()
    expect(channel).to_have_count(0)


def test_each_type_asks_for_what_it_needs(tina: Person) -> None:
    page = tina.open("/notifications")
    page.get_by_role("button", name="New channel").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("chat")
    dialog.get_by_label("Type").select_option("Telegram")
    dialog.get_by_label("Bot token").fill("no token")
    dialog.get_by_label("Chat").fill("1")
    dialog.get_by_role("button", name="Create").click()
    expect(dialog.get_by_role("alert")).to_contain_text("bot_token")
    dialog.get_by_label("Bot token").fill("123456:ABCDEFGHIJKLMNOP")
    dialog.get_by_role("button", name="Create").click()
    channel = page.get_by_role("article", name="chat")
    expect(channel).to_contain_text("Telegram")
    channel_id = next(each["id"] for each in tina.ask("GET", "/channels") if each["name"] == "chat")
    tina.ask("DELETE", f"/channels/{channel_id}", expect=204)


def join(owner: Person, other: Person) -> None:
    """Somebody becomes a member of somebody's team."""
    invited = owner.ask("POST", f"/teams/{owner.team_id}/invitations", {}, 201)
    other.ask("POST", "/invitations/accept", {"token": invited["token"]})
