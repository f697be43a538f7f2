"""The monitor against a peer that a guest may have taken over: bounded, and never confused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent.vmm.monitor import Monitor, connect, listen
from sandmartin.errors import SandmartinError, TimedOut, ToolFailed, Unavailable

_GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": []}}


class Peer:
    """The other end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._heard = ""

    async def ask(self) -> dict[str, Any]:
        """The next command; ends the peer when there is none."""
        # QMP is a stream of objects; they need no line ends.
        while True:
            with contextlib.suppress(json.JSONDecodeError):
                command, end = json.JSONDecoder().raw_decode(self._heard)
                self._heard = self._heard[end:].lstrip()
                assert isinstance(command, dict)
                return command
            if not (said := await self.reader.read(65536)):
                raise EOFError
            self._heard += said.decode()

    def say(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\r\n")

    def answer(self, command: dict[str, Any], value: object) -> None:
        self.say({"return": value, "id": command["id"]})

    async def negotiate(self) -> None:
        self.say(_GREETING)
        await self.ask()
        self.say({"return": {}})


@contextlib.asynccontextmanager
async def _served(
    tmp_path: Path,
    *scripts: Callable[[Peer], Awaitable[None]],
    on_event: Callable[[str], None] = lambda event: None,
) -> AsyncIterator[Monitor]:
    """A monitor whose connections are answered by one script each, the last one again and again."""
    path = tmp_path / "monitor"
    left = list(scripts)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = left.pop(0) if len(left) > 1 else left[0]
        with contextlib.suppress(EOFError, ConnectionError, asyncio.CancelledError):
            await script(Peer(reader, writer))
            await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, sock=listen(path))
    monitor = Monitor(path, on_event)
    try:
        yield monitor
    finally:
        await monitor.close()
        server.close()
        await server.wait_closed()


async def _echo(peer: Peer) -> None:
    """A well-behaved one: answers each command with its name and arguments."""
    await peer.negotiate()
    while True:
        command = await peer.ask()
        peer.answer(command, [command["execute"], command.get("arguments", {})])


async def test_answers_and_refusals(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.negotiate()
        peer.answer(await peer.ask(), {"status": "running"})
        refused = await peer.ask()
        peer.say({"error": {"class": "GenericError", "desc": "x" * 5000}, "id": refused["id"]})
        await _repeat(peer)

    async with _served(tmp_path, script) as monitor:
        assert not monitor.connected
        assert await monitor.execute("query-status") == {"status": "running"}
        assert monitor.connected
        with pytest.raises(ToolFailed, match=r"QEMU refused cont: x+$") as caught:
            await monitor.execute("cont")
        # What it says is not let into our messages without bound.
        assert len(caught.value.message) < 500
        assert await monitor.execute("stop", {"a": 1}) == ["stop", {"a": 1}]


async def _repeat(peer: Peer) -> None:
    while True:
        command = await peer.ask()
        peer.answer(command, [command["execute"], command.get("arguments", {})])


async def test_silence_has_a_deadline_and_the_next_call_connects_anew(tmp_path: Path) -> None:
    async def mute(peer: Peer) -> None:
        await peer.negotiate()

    async def wordless(peer: Peer) -> None:
        pass

    async with _served(tmp_path, wordless, mute, _echo) as monitor:
        for _ in range(2):
            with pytest.raises(TimedOut, match=r"did not answer stop within 0\.1 s"):
                await monitor.execute("stop", deadline_s=0.1)
            assert not monitor.connected
        assert await monitor.execute("stop") == ["stop", {}]


async def test_late_and_doubled_answers_are_not_taken_for_those_of_another_call(
    tmp_path: Path,
) -> None:
    late = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await peer.negotiate()
        command = await peer.ask()
        await late.wait()
        peer.answer(command, "late")

    async def doubling(peer: Peer) -> None:
        await peer.negotiate()
        first = await peer.ask()
        for _ in range(3):
            peer.answer(first, "first")
        peer.say({"return": "nobody's", "id": "__qmp#99999"})
        second = await peer.ask()
        peer.answer(first, "first again")
        peer.answer(second, "second")

    async with _served(tmp_path, slow, doubling) as monitor:
        with pytest.raises(TimedOut):
            await monitor.execute("one", deadline_s=0.1)
        late.set()
        assert await monitor.execute("two") == "first"
        assert await monitor.execute("three") == "second"


async def test_calls_that_share_a_silent_connection_end_together(tmp_path: Path) -> None:
    async def mute(peer: Peer) -> None:
        await peer.negotiate()

    async with _served(tmp_path, mute, _echo) as monitor:
        first = asyncio.ensure_future(monitor.execute("one", deadline_s=0.2))
        second = asyncio.ensure_future(monitor.execute("two", deadline_s=0.4))
        with pytest.raises(TimedOut):
            await first
        # It shared the connection that fell silent: broken off, and not left until its own end.
        with pytest.raises(Unavailable):
            await second
        assert await monitor.execute("three") == ["three", {}]


_HOSTILE: dict[str, bytes] = {
    "garbage": b"\x00\xff\xfe not json\r\n",
    "no object": b"[1, 2]\r\n",
    "oversized": b'{"return": "' + b"x" * (1 << 20) + b'"}\r\n',
    "endless line": b"x" * (1 << 20),
    "deeply nested": b"[" * 200_000 + b"\r\n",
    "error without id": b'{"error": {"class": "GenericError", "desc": "?"}}\r\n',
    "id that is no text": b'{"return": 1, "id": [1]}\r\n',
    "event without a name": b'{"event": [], "timestamp": 5}\r\n',
    "hanging up": b"",
}


@pytest.mark.parametrize("kind", _HOSTILE)
@pytest.mark.parametrize("greeted", [True, False])
async def test_hostile_words_become_our_errors(
    tmp_path: Path, kind: str, greeted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(peer: Peer) -> None:
        if greeted:
            await peer.negotiate()
            await peer.ask()
        peer.writer.write(_HOSTILE[kind])
        peer.writer.close()

    async with _served(tmp_path, script, _echo) as monitor:
        began = time.monotonic()
        with pytest.raises((Unavailable, TimedOut)) as caught:
            await monitor.execute("stop", deadline_s=2)
        assert time.monotonic() - began < 3
        assert len(caught.value.message) < 600
        assert await monitor.execute("cont") == ["cont", {}]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"error": 5},
        {"error": None},
        {"error": {"class": "GenericError"}},
        {"error": {"class": 1, "desc": [2]}},
        {"return": 1, "error": {"class": "GenericError", "desc": "both"}},
    ],
)
async def test_malformed_answers_become_our_errors(tmp_path: Path, reply: dict[str, Any]) -> None:
    async def script(peer: Peer) -> None:
        await peer.negotiate()
        peer.say(reply | {"id": (await peer.ask())["id"]})

    async with _served(tmp_path, script) as monitor:
        with contextlib.suppress(SandmartinError):
            await monitor.execute("stop", deadline_s=1)
            assert "return" in reply


async def test_events_are_told_and_not_kept(tmp_path: Path) -> None:
    seen: list[str] = []
    flood = 20_000

    async def script(peer: Peer) -> None:
        await peer.negotiate()
        command = await peer.ask()
        for n in range(flood):
            peer.say({"event": f"E{n % 2}", "data": {}, "timestamp": {"seconds": n}})
            await peer.writer.drain()
        peer.say({"event": 7, "timestamp": {"seconds": 1}})
        peer.answer(command, "done")
        await _repeat(peer)

    async with _served(tmp_path, script, on_event=seen.append) as monitor:
        assert await monitor.execute("stop") == "done"
        # First the new connection, before which events may have been missed.
        assert seen[:3] == ["", "E0", "E1"]
        assert len(seen) == flood + 1
        assert monitor._client is not None
        assert monitor._client.events.history == ()


async def test_nobody_there_is_unavailable(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "none", lambda event: None)
    for _ in range(2):
        with pytest.raises(Unavailable, match="cannot be reached"):
            await monitor.execute("stop")
    # One that listened and died, however deep its path.
    deep = tmp_path / ("d" * 100) / "monitor"
    deep.parent.mkdir()
    listen(deep).close()
    with pytest.raises(Unavailable):
        connect(deep)
    with listen(deep) as listener, connect(deep):
        assert deep.stat().st_mode & 0o777 == 0o600
        listener.accept()[0].close()
