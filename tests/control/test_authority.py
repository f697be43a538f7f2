"""Mutual TLS between control plane and agents: who is refused, on real sockets, both ways."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID

from sandmartin.agent.membership import new_key
from sandmartin.control import tables
from sandmartin.control.authority import (
    CONTROL_LIFE_S,
    HOST_LIFE_S,
    Authority,
    Issued,
    name_of_host,
)
from sandmartin.control.db import Database
from sandmartin.control.seal import Sealer
from sandmartin.errors import Invalid, Unavailable
from sandmartin.tls import Identity, agents_context, show
from sandmartin.transport.agent import RemoteAgent
from tests.control.members import Served, joined, served_platform

HOST = "11111111-1111-1111-1111-111111111111"
OTHER = "22222222-2222-2222-2222-222222222222"
on_one = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@dataclass
class Clock:
    """The authority's, which a test sets back to be given what has expired."""

    at: float | None = None

    def __call__(self) -> float:
        return time.time() if self.at is None else self.at


@dataclass(frozen=True)
class Realm:
    """One platform's authority, and its clock."""

    authority: Authority
    clock: Clock
    db: Database
    sealer: Sealer

    def host(self, host_id: str = HOST) -> tuple[Identity, Issued]:
        key, request = new_key()
        issued = self.authority.certify_host(host_id, request)
        return Identity(certificate=issued.certificate, key=key), issued

    def control(self) -> Identity:
        return self.authority.certify_control()[0]

    @contextlib.contextmanager
    def ago(self, seconds: float) -> Iterator[None]:
        self.clock.at = time.time() - seconds
        try:
            yield
        finally:
            self.clock.at = None


@contextlib.asynccontextmanager
async def realm(url: str, sealer: Sealer) -> AsyncIterator[Realm]:
    db, clock = Database.open(url), Clock()
    try:
        yield Realm(await Authority.open(db, sealer, "replica", clock), clock, db, sealer)
    finally:
        await db.close()


@pytest.fixture
async def ours(database_url: str, tmp_path: Path) -> AsyncIterator[Realm]:
    async with realm(database_url, Sealer.open(tmp_path / "key")) as ours:
        yield ours


@pytest.fixture
async def theirs(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Realm]:
    """Another platform's."""
    file = tmp_path / "theirs.sqlite3"
    file.write_bytes(migrated_sqlite.read_bytes())
    async with realm(f"sqlite:///{file}", Sealer.open(tmp_path / "their-key")) as theirs:
        yield theirs


# The authority.


async def test_all_replicas_have_the_same_issuers(ours: Realm) -> None:
    opened = [Authority.open(ours.db, ours.sealer, f"replica-{n}") for n in range(3)]
    others = await asyncio.gather(*opened)
    assert {each.control_issuer for each in others} == {ours.authority.control_issuer}
    assert {each.fingerprint for each in others} == {ours.authority.fingerprint}
    async with ours.db.read() as session:
        kept = await session.get(tables.Secret, "issuers")
    assert kept is not None and b"PRIVATE" not in kept.sealed and b"BEGIN" not in kept.sealed
    with pytest.raises(Invalid, match="sealed"):
        await Authority.open(ours.db, Sealer(_another_key()), "replica")


def _another_key() -> str:
    return "A" * 43 + "="


async def test_the_first_of_several_replicas_makes_the_issuers(database_url: str) -> None:
    db, sealer = Database.open(database_url), Sealer(_another_key())
    try:
        opened = await asyncio.gather(*(Authority.open(db, sealer, str(n)) for n in range(4)))
        assert len({each.fingerprint for each in opened}) == 1
    finally:
        await db.close()


@on_one
async def test_a_certificate_says_what_it_is_for(ours: Realm) -> None:
    identity, issued = ours.host()
    host = x509.load_pem_x509_certificate(identity.certificate.encode())
    names = host.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [name_of_host(HOST)]
    assert host.not_valid_after_utc.timestamp() == pytest.approx(time.time() + HOST_LIFE_S, abs=60)
    assert not host.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    control = x509.load_pem_x509_certificate(ours.control().certificate.encode())
    purposes = {
        each.extensions.get_extension_for_oid(ExtensionOID.EXTENDED_KEY_USAGE).value[0]  # type: ignore[index]
        for each in (host, control)
    }
    assert len(purposes) == 2 and host.issuer != control.issuer
    key = host.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
    assert issued.serial == host.serial_number
    assert "PRIVATE" not in repr(identity)


# What the control plane refuses: impostors at a host's address.


@dataclass
class Listener:
    """Something at an address, and the bytes it was sent by who believed it."""

    url: str
    heard: bytearray


@contextlib.asynccontextmanager
async def listening(context: ssl.SSLContext | None) -> AsyncIterator[Listener]:
    heard = bytearray()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                heard.extend(data)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(
        hear, "127.0.0.1", 0, ssl=context, ssl_shutdown_timeout=0.2 if context else None
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Listener(f"https://127.0.0.1:{port}", heard)


async def ask(realm: Realm, context: ssl.SSLContext | None, *serials: int) -> bytes:
    """Ask what is at a host's address for its sandboxes; what it was sent. Raises Unavailable."""
    accepted = {(name_of_host(HOST), serial) for serial in serials}
    door = realm.authority.door(lambda name, serial: (name, serial) in accepted)
    async with listening(context) as listener:
        agent = RemoteAgent(listener.url, door.context, name_of_host(HOST))
        try:
            await agent.list_sandboxes()
        except Unavailable:
            assert b"HTTP" not in listener.heard, "something was asked of an impostor"
            raise
        finally:
            await agent.aclose()
        return bytes(listener.heard)


def _served(identity: Identity, issuer: str) -> ssl.SSLContext:
    return agents_context(identity, issuer)


@on_one
async def test_the_control_plane_reaches_the_host_it_means(ours: Realm) -> None:
    identity, issued = ours.host()
    context = _served(identity, ours.authority.control_issuer)
    assert b"ListSandboxes" in await ask(ours, context, issued.serial)


@on_one
@pytest.mark.parametrize(
    "impostor",
    ["wrong_issuer", "control_issuer", "another_host", "expired", "revoked", "old_tls", "no_tls"],
)
async def test_the_control_plane_refuses(ours: Realm, theirs: Realm, impostor: str) -> None:
    identity, issued = ours.host()
    serials = [issued.serial]
    issuer = ours.authority.control_issuer
    if impostor == "wrong_issuer":
        identity, issued = theirs.host()
        serials.append(issued.serial)
    elif impostor == "control_issuer":
        identity = ours.control()
    elif impostor == "another_host":
        identity, issued = ours.host(OTHER)
        serials.append(issued.serial)
    elif impostor == "expired":
        with ours.ago(HOST_LIFE_S + 60):
            identity, issued = ours.host()
        serials.append(issued.serial)
    elif impostor == "revoked":
        serials.clear()
    context = None if impostor == "no_tls" else _served(identity, issuer)
    if impostor == "old_tls":
        assert context is not None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(Unavailable):
        await ask(ours, context, *serials)


@on_one
async def test_a_replicas_own_certificate_is_replaced_at_half_of_its_life(ours: Realm) -> None:
    identity, issued = ours.host()
    shown: list[int] = []
    context = _served(identity, ours.authority.control_issuer)

    async def look(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shown.append(int(writer.get_extra_info("peercert")["serialNumber"], 16))
        writer.close()

    server = await asyncio.start_server(look, "127.0.0.1", 0, ssl=context)
    with ours.ago(CONTROL_LIFE_S / 2 + 60):
        door = ours.authority.door(lambda _name, serial: serial == issued.serial)
        first = door.context
    async with server:
        port = server.sockets[0].getsockname()[1]
        for context in (first, door.context, door.context):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname=name_of_host(HOST)
            )
            await reader.read()
            writer.close()
    # The context is the same one: what connects shows the newest.
    assert len(shown) == 3 and len(set(shown[1:])) == 1
    assert door.context is first


# What an agent refuses.


@pytest.fixture
async def served(database_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with served_platform(database_url, tmp_path) as served:
        yield served


@on_one
async def test_an_agent_obeys_none_but_its_control_plane(served: Served, theirs: Realm) -> None:
    clock = Clock()
    sealer = served.platform.sealer
    authority = await Authority.open(served.platform.db, sealer, "mine", clock)
    mine = Realm(authority, clock, served.platform.db, sealer)
    async with joined(served) as (host_id, agent, _):
        with mine.ago(CONTROL_LIFE_S + 60):
            expired = mine.control()
        intruders: dict[str, Callable[[ssl.SSLContext], None]] = {
            "no certificate": lambda _: None,
            "wrong issuer": lambda context: show(context, theirs.control()),
            "expired": lambda context: show(context, expired),
            "a host's": lambda context: show(context, mine.host(host_id)[0]),
            "another host's": lambda context: show(context, mine.host(OTHER)[0]),
            "old TLS": lambda context: _aged(context, mine.control()),
        }
        for name, prepare in intruders.items():
            assert await call(agent.address, prepare) == b"", name
        answer = await call(agent.address, lambda context: show(context, mine.control()))
        assert answer.startswith(b"HTTP/1.1 200")
        assert not agent.task.done()


def _aged(context: ssl.SSLContext, identity: Identity) -> None:
    show(context, identity)
    context.maximum_version = ssl.TLSVersion.TLSv1_2


async def call(address: str, prepare: Callable[[ssl.SSLContext], None]) -> bytes:
    """What an agent answers to one who does not care who it is; nothing when it hangs up."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    prepare(context)
    host, port = address.removeprefix("https://").split(":")
    request = (
        b"POST /hostagent.v1.HostAgentService/ListSandboxes HTTP/1.1\r\nhost: agent\r\n"
        b"content-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
    )
    writer = None
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=context, ssl_shutdown_timeout=0.2
            )
            writer.write(request)
            return await reader.read(100)
    except OSError:
        return b""
    finally:
        if writer is not None:
            writer.close()


def test_a_request_proves_the_key_and_says_nothing_else() -> None:
    key, request = new_key()
    parsed = x509.load_pem_x509_csr(request.encode())
    private = serialization.load_pem_private_key(key.encode(), None)
    assert parsed.is_signature_valid and not parsed.subject
    assert parsed.public_key() == private.public_key()
