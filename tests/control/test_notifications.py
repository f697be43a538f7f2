"""Notifications: signed, in order, at least once, and never to where they must not go."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandmartin.control import chat, events
from sandmartin.control.bootstrap import ensure_platform
from sandmartin.control.guarded import Outgoing, allowed_networks
from sandmartin.control.notifications import NewChannel, Notifications, Patience, sign
from sandmartin.control.platform import Platform, open_platform
from sandmartin.control.settings import ControlSettings
from sandmartin.control.tables import Channel
from sandmartin.errors import Denied, Invalid, Unavailable
from tests.control.conftest import DEADLINE_S, TIMING, client_of, make_team
from tests.control.receiver import Received, Receiver, running_receiver

LOOPBACK = "127.0.0.0/8"
PATIENCE = Patience(waits_s=(0.05, 0.1), lease_s=1.0, poll_s=0.02)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with running_receiver() as receiver:
        yield receiver


@contextlib.asynccontextmanager
async def replica(database_url: str, directory: Path, *, works: bool = True) -> Any:
    settings = ControlSettings(
        data_dir=directory / "control", database_url=database_url, outgoing_allow=LOOPBACK
    )
    async with open_platform(settings, timing=TIMING, patience=PATIENCE) as platform:
        await ensure_platform(platform.db)
        async with platform.working() if works else contextlib.nullcontext():
            yield platform


@contextlib.asynccontextmanager
async def team_of(platform: Platform) -> AsyncIterator[tuple[str, httpx.AsyncClient]]:
    team_id, key = await make_team(platform)
    async with client_of(platform, **{"x-api-key": key}) as http:
        yield team_id, http


async def add_channel(http: httpx.AsyncClient, url: str, **more: Any) -> dict[str, Any]:
    body = {"name": "hook", "type": "webhook", "config": {"url": url}, **more}
    answer = await http.post("/v1/channels", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def tell(platform: Platform, team_id: str, sandbox_id: str, *kinds: str) -> None:
    for kind in kinds:
        async with platform.db.write() as session:
            events.record(session, team_id, kind, sandbox_id, state="running")
    platform.events.wake()


async def deliveries(http: httpx.AsyncClient, channel: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await http.get(f"/v1/channels/{channel['id']}/deliveries")
    found: list[dict[str, Any]] = answer.json()
    return list(reversed(found))


async def all_over(http: httpx.AsyncClient, channel: dict[str, Any], count: int) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await deliveries(http, channel)
            if len(found) == count and all(each["status"] != "pending" for each in found):
                return found
            await asyncio.sleep(0.02)


def kind_of(received: Received) -> str:
    return str(json.loads(received.body)["kind"])


async def test_webhooks_of_two_replicas_arrive_once_signed_and_in_order(
    database_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    """The receiver fails at first: what follows in the same sandbox waits for it."""
    one, other = f"sb{'1' * 20}", f"sb{'2' * 20}"
    failures = 2

    def answer(received: Received) -> int:
        nonlocal failures
        if kind_of(received) == "sandbox.pausing" and failures:
            failures -= 1
            return 500
        return 200

    receiver.answer = answer
    async with (
        replica(database_url, tmp_path) as here,
        replica(database_url, tmp_path) as there,
        team_of(here) as (team_id, http),
    ):
        channel = await add_channel(http, receiver.url, events=["sandbox.*"])
        await tell(here, team_id, one, "sandbox.pausing", "sandbox.paused", "sandbox.resuming")
        await tell(there, team_id, other, "sandbox.starting", "template.deleted", "sandbox.running")
        found = await all_over(http, channel, 5)
    assert {each["status"] for each in found} == {"delivered"}
    ours = [each for each in receiver.received if json.loads(each.body)["sandbox_id"] == one]
    assert [kind_of(each) for each in ours] == [
        *["sandbox.pausing"] * 3,
        "sandbox.paused",
        "sandbox.resuming",
    ]
    assert len({each.headers["x-sandmartin-delivery"] for each in ours[:3]}) == 1
    assert len(receiver.received) == 7
    for each in receiver.received:
        timestamp = each.headers["x-sandmartin-timestamp"]
        assert each.headers["x-sandmartin-signature"] == sign(
            channel["secret"], timestamp, each.body
        )


def test_the_signature_is_an_hmac_over_time_and_body() -> None:
    """`printf '1.{}' | openssl dgst -sha256 -hmac key` says the same."""
    expected = "1ba6b8171186efc613e8bcc0cbdab2748f24984d7c5a84faa2637afa0e40d224"
    assert sign("key", "1", b"{}") == f"sha256={expected}"


async def test_what_never_arrives_is_given_up_and_shown(
    database_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    receiver.answer = lambda received: 500 if kind_of(received) == "sandbox.pausing" else 200
    async with replica(database_url, tmp_path) as here, team_of(here) as (team_id, http):
        channel = await add_channel(http, receiver.url)
        await tell(here, team_id, f"sb{'1' * 20}", "sandbox.pausing", "sandbox.paused")
        failed, delivered = await all_over(http, channel, 2)
    assert (failed["status"], failed["attempts"]) == ("failed", 3)
    assert failed["error"] == "the receiver answered 500"
    assert (delivered["status"], delivered["event"]) == ("delivered", "sandbox.paused")


async def test_a_killed_replica_loses_nothing(
    database_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    receiver.answer = lambda _: None
    async with (
        replica(database_url, tmp_path, works=False) as dead,
        team_of(dead) as (team_id, http),
    ):
        channel = await add_channel(http, receiver.url)
        await tell(dead, team_id, f"sb{'1' * 20}", "sandbox.paused")
        assert await dead.notifications.spread() == 1
        assert await dead.notifications.send_due() == 1
        async with asyncio.timeout(DEADLINE_S):
            while not receiver.received:
                await asyncio.sleep(0.01)
        # Nobody else may send what it is sending.
        assert await dead.notifications.send_due() == 0
        for task in tuple(dead.notifications._sending):
            task.cancel()
        receiver.answer = lambda _: 200
        async with replica(database_url, tmp_path):
            (found,) = await all_over(http, channel, 1)
    assert found["status"] == "delivered"
    ids = [each.headers["x-sandmartin-delivery"] for each in receiver.received]
    assert ids == [found["id"]] * 2


async def test_channels_keep_their_secrets(
    database_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    async with (
        replica(database_url, tmp_path) as here,
        team_of(here) as (_, http),
        team_of(here) as (_, stranger),
    ):
        made = await add_channel(http, f"{receiver.url}?token=hidden")
        path = f"/v1/channels/{made['id']}"
        assert made["secret"].startswith("whsec_")
        shown = [
            await http.get(path),
            await http.get("/v1/channels"),
            await http.get("/v1/audit-logs"),
        ]
        async with here.db.read() as session:
            row = await session.get(Channel, made["id"])
        for text in [*(each.text for each in shown), repr(row.sealed_config), repr(vars(row))]:
            assert "hidden" not in text
            assert made["secret"] not in text
        rotated = await http.put(f"{path}/config", json={"config": {"url": receiver.url}})
        assert rotated.json()["secret"] != made["secret"]
        assert (await http.post(f"{path}/test")).status_code == 204
        (test,) = receiver.received
        assert kind_of(test) == "channel.test"
        signature = sign(
            rotated.json()["secret"], test.headers["x-sandmartin-timestamp"], test.body
        )
        assert test.headers["x-sandmartin-signature"] == signature
        receiver.answer = lambda _: 410
        failed = await http.post(f"{path}/test")
        assert (failed.status_code, failed.json()["error"]["message"]) == (
            503,
            "the receiver answered 410",
        )
        for method, url in [
            ("GET", path),
            ("PATCH", path),
            ("DELETE", path),
            ("POST", f"{path}/test"),
            ("GET", f"{path}/deliveries"),
        ]:
            answer = await stranger.request(method, url, json={} if method == "PATCH" else None)
            assert answer.status_code == 404, (method, url)
        assert (await stranger.get("/v1/channels")).json() == []
        assert (await http.delete(path)).status_code == 204
        assert (await http.get(path)).status_code == 404
        actions = [each["action"] for each in (await http.get("/v1/audit-logs")).json()["items"]]
        assert actions == ["channel.deleted", "channel.configured", "channel.created"]


async def test_a_channel_that_is_off_sends_nothing(
    database_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    receiver.answer = lambda _: 500
    async with replica(database_url, tmp_path) as here, team_of(here) as (team_id, http):
        channel = await add_channel(http, receiver.url)
        path = f"/v1/channels/{channel['id']}"
        await tell(here, team_id, f"sb{'1' * 20}", "sandbox.pausing", "sandbox.paused")
        async with asyncio.timeout(DEADLINE_S):
            while not receiver.received:
                await asyncio.sleep(0.01)
        assert (await http.patch(path, json={"active": False})).json()["active"] is False
        await tell(here, team_id, f"sb{'1' * 20}", "sandbox.resuming")
        receiver.answer = lambda _: 200
        await http.patch(path, json={"active": True, "events": ["sandbox.running"], "name": "on"})
        await tell(here, team_id, f"sb{'1' * 20}", "sandbox.running")
        found = await all_over(http, channel, 3)
    assert [each["status"] for each in found] == ["failed", "failed", "delivered"]
    assert found[1]["error"] == "the channel was switched off"
    assert kind_of(receiver.received[-1]) == "sandbox.running"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("pigeon", {"url": "https://example.org"}),
        ("webhook", {"url": "ftp://example.org/"}),
        ("webhook", {"url": "https://user:password@example.org/"}),
        ("webhook", {}),
        ("slack", {"url": "https://hooks.slack.com.evil.example/services/T0/B0/abcdefghij"}),
        ("teams", {"url": "https://x.logic.azure.com/workflows/a?template=/etc/passwd"}),
        ("matrix", {"homeserver": "http://m.org", "access_token": "t", "room_id": "!r:m.org"}),
        *[
            ("apprise", {"url": url})
            for url in (
                "file:///etc/passwd",
                "syslog://",
                "dbus://",
                "json://example.org",
                "mailto://user:pass@example.org",
                "slack://T/B/C?template=/etc/passwd",
                "gotifys://example.org/token?verify=no",
                "ntfys://example.org/topic?attach=/etc/passwd",
            )
        ],
    ],
)
async def test_what_no_channel_may_be_is_refused(kind: str, config: dict[str, str]) -> None:
    notifications = Notifications(None, None, None, Outgoing())  # type: ignore[arg-type]
    with pytest.raises(Invalid):
        notifications._config(kind, NewChannel(name="n", kind=kind, config=config).config)


_TEAMS = "https://prod-15.westus.logic.azure.com:443/workflows/abc/triggers/manual/paths/invoke"
_MATRIX = {
    "homeserver": "https://m.example.org",
    "access_token": "t",
    "room_id": "!r:m.example.org",
}
#: A config of each kind, and what the library is to take it for.
_CONFIGS: dict[str, tuple[str, dict[str, str]]] = {
    "slack": ("slack", {"url": f"https://hooks.slack.com/services/T1234567/B1234567/{'a' * 24}"}),
    "discord": ("discord", {"url": "https://discord.com/api/webhooks/1234567890/abcdEFGH"}),
    "teams": ("workflows", {"url": f"{_TEAMS}?api-version=2016-06-01&sp=%2Fa&sv=1.0&sig=abc"}),
    "googlechat": (
        "gchat",
        {"url": "https://chat.googleapis.com/v1/spaces/A/messages?key=k&token=t"},
    ),
    "telegram": ("tgram", {"bot_token": f"123456789:{'a' * 35}", "chat_id": "-1001234"}),
    "matrix": ("matrixs", _MATRIX),
    "apprise": ("ntfys", {"url": "ntfys://ntfy.example.org/topic?priority=high"}),
}


def test_each_kind_is_what_the_library_takes_it_for() -> None:
    """In another process, as always: the library warns of itself when it is imported."""
    urls = [chat.KINDS[kind](config) for kind, (_, config) in _CONFIGS.items()]
    program = (
        "import apprise, json, sys; print(json.dumps([sorted(apprise.Apprise.instantiate(url)"
        ".schemas()) for url in json.load(sys.stdin)]))"
    )
    words = [sys.executable, "-c", program]
    said = subprocess.run(words, input=json.dumps(urls), capture_output=True, text=True, check=True)
    assert set(_CONFIGS) == set(chat.KINDS)
    for (scheme, _), schemes in zip(_CONFIGS.values(), json.loads(said.stdout), strict=True):
        assert scheme in schemes


async def test_a_chat_service_is_reached_through_the_guard_alone(receiver: Receiver) -> None:
    receiver.answer = lambda _: 200
    url = f"mmost://127.0.0.1:{receiver.port}/{'a' * 24}"
    await chat.send(Outgoing(allowed_networks(LOOPBACK)), url, "Sandbox one paused", "now")
    (message,) = receiver.received
    assert "Sandbox one paused" in message.body.decode()
    assert "proxy-authorization" not in message.headers
    with pytest.raises(Unavailable):
        await chat.send(Outgoing(), url, "Sandbox one paused", "now")
    assert len(receiver.received) == 1
    receiver.answer = lambda _: 403
    with pytest.raises(Unavailable):
        await chat.send(Outgoing(allowed_networks(LOOPBACK)), url, "Sandbox one paused", "now")
    with pytest.raises(Invalid):
        await chat.send(Outgoing(), "mmost://", "Sandbox one paused", "now")


# The guard.


def resolver(*answers: Sequence[str]) -> Any:
    left = list(answers)

    async def resolve(host: str, port: int) -> Sequence[str]:
        return left.pop(0)

    return resolve


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "192.0.0.8", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "::1", "::", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1",
    ],
)  # fmt: skip
async def test_no_private_address_is_reached(address: str) -> None:
    for answer in ([address], ["93.184.216.34", address]):
        with pytest.raises(Denied) as told:
            await Outgoing(resolve=resolver(answer)).request("GET", "http://rebound.example/")
        assert address not in str(told.value)


async def test_public_addresses_are_let_through() -> None:
    found = await Outgoing(resolve=resolver(["93.184.216.34", "2606:4700::1111"])).addresses("x", 1)
    assert len(found) == 2


async def test_a_name_is_resolved_once(receiver: Receiver) -> None:
    """DNS rebinding: what the name means later does not count, a second look would fail."""
    allowed = allowed_networks("127.0.0.1/32")
    outgoing = Outgoing(allowed, resolver(["127.0.0.1"]))
    url = f"http://rebound.example:{receiver.port}/path?query=1"
    assert (await outgoing.request("POST", url, content=b"x")).status == 204
    (request,) = receiver.received
    assert request.headers["host"] == f"rebound.example:{receiver.port}"
    assert request.path == "/path?query=1"
    with pytest.raises(Denied):
        await Outgoing(allowed, resolver(["127.0.0.2"])).request("POST", url)


async def test_redirects_end_and_silence_has_a_deadline(receiver: Receiver) -> None:
    outgoing = Outgoing(allowed_networks(LOOPBACK))
    receiver.answer, receiver.location = lambda _: 302, f"{receiver.url}/elsewhere"
    assert (await outgoing.request("GET", receiver.url)).status == 302
    assert len(receiver.received) == 1
    receiver.answer = lambda _: None
    with pytest.raises(Unavailable):
        await outgoing.request("GET", receiver.url, deadline_s=0.2)


async def test_certificates_are_those_of_the_name(tmp_path: Path) -> None:
    served, trusting = _certificates(tmp_path, "hook.example")
    async with running_receiver(served) as receiver:
        for name, works in [("hook.example", True), ("other.example", False)]:
            outgoing = Outgoing(allowed_networks(LOOPBACK), resolver(["127.0.0.1"]), trusting)
            request = outgoing.request("GET", f"https://{name}:{receiver.port}/")
            if works:
                assert (await request).status == 204
            else:
                with pytest.raises(Unavailable):
                    await request


def _certificates(directory: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What a server of this name has, and what its clients trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = directory / "server.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(file)
    return served, ssl.create_default_context(cafile=file)
