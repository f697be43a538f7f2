"""Whose port a request is for, what it must show, and what is told where it is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import time

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from sandmartin.control.address import Address, address_of
from sandmartin.control.certificates import Certificates
from sandmartin.control.passes import check, cleaned, signed_of
from sandmartin.control.proxy import api_hosts
from sandmartin.control.refusals import Refused
from sandmartin.control.seal import Sealer
from sandmartin.control.settings import ControlSettings
from sandmartin.control.tokens import Tokens
from sandmartin.errors import Denied, Invalid, Unauthenticated
from sandmartin.relay.forwarding import Asked
from sandmartin.relay.headers import Headers
from sandmartin.relay.refusal import Refusal

ID = "sb0123456789abcdefghij"
API = frozenset({"api.example.com", "10-0-0-5.example.com"})


def address(host: str, *headers: tuple[bytes, bytes], path: str = "/") -> Address | None:
    return address_of([(b"host", host.encode("latin-1")), *headers], path, API)


def test_a_call_of_the_api_that_names_its_sandbox() -> None:
    path, named = f"/sandboxes/{ID}/connect", (b"e2b-sandbox-id", ID.encode())
    for more in ((), ((b"e2b-sandbox-port", b"49983"),)):
        assert address("127.0.0.1", named, *more, path=path) is None
        assert address("api.example.com", named, *more, path=f"/v2{path}") is None
        assert address("127.0.0.1", named, *more, path="/files") == Address(ID, 49983)
    # What a sandbox serves itself is its own.
    other = (b"e2b-sandbox-port", b"8000")
    assert address("127.0.0.1", named, other, path=path) == Address(ID, 8000)
    assert address(f"49983-{ID}.example.com", path=path) == Address(ID, 49983)


@pytest.mark.parametrize(
    "host",
    [f"8000-{ID}", f"8000-{ID}.example.com", f"8000-{ID}.x.localhost:8443", f"8000-{ID}:80"],
)
def test_a_host_that_is_a_port_of_a_sandbox(host: str) -> None:
    assert address(host) == Address(ID, 8000)
    # Whatever the headers say.
    assert address(host, (b"e2b-sandbox-id", b"sbother")) == Address(ID, 8000)


@pytest.mark.parametrize(
    "host",
    ["", "api.example.com", "example.com:8000", "127.0.0.1", "[::1]:8000", "my-api.x", "localhost"],
)
def test_a_host_that_is_the_api(host: str) -> None:
    assert address(host) is None
    assert address("10-0-0-5.example.com:1") is None


@pytest.mark.parametrize(
    ("host", "text"),
    [
        (f"-{ID}.x", "the port is empty"),
        (f"0-{ID}.x", "the port is not valid"),
        (f"65536-{ID}.x", "the port is not valid"),
        (f"080-{ID}.x", "the port is not valid"),
        ("8000-.x", "the sandbox id is empty"),
        ("8000-sb-x.x", "the sandbox id is not valid"),
        (f"8000-{ID.upper()}.x", "the sandbox id is not valid"),
        ("8000-xn--bcher-kva.x", "the sandbox id is not valid"),
        (f"8000-{'a' * 64}.x", "the sandbox id is not valid"),
        (f"8000-{ID}.x.", "the host name ends with a dot"),
        (f"8000-{ID}.", "the host name ends with a dot"),
        ("8000-b\xfccher.x", "the Host header is no host name"),
        (f"8000-{ID}.x/y", "the Host header is no host name"),
        (f"u@8000-{ID}.x", "the Host header is no host name"),
    ],
)
def test_odd_labels_are_refused(host: str, text: str) -> None:
    with pytest.raises(Invalid, match=text):
        address(host)


@given(st.binary(max_size=80))
def test_any_host_is_a_sandbox_the_api_or_refused(host: bytes) -> None:
    try:
        found = address_of([(b"host", host)], "/", API)
    except Invalid:
        return
    if found is not None:
        assert host.startswith(f"{found.port}-{found.sandbox_id}".encode())
        assert 0 < found.port < 65536 and found.sandbox_id.isalnum()


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]", "sandbox.x", *sorted(API)])
def test_headers_that_name_a_sandbox(host: str) -> None:
    named = (b"e2b-sandbox-id", ID.encode())
    assert address(host, named) == Address(ID, 49983)
    assert address(host, named, (b"e2b-sandbox-port", b"49999")) == Address(ID, 49999)
    for odd in (b"", b"0", b"x", b"65536", b"+1"):
        with pytest.raises(Invalid):
            address(host, named, (b"e2b-sandbox-port", odd))
    with pytest.raises(Invalid):
        address(host, named, named)
    with pytest.raises(Invalid):
        address(host, (b"e2b-sandbox-id", b"../x"))


def test_headers_are_heard_at_our_own_names_alone() -> None:
    assert address("example.com", (b"e2b-sandbox-id", ID.encode())) is None
    settings = ControlSettings(public_url="https://a.test", domain="b.test:8443")
    assert api_hosts(settings) == {"a.test", "b.test", "api.b.test", "sandbox.b.test"}


# Tokens.


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(Sealer(Fernet.generate_key().decode()))


def test_tokens_are_derived(tokens: Tokens) -> None:
    key = Fernet.generate_key().decode()
    one, same = Tokens(Sealer(key)), Tokens(Sealer(key))
    assert one.access(ID) == same.access(ID) and one.traffic(ID) == same.traffic(ID)
    made = {t.access(i) for t in (one, tokens) for i in (ID, "sbx")} | {one.traffic(ID)}
    assert len(made) == 5 and all(len(each) == 64 for each in made)
    assert not one.is_access(ID, one.traffic(ID).encode())
    assert key not in repr(vars(one))


def asked(
    method: str = "GET", target: str = "/", headers: Headers | None = None, token: str = ""
) -> Asked:
    path, _, query = target.partition("?")
    given = [*(headers or []), *([(b"x-access-token", token.encode())] if token else [])]
    scope = {
        "method": method,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": given,
        "http_version": "1.1",
    }
    return Asked.of(scope)


def signed(tokens: Tokens, operation: str, expires: str = "", user: str = "") -> str:
    parts = ["/a b;", operation, user, tokens.access(ID), *([expires] if expires else [])]
    digest = hashlib.sha256(":".join(parts).encode()).digest()
    signature = "v1_" + base64.b64encode(digest).decode().rstrip("=")
    query = f"/files?path=%2Fa%20b%3B&signature={signature.replace('+', '%2B')}"
    query += f"&username={user}" if user else ""
    return query + (f"&signature_expiration={expires}" if expires else "")


GUEST, INTERPRETER, OTHER = (Address(ID, port) for port in (49983, 49999, 8000))


def test_the_guest_agents_port_needs_the_access_token(tokens: Tokens) -> None:
    check(asked(token=tokens.access(ID)), GUEST, tokens, public=True)
    check(asked("GET", "/health"), GUEST, tokens, public=True)
    twice = [(b"x-access-token", tokens.access(ID).encode())] * 2
    for wrong in (
        asked(),
        asked(token="x"),
        asked(token=tokens.traffic(ID)),
        asked(headers=twice),
        asked("POST", "/health"),
        asked("GET", "//health"),
        asked("GET", "/%68ealth"),
    ):
        with pytest.raises(Unauthenticated):
            check(wrong, GUEST, tokens, public=True)


@pytest.mark.parametrize("user", ["", "root"])
@pytest.mark.parametrize("expires_in_s", [None, 1000])
def test_a_signed_file(tokens: Tokens, user: str, expires_in_s: int | None) -> None:
    expires = "" if expires_in_s is None else str(int(time.time()) + expires_in_s)
    reading = signed(tokens, "read", expires, user)
    passed = check(asked("GET", reading), GUEST, tokens, public=True)
    assert b"path=%2Fa+b%3B" in passed.query
    check(asked("POST", signed(tokens, "write", expires, user)), GUEST, tokens, public=True)
    for method, query in (
        ("POST", reading),
        ("PUT", reading),
        ("DELETE", reading),
        ("GET", reading.replace("path=%2F", "path=%2Fx")),
        ("GET", reading.replace("/files", "/process.Process/List")),
        ("GET", reading.replace("/files", "/%66iles")),
        ("GET", reading.replace("signature=v1_", "signature=")),
    ):
        with pytest.raises(Unauthenticated):
            check(asked(method, query), GUEST, tokens, public=True)
    for ambiguous in ("&path=/b", "&username=x&username=y", "&a;path=/b"):
        with pytest.raises(Invalid):
            signed_of(asked("GET", reading + ambiguous))


def test_a_signature_whose_time_is_over(tokens: Tokens) -> None:
    with pytest.raises(Unauthenticated, match="signature is already expired"):
        check(asked("GET", signed(tokens, "read", "1000")), GUEST, tokens, public=True)


def test_private_ports(tokens: Tokens) -> None:
    for to in (INTERPRETER, OTHER):
        check(asked(), to, tokens, public=True)
        with pytest.raises(Denied):
            check(asked(), to, tokens, public=False)
        for name in (b"e2b-traffic-access-token", b"x-traffic-token"):
            given = [(name, tokens.traffic(ID).encode())]
            check(asked(headers=given), to, tokens, public=False)
            with pytest.raises(Denied):
                check(asked(headers=[(name, b"x")]), to, tokens, public=False)
    check(asked(token=tokens.access(ID)), INTERPRETER, tokens, public=False)
    with pytest.raises(Denied):
        check(asked(token=tokens.access(ID)), OTHER, tokens, public=False)


def test_what_is_taken_out() -> None:
    assert cleaned([(b"cookie", b"sandmartin_session=x")]) == []
    assert cleaned([(b"cookie", b" a=b;__Host-sandmartin = x")]) == [(b"cookie", b"a=b")]
    assert cleaned([(b"authorization", b"BEARER  e2b_00")]) == []
    basic = [(b"authorization", b"Basic e2b_")]
    assert cleaned(basic) == basic


# Refusals.


def test_what_programs_and_people_are_told() -> None:
    refused = Refused.by(Refusal.PORT_CLOSED, ID, 8000)
    kind, body = refused.body(asked())
    assert kind == b"application/json"
    told = {"message": "The sandbox is running but port is not open", "code": 502}
    assert json.loads(body) == {"sandboxId": ID, **told, "port": 8000}
    kind, body = Refused(status=400, message="<b>").body(asked(headers=[(b"accept", b"text/html")]))
    assert kind.startswith(b"text/html") and b"&lt;b&gt;" in body and b"<b>" not in body


# Certificates and settings.


def test_certificates_are_for_one_name() -> None:
    made = Certificates.make("bank")
    assert made.domain == "bank.localhost"
    assert made.key not in repr(made)
    for odd in ("Bank", "-a", "a..b", "a_b", "", "../x"):
        with pytest.raises(Invalid):
            Certificates.make(odd)


def test_the_domain_that_clients_are_told() -> None:
    def told(**settings: str) -> str:
        return ControlSettings(**settings).listening_on(8443).domain  # type: ignore[arg-type]

    assert told() == ""
    assert told(domain="a.localhost") == "a.localhost:8443"
    assert told(domain="a.localhost:1") == "a.localhost:1"
    assert told(domain="a.test", public_url="https://b.test") == "a.test"
    for odd in ({"domain": "A"}, {"domain": "a b"}, {"tls_cert": "x"}):
        with pytest.raises(Invalid):
            ControlSettings(**odd)  # type: ignore[arg-type]
