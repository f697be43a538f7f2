"""The guest agent's own port through the platform, with a real guest agent behind it."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import quote

import httpx
import pytest

from sandmartin.relay.refusal import HEADER
from tests.control.conftest import DEADLINE_S
from tests.control.inside import connected, listening, request
from tests.control.living import Place

GUEST = 49983


@pytest.fixture
def token(place: Place) -> str:
    return place.platform.tokens.access(place.sandbox_id)


def _port(place: Place) -> int:
    return int(place.url.rpartition(":")[2])


async def _ask(
    place: Place, method: str, target: str, *headers: str, body: bytes = b"", port: int = GUEST
) -> tuple[int, dict[str, str], bytes]:
    host = f"{port}-{place.sandbox_id}.x"
    async with connected(_port(place), request(method, target, host, *headers, body=body)) as raw:
        return await raw.answer()


async def test_health_and_calls_by_name_and_by_headers(place: Place, token: str) -> None:
    assert (await _ask(place, "GET", "/health"))[0] == 204
    call = ("POST", "/process.Process/List", "Content-Type: application/json")
    status, _, body = await _ask(place, *call, body=b"{}")
    assert status == 401 and json.loads(body)["sandboxId"] == place.sandbox_id
    status, _, body = await _ask(place, *call, f"X-Access-Token: {token}", body=b"{}")
    assert (status, json.loads(body)) == (200, {})
    named = {"e2b-sandbox-id": place.sandbox_id, "x-access-token": token}
    async with httpx.AsyncClient(base_url=place.url, headers=named, trust_env=False) as client:
        assert (await client.get("/health")).status_code == 204
        answer = await client.post("/process.Process/List", json={})
        assert (answer.status_code, answer.json()) == (200, {})
        # On the same connection, what names no sandbox is the API.
        api = await client.get("/v1/sandboxes", headers={"e2b-sandbox-id": ""})
        assert api.status_code == 400
    assert (await place.http.get("/v1/sandboxes")).status_code == 200
    # Clients that forget to name it are known by its token.
    async with httpx.AsyncClient(base_url=place.url, trust_env=False) as client:
        for given, health, listed in ((token, 204, 200), ("0" * 64, 502, 502), ("x", 404, 404)):
            lone = {"x-access-token": given}
            assert (await client.get("/health", headers=lone)).status_code == health
            answer = await client.post("/process.Process/List", json={}, headers=lone)
            assert answer.status_code == listed, answer.text


@pytest.mark.parametrize(
    "target", ["/init", "/%69nit", "//init", "/./init", "/x/../init", "/tunnel?port=22", "/Freeze"]
)
@pytest.mark.parametrize("absolute", [False, True])
async def test_control_routes_are_refused_twice(
    place: Place, token: str, target: str, absolute: bool
) -> None:
    host = f"{GUEST}-{place.sandbox_id}.x"
    asked = f"http://{host}{target}" if absolute else target
    for method in ("GET", "POST"):
        status, headers, _ = await _ask(place, method, asked, f"X-Access-Token: {token}")
        assert status == 404
        assert HEADER.decode() not in headers
    # The agent refuses it, too, whoever asks.
    path = f"/sandbox/{place.sandbox_id}/{GUEST}{target}"
    reader, writer = await asyncio.open_unix_connection(place.host.fakes.machine.settings.socket)
    writer.write(request("POST", path, "agent", close=True))
    head, _, body = (await asyncio.wait_for(reader.read(), DEADLINE_S)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 404") and json.loads(body)["code"] == "control_route"


async def test_a_target_for_another_host_is_refused(place: Place, token: str) -> None:
    for target in ("http://other/health", "*", "other:443"):
        method = "CONNECT" if target == "other:443" else "GET"
        assert (await _ask(place, method, target))[0] == 400


async def test_files_by_signed_addresses(place: Place, tmp_path: object) -> None:
    path, tokens = f"{tmp_path}/a b.txt", place.platform.tokens
    user = "root"

    def url(operation: str, expires: str = "") -> str:
        signature = tokens.signature(place.sandbox_id, path, operation, user, expires)
        query = f"/files?path={quote(path)}&username={user}&signature={quote(signature, safe='')}"
        return query + (f"&signature_expiration={expires}" if expires else "")

    plain = ("Content-Type: application/octet-stream",)
    assert (await _ask(place, "POST", url("write"), *plain, body=b"content"))[0] == 200
    assert (await _ask(place, "GET", url("read", "9999999999")))[2] == b"content"
    status, _, body = await _ask(place, "GET", url("read", "1000"))
    assert (status, json.loads(body)) == (
        401,
        {"code": 401, "message": "signature is already expired"},
    )
    assert (await _ask(place, "GET", url("write")))[0] == 401
    # Without any word of a sandbox: it is found by the signature.
    async with httpx.AsyncClient(base_url=place.url, trust_env=False) as client:
        answer = await client.get(url("read"))
        assert (answer.status_code, answer.content) == (200, b"content")
        answer = await client.get(url("read", "1000"))
        assert answer.json() == {"code": 401, "message": "signature is already expired"}
        other = url("read").replace("signature=v1_", "signature=v1_AAAA")
        assert (await client.get(other)).status_code == 404


async def test_what_listens_on_loopback_alone(place: Place) -> None:
    """The guest here is a process beside us, whose host address is refused on another port."""
    async with listening() as inside:
        # Every address of this guest's is loopback: only a listener on the other one is hidden.
        status, _, body = await _ask(place, "GET", "/", port=inside.port)
        assert (status, body) == (200, b"hi")
    hidden = await asyncio.start_server(_greet, "::1", 0)
    port = hidden.sockets[0].getsockname()[1]
    async with hidden:
        status, _, body = await _ask(place, "GET", "/", port=port)
        assert (status, body) == (200, b"hi")
        big = await _ask(place, "POST", "/", port=port, body=b"x" * (1 << 20))
        assert big[0] == 200
    status, _, body = await _ask(place, "GET", "/", port=port)
    assert status == 502 and json.loads(body)["port"] == port


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if b"POST" in head:
        await reader.readexactly(1 << 20)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
    await writer.drain()
    writer.close()
