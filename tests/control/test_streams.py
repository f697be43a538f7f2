"""WebSockets into a sandbox: commands as they run, terminals, who may connect."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from websockets import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.contract.guests import alive, wait_until
from tests.control.living import Place

pytestmark = pytest.mark.root

DEADLINE_S = 20.0


async def send(socket: ClientConnection, kind: str, **fields: Any) -> None:
    await socket.send(json.dumps({"type": kind, **fields}))


async def receive(socket: ClientConnection) -> dict[str, Any]:
    """The next message."""
    async with asyncio.timeout(DEADLINE_S):
        message: dict[str, Any] = json.loads(await socket.recv())
    return message


def data_of(message: dict[str, Any]) -> bytes:
    return base64.b64decode(message.get("data", ""))


async def until(socket: ClientConnection, kind: str, ending: bytes = b"") -> bytes:
    """The data of all messages until one of a kind, or one after which the data ends so."""
    heard = b""
    while True:
        message = await receive(socket)
        heard += data_of(message)
        if message["type"] == kind and heard.endswith(ending):
            return heard
        assert message["type"] != "error", message


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def test_a_command_talks_both_ways(place: Place) -> None:
    async with place.socket("/exec/stream") as socket:
        await send(socket, "start", cmd="sh", args=["-c", "cat; echo over >&2; exit 4"], tag="cat")
        start = await receive(socket)
        assert start["type"] == "start" and start["pid"] > 0 and start["tag"] == "cat"
        await send(socket, "stdin", data=b64(b"\0\xff\n"))
        assert await until(socket, "stdout", b"\0\xff\n") == b"\0\xff\n"
        # A mistake is told, and costs nothing.
        for wrong in ({"type": "stdin", "data": "?"}, {"type": "resize"}, {"type": "signal"}):
            await socket.send(json.dumps(wrong))
            told = await receive(socket)
            assert (told["type"], told["code"], told["fatal"]) == ("error", "invalid", False)
        await send(socket, "stdin_close")
        assert await until(socket, "stderr") == b"over\n"
        end = await receive(socket)
        assert end == {"type": "exit", "exit_code": 4, "signal": 0, "error": ""}
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000


async def test_bytes_go_as_they_are_when_asked_for(place: Place) -> None:
    async with place.socket("/exec/stream") as socket:
        await send(socket, "start", cmd="cat", binary=True)
        assert json.loads(await socket.recv())["type"] == "start"
        data = os.urandom(1 << 18)
        await socket.send(data)
        heard = b""
        while len(heard) < len(data):
            piece = await socket.recv()
            assert isinstance(piece, bytes) and piece[:1] == b"\1"
            heard += piece[1:]
        assert heard == data
        await send(socket, "signal", signal="SIGTERM")
        assert json.loads(await socket.recv())["exit_code"] == 128 + 15


async def test_a_client_is_sent_no_more_than_it_takes(place: Place) -> None:
    window, size = 1 << 18, 1 << 21
    async with place.socket("/exec/stream") as socket:

        async def take(within_s: float) -> int:
            piece = await asyncio.wait_for(socket.recv(), within_s)
            assert isinstance(piece, bytes) and piece[:1] == b"\1"
            return len(piece) - 1

        script = f"head -c {size} /dev/zero; echo over >&2"
        await send(socket, "start", cmd="sh", args=["-c", script], binary=True, window=window)
        assert json.loads(await socket.recv())["type"] == "start"
        heard = 0
        for _ in range(2):
            before = heard
            with pytest.raises(TimeoutError):
                while True:
                    heard += await take(0.5)
            # The last piece is sent as a whole.
            assert window <= heard - before < 2 * window
            await send(socket, "taken", bytes=heard - before)
        while heard < size:
            piece = await take(DEADLINE_S)
            heard += piece
            await send(socket, "taken", bytes=piece)
        assert heard == size
        assert await asyncio.wait_for(socket.recv(), DEADLINE_S) == b"\2over\n"
        assert json.loads(await socket.recv())["exit_code"] == 0


async def test_a_terminal_outlives_its_window(place: Place) -> None:
    async with place.socket("/pty") as socket:
        await send(socket, "start", cmd="/bin/sh", envs={"PS1": "> "})
        started = await receive(socket)
        assert started["type"] == "started" and started["tag"].startswith("pty-")
        await send(socket, "resize", cols=101, rows=37)
        await send(socket, "input", data=b64(b"stty size; tty -s && echo a-$((6*7))\n"))
        assert b"37 101" in await until(socket, "output", b"a-42\r\n> ")
    assert alive(started["pid"])
    async with place.socket("/pty") as socket:
        await send(socket, "connect", tag=started["tag"])
        assert (await receive(socket))["pid"] == started["pid"]
        await send(socket, "input", data=b64(b"echo back-$((6*7))\n"))
        await until(socket, "output", b"back-42\r\n> ")
        await send(socket, "kill")
        await until(socket, "exit")
    wait_until(lambda: not alive(started["pid"]))


async def test_one_may_listen_to_what_runs_already(place: Place) -> None:
    script = "echo first; read x; echo $x"
    async with place.socket("/exec/stream") as socket:
        await send(socket, "start", cmd="sh", args=["-c", script], tag="reader")
        await until(socket, "stdout", b"first\n")
    async with place.socket("/processes/reader/stream") as socket:
        assert (await receive(socket))["type"] == "start"
        await send(socket, "stdin", data=b64(b"second\n"))
        assert await until(socket, "stdout") == b"second\n"
        assert (await receive(socket))["type"] == "exit"


async def test_who_connects_is_asked(place: Place) -> None:
    async def refusal(socket: ClientConnection) -> tuple[str, int]:
        told = await receive(socket)
        assert told["type"] == "error" and told["fatal"]
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        return told["code"], closed.value.rcvd.code

    async with place.socket("/pty", headers={}) as socket:
        await send(socket, "auth", token=place.key)
        await send(socket, "start", cmd="true")
        assert (await receive(socket))["type"] == "started"
    wrong = {"x-api-key": "e2b_" + "0" * 40}
    async with place.socket("/pty", headers=wrong) as socket:
        assert await refusal(socket) == ("unauthenticated", 1008)
    for first in ({"type": "auth"}, {"type": "start", "cmd": "true"}, {"type": "auth", "token": 7}):
        async with place.socket("/pty", headers={}) as socket:
            await socket.send(json.dumps(first))
            assert await refusal(socket) == ("unauthenticated", 1008)
    for opening, code in (
        ("[]", "invalid"),
        ("{", "invalid"),
        ('{"type": "stdin"}', "invalid"),
        ('{"type": "start", "cols": 0}', "invalid"),
        ('{"type": "connect", "tag": "nobody"}', "not_found"),
        ('{"type": "start", "cmd": "no-such"}', "command_not_started"),
    ):
        async with place.socket("/pty") as socket:
            await socket.send(opening)
            assert await refusal(socket) == (code, 1008), opening


async def test_who_says_nothing_is_shown_out(place: Place) -> None:
    async with place.socket("/exec/stream", headers={}) as socket:
        assert (await receive(socket))["code"] == "unauthenticated"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_slow_reader_slows_the_command(place: Place) -> None:
    """Of endless output only what queues hold is made, and nothing of it is lost."""
    async with place.socket("/exec/stream", max_queue=1) as socket:
        await send(socket, "start", cmd="seq", args=["1", "99999999"])
        pid = (await receive(socket))["pid"]
        before = resident_bytes()
        ticks = [-2, -1]
        async with asyncio.timeout(DEADLINE_S):
            # It writes no more once all between it and us is full.
            while ticks[-1] != ticks[-2]:
                await asyncio.sleep(0.3)
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks.append(int(fields[11]) + int(fields[12]))
        assert resident_bytes() - before < 64 << 20
        heard = bytearray()
        while len(heard) < 16 << 20:
            heard += data_of(await receive(socket))
        lines = bytes(heard).split(b"\n")[:-1]
        assert lines == [b"%d" % number for number in range(1, len(lines) + 1)]
        await send(socket, "stop")
        while (await receive(socket))["type"] != "exit":
            pass
