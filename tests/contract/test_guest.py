"""The guest agent, as a plain process, and the host agent's client of it keep to one contract."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandmartin.agent.guest import Deadlines, Guest
from sandmartin.errors import (
    GuestSilent,
    Invalid,
    SandmartinError,
    TimedOut,
    ToolFailed,
)
from tests.contract.guests import (
    ME,
    MIB,
    STREAM,
    TOKEN,
    RunningAgent,
    alive,
    collect,
    identity,
    impostor,
    pattern,
    running,
    shell,
    started,
    wait_until,
)

# Introduction.


async def test_nothing_is_served_before_the_introduction_and_tokens_change_hands(
    binary: Path,
) -> None:
    with running(binary) as fresh:
        guest, other = fresh.client("first"), fresh.client("second")
        assert not await guest.healthy(2)
        with pytest.raises(GuestSilent, match="not been introduced"):
            await collect(guest.start(shell("true")))
        async with httpx.AsyncClient() as plain:
            assert (await plain.get(f"{fresh.url}/metrics")).status_code == 503

        assert await guest.introduce(identity("first"), 5) == "0.6.13"
        assert await guest.healthy(2)
        with pytest.raises(Invalid, match="access token"):
            await collect(other.start(shell("true")))
        with pytest.raises(ToolFailed, match="not the one in force"):
            await other.introduce(identity("third"), 5)

        # As after a fork: the parent's token introduces, and is refused from then on.
        parent = fresh.client("first")
        await guest.introduce(identity("second"), 5)
        assert (await collect(guest.start(shell("echo 1"))))[0] == b"1\n"
        with pytest.raises(Invalid, match="access token"):
            await parent.signal(1, 15)
        # The answer was lost and the host repeats what it said.
        await parent.introduce(identity("second"), 5)
        for client in (guest, other, parent):
            await client.close()


async def test_a_later_introduction_replaces_the_environment_only_if_it_has_one(
    binary: Path,
) -> None:
    with running(binary) as fresh:
        guest = fresh.client()
        for given, shown in (({"A": "1"}, b"1\n"), (None, b"1\n"), ({"B": "ä"}, b"\n")):
            told = replace(identity(), envs=given, root_bytes=1 << 40, moved=True)
            await guest.introduce(told, 5)
            assert (await collect(guest.start(shell("echo $A"))))[0] == shown
        assert (await collect(guest.start(shell("echo $B"))))[0].decode() == "ä\n"
        await guest.close()


async def test_only_the_gateway_introduces(binary: Path) -> None:
    with running(binary, gateway="127.0.0.2") as stranger:
        guest = stranger.client()
        with pytest.raises(ToolFailed, match="for the host alone"):
            await guest.introduce(identity(), 5)
        assert not await guest.healthy(2)
        await guest.close()


async def test_a_guest_that_never_boots_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    guest = Guest("127.0.0.1", TOKEN, port)
    begun = time.monotonic()
    with pytest.raises(TimedOut):
        await guest.introduce(identity(), 0.3)
    assert time.monotonic() - begun < 3
    await guest.close()


async def test_a_guest_that_is_reached_late_is_told_the_time_it_is_then() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = listener.getsockname()
    guest = Guest("127.0.0.1", TOKEN, address[1])
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener).setblocking(False)
        for _ in range(3):
            # Behind these, whoever connects is not heard, and knocks again a second later.
            before = stack.enter_context(socket.socket())
            before.setblocking(False)
            before.connect_ex(address)
        introducing = asyncio.create_task(guest.introduce(identity(), 20))
        began = time.time()
        while _waiting(address[1]) < 4:
            await asyncio.sleep(0.01)
        content = b""
        while b"timestamp" not in content:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            stack.enter_context(connection).settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                while piece := await asyncio.to_thread(connection.recv, 65536):
                    content += piece
        told = json.loads(content[content.index(b"{") :].splitlines()[0])["timestamp"]
        assert time.time() - began > 0.5
        assert time.time() - datetime.fromisoformat(told).timestamp() < 0.4
        introducing.cancel()
        await asyncio.wait({introducing})
    await guest.close()


def _waiting(port: int) -> int:
    """How many have connected to a port, or try to."""
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return sum(f"0100007F:{port:04X}" == line.split()[2] for line in lines)


async def test_the_environments_proxy_is_never_used(
    agent: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    guest = agent.client()
    assert await guest.healthy(5)
    await guest.close()


# A guest that falls silent, and one that is hostile.


async def test_a_stopped_agent_is_silent_within_the_deadlines(binary: Path, tmp_path: Path) -> None:
    deadlines = Deadlines(call_s=0.4, stream_s=2, upload_s=0.4)
    with running(binary) as agent:
        guest = agent.client(deadlines=deadlines)
        await guest.introduce(identity(), 5)
        events = guest.start(shell("sleep 300", stdin=True))
        pid = await started(events)
        # Keepalives keep a quiet stream; a command that does not read keeps its writer.
        quiet = asyncio.ensure_future(anext(events))
        feeding = asyncio.ensure_future(guest.send_input(pid, bytes(MIB)))
        done, _ = await asyncio.wait({quiet, feeding}, timeout=2.5)
        assert not done
        os.kill(agent.pid, signal.SIGSTOP)
        begun = time.monotonic()
        for waiting in (quiet, feeding):
            with pytest.raises(GuestSilent):
                await waiting
        assert time.monotonic() - begun < 3
        await _expect_silence(guest, os.fspath(tmp_path / "file"), pid)
        os.kill(agent.pid, signal.SIGCONT)
        assert await guest.healthy(5)
        await guest.signal(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        await guest.close()


async def _expect_silence(guest: Guest, path: str, pid: int) -> None:
    begun = time.monotonic()
    assert not await guest.healthy(0.2)
    for asking in (
        guest.signal(pid, signal.SIGCONT),
        guest.close_input(pid),
        guest.upload(path, ME, pattern(64 * MIB)),
        anext(guest.download(path, ME)),
        anext(guest.start(shell("true"))),
    ):
        with pytest.raises(GuestSilent):
            await asking
    assert time.monotonic() - begun < 5


def _stream(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\n"
    return head + b"Connection: close\r\n\r\n" + body


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(_stream(b"\0\xff\xff\xff\xff"), ToolFailed, id="4 GB message"),
        pytest.param(_stream(b"\1\0\0\0\2ab"), ToolFailed, id="compressed"),
        pytest.param(_stream(b"\0\0\0\0\3\xff\xff\xff"), ToolFailed, id="no protobuf"),
        pytest.param(_stream(b"\0\0\0\0\x09ab"), GuestSilent, id="cut"),
        pytest.param(_stream(b"\2\0\0\0\2{}"), GuestSilent, id="no end event"),
        pytest.param(_stream(b"\2\0\0\0\1{"), GuestSilent, id="no JSON"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", GuestSilent, id="no HTTP"),
        pytest.param(b"", GuestSilent, id="nothing"),
        pytest.param(
            b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
            ToolFailed,
            id="redirect",
        ),
        pytest.param(
            b"HTTP/1.1 500 No\r\nContent-Length: 9000000\r\n\r\n" + bytes(9_000_000),
            ToolFailed,
            id="endless error",
        ),
    ],
)
async def test_whatever_a_hostile_guest_answers_is_one_of_our_errors(
    answer: bytes, error: type[SandmartinError]
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async with impostor(serve) as port:
        guest = Guest("127.0.0.1", TOKEN, port)
        with pytest.raises(error):
            await collect(guest.start(shell("true")))
        await guest.close()


@pytest.mark.parametrize("version", ["", "1", "0.6.13\n", "9" * 99, None, {"a": 1}])
async def test_a_version_that_is_none_is_not_believed(version: Any) -> None:
    told = identity()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        names = {"sandboxId": told.sandbox_id, "hostname": told.hostname}
        body = json.dumps(names | {"machineId": told.machine_id, "envdVersion": version})
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    async with impostor(serve) as port:
        guest = Guest("127.0.0.1", TOKEN, port)
        assert await guest.introduce(told, 5) == ""
        await guest.close()


async def test_a_guest_that_confirms_another_identity_is_refused() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        body = json.dumps({"sandboxId": "sbother", "hostname": "sbother", "machineId": "0"})
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    async with impostor(serve) as port:
        guest = Guest("127.0.0.1", TOKEN, port)
        with pytest.raises(ToolFailed, match="another identity"):
            await guest.introduce(identity(), 5)
        await guest.close()


# What others than our client send.


def _request(path: str, kind: str, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return (
        f"POST {path} HTTP/1.1\r\nHost: guest\r\nX-Access-Token: {TOKEN}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
    ).encode() + body


START = "/process.Process/Start"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (_request(START, STREAM, b"\0\xff\xff\xff\xff"), b'"error"'),
        (_request(START, STREAM, b"\0\0\0\0\x20{"), b'"error"'),
        (_request(START, STREAM, b"\0\0\0\0\4null"), b'"error"'),
        (_request(START, STREAM, b"\0\0\0\0\x05{]}{["), b'"error"'),
        (_request(START, STREAM, b"\1\0\0\0\2{}"), b'"error"'),
        (_request(START, STREAM, b""), b'"error"'),
        (_request("/process.Process/List", "application/json", b"{]"), b"HTTP/1.1 400 "),
        (_request("/process.Process/List", "text/plain", b"{}"), b"HTTP/1.1 415 "),
        (_request("/process.Process/None", "application/json", b"{}"), b"HTTP/1.1 404 "),
        (_request("/files?path=/tmp/x", "multipart/form-data", b""), b"HTTP/1.1 400 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", b"HTTP/1.1 431 "),
    ],
)
async def test_malformed_requests_are_answered_and_the_agent_lives(
    agent: RunningAgent, guest: Guest, sent: bytes, answered: bytes
) -> None:
    reader, writer = await asyncio.open_connection(agent.host, agent.port)
    writer.write(sent)
    # A body that ends early, not a connection that is idle.
    writer.write_eof()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answered in answer
    assert await guest.healthy(5)


def test_the_environment_is_told_to_who_has_the_token(
    agent: RunningAgent, sdk: httpx.Client
) -> None:
    assert sdk.get("/envs").json() == {"SANDBOX_VAR": "of the sandbox"}
    assert httpx.get(f"{agent.url}/envs").status_code == 401


def test_metrics(sdk: httpx.Client) -> None:
    sample = sdk.get("/metrics").json()
    assert sample["cpu_count"] >= 1
    assert 0 < sample["mem_used"] < sample["mem_total"]
    assert 0 < sample["disk_used"] <= sample["disk_total"]
    assert sample["cpu_used_pct"] >= 0
